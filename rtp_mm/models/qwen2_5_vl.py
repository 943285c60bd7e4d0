"""Qwen2.5-VL (3B, 7B, 32B, 72B): windowed attention but for a few blocks, RMSNorm, gated MLP.

Source: arXiv 2502.13923 and the published checkpoints' `config.json`.
"""

from __future__ import annotations

from typing import Any

from rtp_mm.models.qwen2_vl import Qwen2VL
from rtp_mm.models.registry import register_model
from rtp_mm.vit.tower import TowerConfig


class Qwen2_5VL(Qwen2VL):  # the family's name
    """Differs from Qwen2-VL in its tower alone."""

    @staticmethod
    def tower_config(vision: dict[str, Any]) -> TowerConfig:
        """`vision_config` to a tower; defaults are the published values, which Hugging Face's class has not all."""
        patch, merge = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
        return TowerConfig(
            depth=vision.get("depth", 32),
            hidden_size=vision.get("hidden_size", 1280),
            num_heads=vision.get("num_heads", 16),
            intermediate_size=vision.get("intermediate_size", 3420),
            out_hidden_size=vision.get("out_hidden_size", 3584),
            patch_size=patch,
            spatial_merge_size=merge,
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            in_channels=vision.get("in_channels", 3),
            norm="rms",
            activation=vision.get("hidden_act", "silu"),
            is_gated=True,
            window=vision.get("window_size", 112) // (patch * merge) if patch and merge else 0,
            full_attention_blocks=frozenset(vision.get("fullatt_block_indexes", (7, 15, 23, 31))),
        )


register_model("qwen2_5_vl", Qwen2_5VL, ["Qwen2_5_VLForConditionalGeneration"])
