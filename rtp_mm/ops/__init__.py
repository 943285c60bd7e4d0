"""The one door to the native operators."""

from __future__ import annotations

from rtp_mm.ops.patch_embed import patch_embed
from rtp_mm.ops.positions import VisionPositions, vision_positions

__all__ = ["VisionPositions", "patch_embed", "vision_positions"]
