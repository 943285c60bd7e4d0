"""A clip, whatever holds it: how many frames it has, how fast they come, and chosen ones of them, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.limits import check_pixels

if TYPE_CHECKING:
    from rtp_mm.config import Settings

Frame = NDArray[np.uint8]  # [H, W, 3] RGB
MIRRORED = 4  # of `ClipHeader.turn`; a multiple of a whole turn


@dataclass(frozen=True, slots=True)
class ClipLimits:
    """What a clip may cost before it is decoded."""

    max_pixels: int  # of a frame
    max_seconds: float
    max_animation_pixels: int  # of all frames of an animation

    @classmethod
    def of(cls, settings: Settings) -> ClipLimits:
        return cls(settings.mm_max_pixels, settings.mm_max_video_seconds, settings.mm_max_animation_pixels)

    def check_seconds(self, seconds: float) -> None:
        """Raises `WrongFormatError` for a longer clip."""
        if seconds > self.max_seconds:
            raise WrongFormatError(
                f"a video of {seconds:.1f} s, over the limit of {self.max_seconds} s (MM_MAX_VIDEO_SECONDS)"
            )

    def check_animation(self, frames: int, width: int, height: int) -> None:
        """Raises `WrongFormatError` for an animation of more pixels."""
        check_pixels(width, height, self.max_pixels)
        if (pixels := frames * width * height) > self.max_animation_pixels:
            raise WrongFormatError(
                f"{frames} frames of {width}x{height} are {pixels} pixels, over the limit of "
                f"{self.max_animation_pixels} (MM_MAX_ANIMATION_PIXELS)"
            )


class Clip(Protocol):
    """`frames` at `fps` a second, of `width` x `height` pixels as they are shown. `decoded` counts the frames that
    were decoded for those that were asked for.
    """

    frames: int
    fps: Fraction
    width: int
    height: int
    decoded: int

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        """The frames at these ascending indices, in order of presentation. Raises `WrongFormatError`."""


class ClipHeader(NamedTuple):
    """What a clip is, known before it is decoded.

    codec:        FFmpeg's name of the codec, not of a decoder.
    pixel_format: FFmpeg's.
    matrix:       from YCbCr to RGB, as ITU-T H.273 counts them; 2: it does not say.
    width, height: pixels, before it is turned.
    turn:         quarter turns, counter-clockwise, before it is shown; plus `MIRRORED` where it is flipped upside down
                  before that.
    is_indexed:   every packet is shown, and tells when.
    """

    codec: str
    pixel_format: str
    matrix: int
    width: int
    height: int
    turn: int
    is_indexed: bool


OpenClip = AbstractContextManager[Clip]
