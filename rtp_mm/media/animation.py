"""Animated images (GIF, WebP, APNG, AVIF) as clips. What they hold is read from their headers; Pillow decodes. A frame
is what a viewer shows: laid over those before it, transparent parts over white.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from fractions import Fraction
from io import BytesIO

import numpy as np
from PIL import Image, ImageFile

from rtp_mm import _core
from rtp_mm.errors import WrongFormatError
from rtp_mm.media.clip import ClipLimits, Frame, OpenClip
from rtp_mm.media.image import named_errors, rgb_pixels
from rtp_mm.media.limits import check_pixels
from rtp_mm.media.probe import probe
from rtp_mm.media.truncation import TRUNCATION

FORMATS = ("GIF", "WEBP", "PNG", "AVIF")
_SHORTEST_MS = 20  # browsers show a frame of less for 100 ms
_DEFAULT_MS = 100


def open_animation(data: bytes, limits: ClipLimits) -> OpenClip:
    """Nothing is decoded until the clip is read. Raises `WrongFormatError` for what is broken, over a limit or no
    image that can be animated.
    """
    return nullcontext(_Animation(data, limits))


class _Animation:
    """Frames build on each other: all up to the last chosen one are decoded, once, and none behind it."""

    def __init__(self, data: bytes, limits: ClipLimits) -> None:
        header = probe(data)
        if header is None or header.format not in FORMATS:
            raise WrongFormatError(f"expected a video, got a still image (animations: {', '.join(FORMATS)})")
        self.width, self.height = header.width, header.height
        check_pixels(self.width, self.height, limits.max_pixels)
        with named_errors(data, FORMATS):
            canvas_width, canvas_height, milliseconds = _core.animation(data)
        self.frames = len(milliseconds)
        limits.check_animation(self.frames, canvas_width, canvas_height)
        shown = float(np.where(milliseconds < _SHORTEST_MS, _DEFAULT_MS, milliseconds).sum())
        limits.check_seconds(shown / 1e3)
        self._data = data
        self.fps = Fraction(self.frames * 1000) / Fraction(shown).limit_denominator(1000)
        self.decoded = 0

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """An APNG may have a picture before the first, for viewers that show no animations: it is none of the frames.
        What of a GIF's frame leaves the screen is cut off, as browsers do; Pillow makes the screen larger.
        """
        wanted = set(indices)
        with self._open() as image:
            first = int(getattr(image, "default_image", False))
            self._check(image, self.frames if image.format == "GIF" else getattr(image, "n_frames", 1) - first)
            for index in range(indices[-1] + 1):
                with self._decoding():
                    image.seek(first + index)
                    self.decoded += 1
                    frame = rgb_pixels(image)[: self.height, : self.width].copy() if index in wanted else None
                if frame is not None:
                    yield frame

    def _open(self) -> ImageFile.ImageFile:
        with self._decoding():
            return Image.open(BytesIO(self._data), formats=FORMATS)

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """While Pillow is at work, and nobody else: what goes wrong is the file's fault."""
        with named_errors(self._data, FORMATS), TRUNCATION.decoding(allow_truncated=False):
            yield

    def _check(self, image: ImageFile.ImageFile, frames: int) -> None:
        """Pillow would count a GIF's frames by a pass over its blocks; one that is not there it does not find."""
        if (frames, *image.size) != (self.frames, self.width, self.height):
            told = f"{self.frames} frames of {self.width}x{self.height}"
            raise WrongFormatError(f"broken image: its headers tell {told}, a decoder finds {frames} of {image.size}")
