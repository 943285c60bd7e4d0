"""Animated images (GIF, WebP, APNG, AVIF) as clips, with Pillow. A frame is what a viewer shows: laid over those before
it, transparent parts over white.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from io import BytesIO

from PIL import Image, ImageFile

from rtp_mm.media.clip import Clip, ClipLimits, Frame
from rtp_mm.media.image import named_errors, rgb_pixels
from rtp_mm.media.limits import check_pixels

FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_SHORTEST_MS = 20  # browsers show a frame of less for 100 ms
_DEFAULT_MS = 100


@contextmanager
def open_animation(data: bytes, limits: ClipLimits) -> Iterator[Clip]:
    """Raises `WrongFormatError` for what is broken, over a limit or no image that can be animated."""
    with named_errors(data, FORMATS), Image.open(BytesIO(data), formats=FORMATS) as image:
        check_pixels(*image.size, limits.max_pixels)
        yield _Animation(image, limits)


class _Animation:
    """Frames build on each other, so all up to the last chosen one are decoded, twice: their times are known then. An
    APNG may have a picture before the first, for viewers that show no animations: it is none of them.
    """

    def __init__(self, image: ImageFile.ImageFile, limits: ClipLimits) -> None:
        self._image = image
        self.width, self.height = image.size
        self.decoded = 0
        self._first = int(getattr(image, "default_image", False))
        self.frames = getattr(image, "n_frames", 1) - self._first
        milliseconds = 0.0
        for index in range(self.frames):
            image.seek(self._first + index)
            image.load()  # WebP tells a frame's duration no sooner
            shown = float(image.info.get("duration") or 0)
            milliseconds += shown if shown >= _SHORTEST_MS else _DEFAULT_MS
            limits.check_seconds(milliseconds / 1e3)
        self.fps = Fraction(self.frames * 1000) / Fraction(milliseconds).limit_denominator(1000)

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        wanted = set(indices)
        for index in range(indices[-1] + 1):
            self._image.seek(self._first + index)
            self.decoded += 1
            if index in wanted:
                yield rgb_pixels(self._image).copy()
