"""The one door to the native operators."""

from __future__ import annotations

from rtp_mm.ops.packed_attention import packed_attention
from rtp_mm.ops.packed_linear import pack_linear, packed_linear, packed_linear_add_
from rtp_mm.ops.patch_embed import patch_embed
from rtp_mm.ops.positions import VisionPositions, vision_positions
from rtp_mm.ops.resize_patchify import resize_patchify
from rtp_mm.ops.rms_norm import rms_norm

__all__ = [
    "VisionPositions",
    "pack_linear",
    "packed_attention",
    "packed_linear",
    "packed_linear_add_",
    "patch_embed",
    "resize_patchify",
    "rms_norm",
    "vision_positions",
]
