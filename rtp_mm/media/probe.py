"""What an image is, told from the first bytes of its file, without decoding it and without Pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rtp_mm import _core

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ImageHeader(NamedTuple):
    """What an image says of itself; width and height in pixels are those that Pillow opens it with, never 0.

    format: Pillow's name: JPEG (MPO too), PNG, WEBP, GIF, BMP, TIFF, AVIF, HEIF, JPEG2000, ICO, PPM, QOI or TGA.
    frames: of an animation; 1 for a still image; `None` where the bytes at hand do not tell.
    """

    format: str
    width: int
    height: int
    frames: int | None


class NeedsMore(NamedTuple):
    """The header does not end within the bytes at hand."""

    nbytes: int  # from the file's beginning, that it takes at least


def probe(data: Buffer) -> ImageHeader | None:
    """The header of a whole file; `None` for what is no image, or ends before it says what it is.

    A microsecond or two; no more than 65536 segments, blocks or entries of a file are looked at, which takes up to 6 ms
    for an animated GIF. What has a header may still be broken, and TGA, which has no signature, may be anything.
    """
    header = probe_start(data)
    return None if isinstance(header, NeedsMore) else header


def probe_start(data: Buffer) -> ImageHeader | NeedsMore | None:
    """The header of a file of which only the beginning is here. More bytes never change it, but for `frames`, from
    `None` to a number.
    """
    found = _core.probe(data)
    match found:
        case None:
            return None
        case int():
            return NeedsMore(found)
        case _:
            return ImageHeader(*found)
