"""Positions of a whole batch of grids: rotary ids and angles, output ids, window order and attention segments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import rtp_mm.ops.library  # noqa: F401  # the schema must be there before its fake

MAX_PATCHES = 2**31 - 1  # positions are int32


@dataclass(frozen=True, slots=True)
class VisionPositions:
    """N patches and N / merge_size**2 cells (merged tokens) in a batch. Integers are int32 on the device of `angles`.

    rope_hw:        [N, 2] (h, w) in patches, in merge-block order: (t, h/m, w/m, row in block, column in block).
    pos_thw:        [cells, 3] (t, h, w) in cells, per item from 0, raster order.
    window_order:   [cells] cells of the batch in window order (gathers merge-block order). [0] without windows.
    window_inverse: [cells] each cell's place in window order (gathers window order). [0] without windows.
    cu_windows:     [windows + 1] patches before each window, and all. [0] without windows.
    cu_frames:      [frames + 1] patches before each frame, and all.
    cos, sin:       [N, head_dim / 2] float32, of the angles of a patch's row, then of its column; patches in window
                    order where there are windows.
    """

    rope_hw: Tensor
    pos_thw: Tensor
    window_order: Tensor
    window_inverse: Tensor
    cu_windows: Tensor
    cu_frames: Tensor
    cos: Tensor
    sin: Tensor


def vision_positions(
    grids: Sequence[tuple[int, int, int]], merge_size: int, window: int, angles: Tensor
) -> VisionPositions:
    """Positions for the images and clips `grids`, each (t, h, w) in patches, as Qwen2-VL and Qwen2.5-VL define them
    (transformers: `get_vision_position_ids`, `get_vision_window_index`, `get_vision_cu_seqlens`).

    merge_size: patches on a cell's side. window: cells on a window's side, windows at the right and lower edge being
    smaller; 0 for no windows. angles: [2, positions, head_dim / 4] float32, cos and sin of the angles of every row or
    column that a grid may have.

    One launch for the batch and nothing read back. Raises `ValueError` for a bad grid.
    """
    if merge_size < 1 or window < 0:
        raise ValueError(f"vision_positions: merge_size must be >= 1 and window >= 0, got {merge_size}, {window}")
    for t, h, w in grids:
        if min(t, h, w) < 1 or h % merge_size or w % merge_size:
            raise ValueError(
                f"vision_positions: a grid must be positive with h and w divisible by {merge_size}, got {(t, h, w)}"
            )
        if max(h, w) > angles.shape[1]:
            raise ValueError(f"vision_positions: grid {(t, h, w)} is over the {angles.shape[1]} positions with angles")
    patches = sum(t * h * w for t, h, w in grids)
    if patches > MAX_PATCHES:
        raise ValueError(f"vision_positions: a batch must have at most {MAX_PATCHES} patches, got {patches}")

    merged = [(t, h // merge_size, w // merge_size) for t, h, w in grids]
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor] = (
        torch.ops.rtp_mm.vision_positions.default(
            torch.tensor(grids, dtype=torch.int32, pin_memory=angles.is_cuda)
            .reshape(-1, 3)
            .to(angles.device, non_blocking=True),
            angles,
            sum(t * h * w for t, h, w in merged),
            sum(t * -(h // -window) * -(w // -window) for t, h, w in merged) if window else 0,
            sum(t for t, _, _ in merged),
            merge_size,
            window,
        )
    )
    return VisionPositions(*tensors)


@torch.library.register_fake("rtp_mm::vision_positions")  # type: ignore[untyped-decorator]
def _(
    grid_thw: Tensor, angles: Tensor, cells: int, windows: int, frames: int, merge_size: int, window: int
) -> tuple[Tensor, ...]:
    patches = cells * merge_size**2
    return (
        grid_thw.new_empty(patches, 2),
        grid_thw.new_empty(cells, 3),
        grid_thw.new_empty(cells if window else 0),
        grid_thw.new_empty(cells if window else 0),
        grid_thw.new_empty(windows + 1 if window else 0),
        grid_thw.new_empty(frames + 1),
        angles.new_empty(patches, 2 * angles.shape[2]),
        angles.new_empty(patches, 2 * angles.shape[2]),
    )
