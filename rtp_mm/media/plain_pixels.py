"""Which image files hold their pixels plainly: 8-bit RGB, YCbCr, grey or palette, whole, with nothing behind them to
mix with. Any sound decoder makes the same RGB of these as Pillow does; all others are Pillow's to judge.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator

_JPEG_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive; all by Huffman
_JPEG_HEADERS = range(0xC0, 0xD0)  # of frames, but for tables (0xC4, 0xCC) and a reserved one
_JPEG_END = b"\xff\xd9"
_TAIL_BYTES = 64  # at the end of a file, in which the end of its image must stand: else something may be cut off
_PNG_GREY, _PNG_RGB, _PNG_PALETTE = 0, 2, 3
_WEBP_ANIMATED, _WEBP_ALPHA = 0x02, 0x10
_WEBP_LOSSLESS_ALPHA = 1 << 28
_TIFF_GREY, _TIFF_RGB = 1, 2
_TIFF_MAX_TAGS = 256
_TIFF_BITS, _TIFF_COLOURS, _TIFF_ORIENTATION, _TIFF_SAMPLES, _TIFF_PLANES = 258, 262, 274, 277, 284
_TIFF_EXTRA, _TIFF_SAMPLE_FORMAT = 338, 339
_JP2_START = b"\0\0\0\x0cjP  \r\n\x87\n"
_J2K_START = b"\xff\x4f\xff\x51"
_ORIENTATIONS = (b"Exif\0\0", b"eXIf", b"EXIF", b"Raw profile type exif", b"XML:com.adobe.xmp", b"tiff:Orientation")
_JP2_COLOURS = {1: 17, 3: 16}  # enumerated grey and sRGB, by components


def is_plain(data: bytes, image_format: str) -> bool:
    """`image_format` as `probe` names it. Looks at headers and, of JPEG and PNG, at the last bytes; what is plain may
    still be broken.
    """
    judge = _JUDGES.get(image_format)
    try:
        return judge is not None and judge(data)
    except (struct.error, IndexError):  # the file ends within its header
        return False


def plain_formats() -> frozenset[str]:
    """Those that `is_plain` can say yes to."""
    return frozenset(_JUDGES)


def may_be_turned(data: bytes) -> bool:
    """Whether Pillow may find an orientation in a JPEG, PNG or WebP, by the names that it stands under, which are never
    compressed; a TIFF's own tag is not among them.
    """
    return any(name in data for name in _ORIENTATIONS)


def _is_plain_jpeg(data: bytes) -> bool:
    if _JPEG_END not in data[-_TAIL_BYTES:]:
        return False
    colours = frame = None
    for marker, body in _jpeg_segments(data):
        if marker == 0xEE and body[:5] == b"Adobe":
            colours = body[11]
        if marker in _JPEG_HEADERS and marker not in (0xC4, 0xC8, 0xCC):
            frame = marker, body
    if frame is None:
        return False
    marker, body = frame
    ids = body[6:15:3]
    is_colour = len(ids) == 3 == body[5] and colours in (None, 1) and ids != b"RGB"
    return marker in _JPEG_FRAMES and body[0] == 8 and (body[5] == 1 or is_colour)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Markers and what stands in their segments, up to the first scan."""
    place = 2
    while place < len(data):
        if data[place] != 0xFF:
            return
        marker = data[place + 1]
        if marker == 0xFF:  # fill
            place += 1
            continue
        if marker == 0xDA:
            return
        (length,) = struct.unpack_from(">H", data, place + 2)
        yield marker, data[place + 4 : place + 2 + length]
        place += 2 + length


def _is_plain_png(data: bytes) -> bool:
    if b"IEND" not in data[-_TAIL_BYTES:]:
        return False
    depth, colour = data[24], data[25]
    if depth > 8 or colour not in (_PNG_GREY, _PNG_RGB, _PNG_PALETTE):
        return False
    place = 8
    while True:
        (length,) = struct.unpack_from(">I", data, place)
        kind = data[place + 4 : place + 8]
        if kind in (b"tRNS", b"acTL"):  # transparency, animation
            return False
        if kind == b"IDAT":
            return True
        place += 12 + length


def _is_plain_webp(data: bytes) -> bool:
    match data[12:16]:
        case b"VP8 ":
            return True
        case b"VP8L":
            return not struct.unpack_from("<I", data, 21)[0] & _WEBP_LOSSLESS_ALPHA
        case b"VP8X":
            return not data[20] & (_WEBP_ANIMATED | _WEBP_ALPHA)
    return False


def _is_plain_tiff(data: bytes) -> bool:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(data[:4])
    if order is None:  # BigTIFF
        return False
    tags = _tiff_tags(data, order)
    samples = tags.get(_TIFF_SAMPLES, (1,))
    colours = tags.get(_TIFF_COLOURS)
    return (
        (samples, colours) in (((1,), (_TIFF_GREY,)), ((3,), (_TIFF_RGB,)))
        and set(tags.get(_TIFF_BITS, (1,))) == {8}
        and tags.get(_TIFF_PLANES, (1,)) == (1,)
        and tags.get(_TIFF_ORIENTATION, (1,)) == (1,)
        and set(tags.get(_TIFF_SAMPLE_FORMAT, (1,))) == {1}
        and _TIFF_EXTRA not in tags
    )


def _tiff_tags(data: bytes, order: str) -> dict[int, tuple[int, ...]]:
    """Values of the first directory's short tags of four values or fewer."""
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, start)
    tags: dict[int, tuple[int, ...]] = {}
    for entry in range(start + 2, start + 2 + 12 * min(count, _TIFF_MAX_TAGS), 12):
        tag, kind, values = struct.unpack_from(f"{order}HHI", data, entry)
        if kind == 3 and values <= 4:
            place = entry + 8 if values <= 2 else struct.unpack_from(f"{order}I", data, entry + 8)[0]
            tags[tag] = struct.unpack_from(f"{order}{values}H", data, place)
        else:
            tags[tag] = ()
    return tags


def _is_plain_jpeg2000(data: bytes) -> bool:
    if data.startswith(_J2K_START):
        return _plain_components(data) in _JP2_COLOURS
    if not data.startswith(_JP2_START):
        return False
    colour = None
    for kind, body in _boxes(data, 0, len(data)):
        if kind == b"jp2h":
            for inner, content in _boxes(body, 0, len(body)):
                if inner not in (b"ihdr", b"colr", b"res "):  # a palette, channels in an order of their own
                    return False
                if inner == b"colr" and colour is None:
                    colour = struct.unpack_from(">I", content, 3)[0] if content[0] == 1 else -1
        if kind == b"jp2c":
            return colour is not None and _JP2_COLOURS.get(_plain_components(body)) == colour
    return False


def _boxes(data: bytes, place: int, end: int) -> Iterator[tuple[bytes, bytes]]:
    while place < end:
        length, kind = struct.unpack_from(">I4s", data, place)
        if length == 0:  # up to the end
            length = end - place
        if length < 8:
            return
        yield kind, data[place + 8 : place + length]
        place += length


def _plain_components(codestream: bytes) -> int:
    """Of a codestream whose components all have 8 unsigned bits and one sample a pixel; else 0."""
    (components,) = struct.unpack_from(">H", codestream, 40)
    layout = codestream[42 : 42 + 3 * components]
    return components if layout == b"\x07\x01\x01" * components else 0


_JUDGES: dict[str, Callable[[bytes], bool]] = {
    "JPEG": _is_plain_jpeg,
    "PNG": _is_plain_png,
    "WEBP": _is_plain_webp,
    "TIFF": _is_plain_tiff,
    "JPEG2000": _is_plain_jpeg2000,
}
