"""The one door to the native operators."""

from __future__ import annotations

from rtp_mm.ops.fixed_linear import fixed_linear, fixed_linear_add_, pack_fixed_linear, quantize_rows
from rtp_mm.ops.packed_attention import packed_attention
from rtp_mm.ops.packed_linear import (
    BF16_MULTIPLE,
    PackedWeight,
    linear_row_stride,
    pack_bf16_linear,
    pack_int8_linear,
    pack_linear,
    packed_linear,
    packed_linear_add_,
    packed_linear_blocks,
)
from rtp_mm.ops.patch_embed import packed_patch_embed, patch_embed
from rtp_mm.ops.pointwise import ACTIVATIONS, activate, add_norm, rotate_qk_, uses_triton
from rtp_mm.ops.positions import VisionPositions, vision_positions
from rtp_mm.ops.resize_patchify import resize_patchify

__all__ = [
    "ACTIVATIONS",
    "BF16_MULTIPLE",
    "PackedWeight",
    "VisionPositions",
    "activate",
    "add_norm",
    "fixed_linear",
    "fixed_linear_add_",
    "linear_row_stride",
    "pack_bf16_linear",
    "pack_fixed_linear",
    "pack_int8_linear",
    "pack_linear",
    "packed_attention",
    "packed_linear",
    "packed_linear_add_",
    "packed_linear_blocks",
    "packed_patch_embed",
    "patch_embed",
    "quantize_rows",
    "resize_patchify",
    "rotate_qk_",
    "uses_triton",
    "vision_positions",
]
