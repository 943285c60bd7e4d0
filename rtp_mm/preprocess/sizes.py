"""How large an image becomes: integers in, integers out."""

from __future__ import annotations

import math
from typing import NamedTuple

from rtp_mm.errors import WrongFormatError
from rtp_mm.types import CropBox

MAX_ASPECT_RATIO = 200


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: float, *, least: int = 0
) -> tuple[int, int]:
    """(height, width) as multiples of `factor`, near the aspect ratio, the area within the limits where factors allow.

    The rule of `Qwen2VLImageProcessorPil` (transformers 5.23), floating point and half-to-even rounding included: a
    side of less than half a factor rounds to 0 and so takes the way of an image that is too small. With `least` 1 that
    of qwen-vl-utils (0.0.14): there it is one factor long. What shrinks to no factor, and fails there, is one too.
    Raises `WrongFormatError` for a side below 1, an aspect ratio over 200 or limits that nothing is within.
    """
    if min_pixels > max_pixels:
        raise WrongFormatError(f"min_pixels {min_pixels} is over max_pixels {max_pixels:.0f}")
    if min(height, width) < 1:
        raise WrongFormatError(f"an image needs at least one pixel, got {width}x{height}")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise WrongFormatError(f"{width}x{height} has an aspect ratio over the limit of {MAX_ASPECT_RATIO}")
    rows, columns = max(least, round(height / factor)), max(least, round(width / factor))
    area = rows * columns * factor * factor
    if area > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        rows = max(1, math.floor(height / shrink / factor))
        columns = max(1, math.floor(width / shrink / factor))
    elif area < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor)
        columns = math.ceil(width * grow / factor)
    return rows * factor, columns * factor


class PixelBox(NamedTuple):
    """A part of an image: from `top` and `left` on, up to before `bottom` and `right`."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width)."""
        return self.bottom - self.top, self.right - self.left


def crop_pixels(height: int, width: int, crop: CropBox | None) -> PixelBox:
    """The smallest box of whole pixels around `crop`, never empty; of everything without one."""
    if crop is None:
        return PixelBox(0, 0, height, width)
    top, left = min(math.floor(crop.y1 * height), height - 1), min(math.floor(crop.x1 * width), width - 1)
    bottom, right = math.ceil(crop.y2 * height), math.ceil(crop.x2 * width)
    return PixelBox(top, left, max(bottom, top + 1), max(right, left + 1))
