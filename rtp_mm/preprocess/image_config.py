"""What a checkpoint says of its images: `preprocessor_config.json`, or `image_processor` in `processor_config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtp_mm.errors import StartError
from rtp_mm.preprocess.processor_files import ProcessorFiles, find_rules, positive

IMAGE_FILES: ProcessorFiles = (("processor_config.json", "image_processor"), ("preprocessor_config.json", None))
BICUBIC = 3  # PIL.Image.Resampling.BICUBIC, the one filter of these families


@dataclass(frozen=True, slots=True)
class ImageProcessorConfig:
    """The rules of one checkpoint. Pixel limits are areas after resizing; mean and std are of values in 0..1."""

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    image_mean: tuple[float, float, float]
    image_std: tuple[float, float, float]

    @classmethod
    def from_checkpoint(cls, folder: Path, defaults: ImageProcessorConfig) -> ImageProcessorConfig:
        """Reads the checkpoint's file; `defaults`, the family's published values, stand in for what it leaves out.

        Raises `StartError` that names the file and the key for what is malformed or asks for what we do not do.
        """
        found = find_rules(folder, IMAGE_FILES)
        return defaults if found is None else cls.from_json(found[0], defaults, found[1])

    @classmethod
    def from_json(cls, rules: Mapping[str, Any], defaults: ImageProcessorConfig, source: str) -> ImageProcessorConfig:
        """The same from a parsed file; `source` names it in errors."""
        _check_supported(rules, source)
        min_pixels = _pixels(rules, ("min_pixels", "shortest_edge"), defaults.min_pixels, source)
        max_pixels = _pixels(rules, ("max_pixels", "longest_edge"), defaults.max_pixels, source)
        if min_pixels > max_pixels:
            raise StartError(f"{source}: min_pixels {min_pixels} is over max_pixels {max_pixels}")
        return cls(
            patch_size=positive(rules, "patch_size", defaults.patch_size, source),
            merge_size=positive(rules, "merge_size", defaults.merge_size, source),
            temporal_patch_size=positive(rules, "temporal_patch_size", defaults.temporal_patch_size, source),
            min_pixels=min_pixels,
            max_pixels=max_pixels,
            image_mean=_channels(rules, "image_mean", defaults.image_mean, source),
            image_std=_channels(rules, "image_std", defaults.image_std, source),
        )

    def check(self, patch_size: int, merge_size: int, temporal_patch_size: int) -> None:
        """Raises `StartError` unless these sizes, the tower's, are the preprocessor's too."""
        tower = (patch_size, merge_size, temporal_patch_size)
        ours = (self.patch_size, self.merge_size, self.temporal_patch_size)
        if ours != tower:
            raise StartError(
                f"the checkpoint disagrees with itself on (patch, merge, temporal patch) sizes: {tower} in its "
                f"config.json, {ours} for its image processor"
            )


def _check_supported(rules: Mapping[str, Any], source: str) -> None:
    for step in ("do_resize", "do_rescale", "do_normalize"):
        if rules.get(step) not in (None, True):
            raise StartError(f"{source}: {step}={rules[step]!r} is not supported")
    if rules.get("resample") not in (None, BICUBIC):
        raise StartError(f"{source}: resample={rules['resample']!r} is not supported, only {BICUBIC} (bicubic)")
    factor = rules.get("rescale_factor")
    if factor is not None and not (isinstance(factor, float) and math.isclose(factor, 1 / 255)):
        raise StartError(f"{source}: rescale_factor={factor!r} is not supported, only 1/255")


def _pixels(rules: Mapping[str, Any], names: tuple[str, str], default: int, source: str) -> int:
    """A limit on the area: the old layout has it on top, the new one in `size`, under either name."""
    size = rules.get("size")
    if rules.get(names[0]) is not None or size is None:
        return positive(rules, names[0], default, source)
    for name in names:
        if isinstance(size, Mapping) and size.get(name) is not None:
            return positive(size, name, default, source)
    raise StartError(f"{source}: size={size!r} is not supported, only {{shortest_edge, longest_edge}} in pixels")


def _channels(
    rules: Mapping[str, Any], name: str, default: tuple[float, float, float], source: str
) -> tuple[float, float, float]:
    value = rules.get(name)
    if value is None:
        return default
    if not (isinstance(value, list) and len(value) == 3 and all(type(v) in (int, float) for v in value)):
        raise StartError(f"{source}: {name}={value!r} must be three numbers")
    red, green, blue = map(float, value)
    if name == "image_std" and min(red, green, blue) <= 0:
        raise StartError(f"{source}: {name}={value!r} must be positive")
    return red, green, blue
