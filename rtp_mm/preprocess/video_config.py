"""What a checkpoint says of its videos, for MM_VIDEO_RULE=hf: as transformers reads it (5.23, `Qwen2VLVideoProcessor`).

`do_sample_frames` is of no account where it is false, as it is by default: there its caller samples, here the server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtp_mm.errors import StartError
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.processor_files import ProcessorFiles, find_rules, positive, positive_number
from rtp_mm.preprocess.video_rule import VideoRule

# The published checkpoints have none for videos: Hugging Face's video processor then takes the images' file.
VIDEO_FILES: ProcessorFiles = (
    ("processor_config.json", "video_processor"),
    ("video_preprocessor_config.json", None),
    ("preprocessor_config.json", None),
)
CLIP_TOKENS = 128000  # transformers' `max_video_tokens`


def checkpoints_rule(folder: Path, images: ImageProcessorConfig, rule: VideoRule) -> VideoRule:
    """`rule` with the checkpoint's figures in place of its own; `images` is what the checkpoint says of those.

    Raises `StartError` that names the file and the key for what is malformed or asks for what we do not do.
    """
    found = find_rules(folder, VIDEO_FILES)
    if found is None:
        return rule
    rules, source = found
    defaults = replace(images, min_pixels=rule.min_pixels, max_pixels=rule.max_pixels)
    own = ImageProcessorConfig.from_json(rules, defaults, source)
    own.check(images.patch_size, images.merge_size, images.temporal_patch_size)
    if (own.image_mean, own.image_std) != (images.image_mean, images.image_std):
        raise StartError(f"{source}: image_mean and image_std must be those of the checkpoint's images")
    if rules.get("do_sample_frames") is True and rules.get("fps") is None and rules.get("num_frames") is None:
        raise StartError(f"{source}: do_sample_frames without fps or num_frames, every frame, is not supported")
    return replace(
        rule,
        min_pixels=own.min_pixels,
        max_pixels=own.max_pixels,
        fps=positive_number(rules, "fps", rule.fps, source),
        min_frames=positive(rules, "min_frames", rule.min_frames, source),
        max_frames=positive(rules, "max_frames", rule.max_frames, source),
        num_frames=_num_frames(rules, rule, source),
        clip_tokens=_clip_tokens(rules, source),
    )


def _num_frames(rules: Mapping[str, Any], rule: VideoRule, source: str) -> int | None:
    """Rounded as there: to the nearest multiple of the temporal patch, halves to even ones."""
    if rules.get("num_frames") is None:
        return None
    if rules.get("fps") is not None:
        raise StartError(f"{source}: fps and num_frames exclude each other")
    asked, step = positive(rules, "num_frames", 0, source), rule.temporal_patch_size
    count = round(asked / step) * step
    if not 0 < count <= rule.server_max_frames:
        raise StartError(
            f"{source}: num_frames={asked} is {count} frames of every clip, not 1 to {rule.server_max_frames} "
            "(MM_MAX_FRAMES)"
        )
    return count


def _clip_tokens(rules: Mapping[str, Any], source: str) -> int | None:
    is_capped = rules.get("cap_pixels_per_frame")
    if not isinstance(is_capped, bool | None):
        raise StartError(f"{source}: cap_pixels_per_frame={is_capped!r} must be true or false")
    return positive(rules, "max_video_tokens", CLIP_TOKENS, source) if is_capped else None
