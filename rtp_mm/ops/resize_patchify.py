"""From decoded frames to patch rows, equal to Pillow byte for byte, on any device."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

import rtp_mm.ops.library  # noqa: F401  # the schema must be there before its fake


def resize_patchify(
    frames: Tensor,
    height: int,
    width: int,
    patch_size: int,
    merge_size: int,
    *,
    order: Literal["horizontal", "vertical"] = "horizontal",
    filter: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic",
    temporal_patch_size: int = 1,
) -> Tensor:
    """[F, H, W, 3] uint8 -> [F/T * height/P * width/P, 3 * T * P * P] uint8: Pillow's 8-bit resize, cut into patches.

    frames: with any frame and row stride, 3 or 4 bytes from pixel to pixel: a crop is a view.
    order:  the pass that goes first; each rounds to bytes. A pass that changes no size changes nothing.
    temporal_patch_size: the T frames of a patch, which divides F; 1 for still images.

    Rows are in merge-block order, (frame, block row, block column, row in block, column in block), columns (channel,
    frame in patch, y, x). As `_core.resize_patchify`, which knows no torch. On CUDA patches of up to 32 pixels, one
    launch, nothing read back. Raises `RuntimeError` that says what came.
    """
    out: Tensor = torch.ops.rtp_mm.resize_patchify.default(
        frames, height, width, patch_size, merge_size, order, filter, temporal_patch_size
    )
    return out


@torch.library.register_fake("rtp_mm::resize_patchify")  # type: ignore[untyped-decorator]
def _(
    frames: Tensor,
    height: int,
    width: int,
    patch_size: int,
    merge_size: int,
    order: str,
    filter: str,
    temporal_patch_size: int,
) -> Tensor:
    rows = frames.shape[0] // temporal_patch_size * (height // patch_size) * (width // patch_size)
    return frames.new_empty(rows, 3 * temporal_patch_size * patch_size**2)
