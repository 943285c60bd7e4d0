"""Which models take sounds, and what that rules out."""

from __future__ import annotations

from pathlib import Path

from rtp_mm.errors import StartError
from rtp_mm.models.gpt_init_model_parameters import read_json
from rtp_mm.models.qwen2_audio import FAMILY
from rtp_mm.types import MMUrlType, PreprocessOptions


def takes_sounds(checkpoint: Path) -> bool:
    """Raises `StartError` where the folder holds no model."""
    return bool(read_json(checkpoint / "config.json").get("model_type") == FAMILY)


def check_pixel_limits(
    options: PreprocessOptions, checkpoint: Path | None, mm_type: MMUrlType = MMUrlType.DEFAULT
) -> None:
    """Raises `StartError` for limits of pixels where a sound is asked for, or the model takes sounds."""
    if not (options.min_pixels or options.max_pixels):
        return
    if mm_type is MMUrlType.AUDIO or (checkpoint is not None and takes_sounds(checkpoint)):
        raise StartError("--min-pixels and --max-pixels apply to images and to frames of videos, not to sounds")
