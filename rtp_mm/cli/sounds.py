"""Which models take sounds, and what that rules out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rtp_mm.errors import StartError
from rtp_mm.models.gpt_init_model_parameters import read_json
from rtp_mm.models.qwen2_audio import FAMILY
from rtp_mm.types import MMUrlType, PreprocessOptions


def family_of(checkpoint: Path) -> str | None:
    """As `config.json` has it. Raises `StartError` where the folder holds no model."""
    family: str | None = read_json(checkpoint / "config.json").get("model_type")
    return family


def takes_sounds(checkpoint: Path) -> bool:
    """Raises `StartError` where the folder holds no model."""
    return family_of(checkpoint) == FAMILY


def check_pixel_limits(
    options: PreprocessOptions, family: Callable[[], str | None], mm_type: MMUrlType = MMUrlType.DEFAULT
) -> None:
    """Raises `StartError` for limits of pixels where a sound is asked for, or the model takes sounds. Its family is
    asked for only then.
    """
    if not (options.min_pixels or options.max_pixels):
        return
    if mm_type is MMUrlType.AUDIO or family() == FAMILY:
        raise StartError("--min-pixels and --max-pixels apply to images and to frames of videos, not to sounds")
