"""Where a file is decoded: on the CPU, or by decoders of the tower's device. A pure function of the file's header, of
MM_DECODE_BACKEND and of what the device's decoders take, which stays the same for a server's life: never of load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from rtp_mm.media.clip import ClipHeader
from rtp_mm.media.plain_pixels import is_plain, may_be_turned
from rtp_mm.media.probe import ImageHeader

Setting = Literal["auto", "cpu", "gpu"]

# DALI 2.4 makes RGB of video by ITU-R BT.601 whatever the clip says, reads 8-bit 4:2:0 alone, and turns no frame.
_PIXEL_FORMATS = ("yuv420p", "yuvj420p")
_MATRICES = (2, 5, 6)  # of ITU-T H.273: unspecified, which FFmpeg takes for BT.601; BT.601 with 625 lines, and with 525


class FrameLimits(NamedTuple):
    """What a video decoder takes, in pixels; a macroblock has 256 of them."""

    min_width: int
    min_height: int
    max_width: int
    max_height: int
    max_macroblocks: int


@dataclass(frozen=True, slots=True)
class DeviceDecoders:
    """What the decoders of a device take. Hashable: a part of every cache key.

    library: that makes the pixels, with its version.
    formats: of still images, by Pillow's names.
    codecs:  of clips, by FFmpeg's names, with their limits.
    """

    library: str
    formats: frozenset[str]
    codecs: tuple[tuple[str, FrameLimits], ...]


class Choice(NamedTuple):
    """`reason`: why the CPU decodes what MM_DECODE_BACKEND would have on the device; one word, for a counter."""

    is_on_device: bool
    reason: str | None = None


ON_DEVICE = Choice(True)
ON_CPU = Choice(False)  # as MM_DECODE_BACKEND says


class DecoderRefusedError(Exception):
    """The device's decoder does not take a file that its header promised: the CPU judges it."""


class DevicePixels(Protocol):
    """uint8 pixels where they were decoded, for `torch.from_dlpack`."""

    def __dlpack__(self, *, stream: Any = ...) -> Any: ...

    def __dlpack_device__(self) -> Any: ...


class DeviceDecoder(Protocol):
    """Decodes one file at a time; for one thread."""

    def image(self, data: bytes) -> DevicePixels:
        """[H, W, 3] RGB. Raises `DecoderRefusedError`, `ProcessError` where the device has no memory or is broken."""

    def frames(self, data: bytes, indices: Sequence[int]) -> DevicePixels:
        """[F, H, W, 3] RGB: the frames at these ascending indices, as often as they are named. Raises the same."""


def choose_for_image(
    header: ImageHeader | None, data: bytes, setting: Setting, decoders: DeviceDecoders | None, *, exif_transpose: bool
) -> Choice:
    """For the still image in `data`, whose header was probed."""
    if setting != "gpu" or decoders is None:
        return ON_CPU
    if header is None or header.format not in decoders.formats:
        return Choice(False, "format")
    if exif_transpose and may_be_turned(data):
        return Choice(False, "exif")
    return ON_DEVICE if is_plain(data, header.format) else Choice(False, "pixels")


def choose_for_clip(header: ClipHeader | None, setting: Setting, decoders: DeviceDecoders | None) -> Choice:
    """For a clip; no header where the container is none that a device's decoder opens."""
    if setting == "cpu" or decoders is None:
        return ON_CPU
    if header is None:
        return Choice(False, "format")
    limits = dict(decoders.codecs).get(header.codec)
    if limits is None:
        return Choice(False, "codec")
    if header.matrix not in _MATRICES:
        return Choice(False, "matrix")
    if header.pixel_format not in _PIXEL_FORMATS or header.width % 2 or header.height % 2:
        return Choice(False, "pixels")
    if header.turn or not header.is_indexed:
        return Choice(False, "container")
    is_small = header.width < limits.min_width or header.height < limits.min_height
    is_large = header.width > limits.max_width or header.height > limits.max_height
    if is_small or is_large or header.width * header.height > 256 * limits.max_macroblocks:
        return Choice(False, "size")
    return ON_DEVICE
