"""How large a fetched file may be, in bytes and in pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from rtp_mm.config import Settings
from rtp_mm.errors import WrongFormatError
from rtp_mm.types import MMUrlType


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """The largest file admitted, in bytes, and the option that says so. `meter`, where there is one, is told of every
    size that is checked, announced or reached, and raises where the server has no room for it.
    """

    nbytes: int
    option: str
    meter: Callable[[int], None] | None = field(default=None, compare=False)

    def metered(self, meter: Callable[[int], None] | None) -> SizeLimit:
        return replace(self, meter=meter)

    @classmethod
    def of(cls, settings: Settings, mm_type: MMUrlType) -> SizeLimit:
        """The video limit for video and audio, the image limit for all else."""
        if mm_type in (MMUrlType.VIDEO, MMUrlType.AUDIO):
            return cls(settings.mm_video_max_file_size_kb * 1024, "MM_VIDEO_MAX_FILE_SIZE_KB")
        return cls(settings.mm_image_max_file_size_kb * 1024, "MM_IMAGE_MAX_FILE_SIZE_KB")

    def check(self, nbytes: int) -> None:
        """Raises `WrongFormatError` if a file of at least `nbytes` is too large."""
        if nbytes > self.nbytes:
            raise WrongFormatError(f"{nbytes} bytes or more, over the limit of {self.nbytes} ({self.option})")
        if self.meter is not None:
            self.meter(nbytes)


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises `WrongFormatError` for an image of more pixels."""
    if width * height > max_pixels:
        raise WrongFormatError(
            f"{width}x{height} is {width * height} pixels, over the limit of {max_pixels} (MM_MAX_PIXELS)"
        )
