"""What a request asks of pixels, for models that take whole images: a part of them, a size."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rtp_mm.media.limits import check_pixels
from rtp_mm.preprocess.sizes import crop_pixels, smart_resize
from rtp_mm.types import PreprocessOptions


def sizes_asked(options: PreprocessOptions) -> list[str]:
    """Names of those options that ask for a size."""
    return [name for name in ("width", "height", "min_pixels", "max_pixels") if getattr(options, name) is not None]


def cropped(pixels: NDArray[np.uint8], options: PreprocessOptions) -> NDArray[np.uint8]:
    """A view of [H, W, 3]."""
    if options.crop is None:
        return pixels
    height, width, _ = pixels.shape
    top, left, bottom, right = crop_pixels(height, width, options.crop)
    return pixels[top:bottom, left:right]


def sized(image: Image.Image, options: PreprocessOptions, most: int) -> Image.Image:
    """As our own families size an image, with single pixels for tokens, and no limits but those that are asked for.

    The image itself where no size is asked for. Raises `WrongFormatError`, also for one of more than `most` pixels.
    """
    if not sizes_asked(options):
        return image
    min_pixels, max_pixels = options.min_pixels or 0, options.max_pixels or math.inf
    size = options.height or image.height, options.width or image.width
    height, width = smart_resize(*size, 1, min_pixels, max_pixels)
    check_pixels(width, height, most)
    return image.resize((width, height), Image.Resampling.BICUBIC)
