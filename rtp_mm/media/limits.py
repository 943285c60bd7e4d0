"""How large a fetched file may be, in bytes and in pixels."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.probe import ImageHeader, NeedsMore, probe_start
from rtp_mm.media.sniff import sniff
from rtp_mm.types import MMUrlType

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from rtp_mm.config import Settings  # preprocess workers read this file, and have no use for pydantic

START_BYTES = 512  # tell what a file is
FIRST_LOOK_BYTES = 65536  # holds the header of nearly every image; shorter files are here before a look pays

_CLIPS = (MMUrlType.VIDEO, MMUrlType.AUDIO)


@dataclass(frozen=True, slots=True)
class SizeLimit:
    """The largest file admitted, in bytes, and the option that says so. `meter`, where there is one, is told of every
    size that is checked, announced or reached, and raises where the server has no room for it.

    clip: the limit that counts instead where the file's own bytes tell that it is a video or sound; until then, `told`,
          the larger one counts. For an item that does not say what it is.
    """

    nbytes: int
    option: str
    meter: Callable[[int], None] | None = field(default=None, compare=False)
    clip: SizeLimit | None = None

    def metered(self, meter: Callable[[int], None] | None) -> SizeLimit:
        return SizeLimit(self.nbytes, self.option, meter, self.clip)

    @classmethod
    def of(cls, settings: Settings, mm_type: MMUrlType) -> SizeLimit:
        """The video limit for video and audio, either for what is told from its bytes, the image limit for all else."""
        clip = cls(settings.mm_video_max_file_size_kb * 1024, "MM_VIDEO_MAX_FILE_SIZE_KB")
        if mm_type in _CLIPS:
            return clip
        image = cls(settings.mm_image_max_file_size_kb * 1024, "MM_IMAGE_MAX_FILE_SIZE_KB")
        return replace(image, clip=clip) if mm_type is MMUrlType.DEFAULT else image

    def told(self, start: bytes) -> SizeLimit:
        """The limit of a file that begins with these bytes, `START_BYTES` or the whole file."""
        if self.clip is None:
            return self
        limit = self.clip if sniff(start) in _CLIPS else replace(self, clip=None)
        return limit.metered(self.meter)

    @property
    def most(self) -> int:
        """Bytes of the largest file that `check` takes."""
        return self._counting.nbytes

    @property
    def _counting(self) -> SizeLimit:
        return self.clip if self.clip is not None and self.clip.nbytes > self.nbytes else self

    def check(self, nbytes: int) -> None:
        """Raises `WrongFormatError` if a file of at least `nbytes` is too large."""
        limit = self._counting
        if nbytes > limit.nbytes:
            raise WrongFormatError(f"{nbytes} bytes or more, over the limit of {limit.nbytes} ({limit.option})")
        if self.meter is not None:
            self.meter(nbytes)


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises `WrongFormatError` for an image of more pixels."""
    if width * height > max_pixels:
        raise WrongFormatError(
            f"{width}x{height} is {width * height} pixels, over the limit of {max_pixels} (MM_MAX_PIXELS)"
        )


class PixelLimit:
    """Looks at a file while it arrives, and ends that as soon as its header tells more pixels than MM_MAX_PIXELS."""

    def __init__(self, max_pixels: int) -> None:
        self._max_pixels = max_pixels
        self.next_look: float = FIRST_LOOK_BYTES

    @classmethod
    def of(cls, settings: Settings, mm_type: MMUrlType) -> PixelLimit | None:
        """None for video and audio."""
        return None if mm_type in _CLIPS else cls(settings.mm_max_pixels)

    def check(self, data: Buffer, nbytes: int) -> None:
        """The file's first `nbytes`, once there are `next_look`. Raises `WrongFormatError`.

        A header that is not whole yet is looked for again in twice the bytes or more, so that all looks together cost
        no more than two at the whole. TGA has no signature, so what looks like one may be a video.
        """
        match probe_start(data):
            case NeedsMore(needed):
                self.next_look = max(needed, 2 * nbytes)
            case ImageHeader(format, width, height, _) if format != "TGA":
                self.next_look = math.inf
                check_pixels(width, height, self._max_pixels)
            case _:
                self.next_look = math.inf
