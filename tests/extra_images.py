"""Files of the formats that MM_EXTRA_IMAGE_FORMATS can add: by Pillow where it writes them, else by hand."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

Maker = Callable[[Image.Image], bytes]


def saved(format: str, mode: str = "RGB", **options: Any) -> Maker:
    def make(image: Image.Image) -> bytes:
        file = io.BytesIO()
        image.convert(mode).save(file, format, **options)
        return file.getvalue()

    return make


def fli(image: Image.Image) -> bytes:
    """One frame: a palette, and pixels as they are."""
    image = image.convert("P", palette=Image.Palette.ADAPTIVE)
    palette = bytes(image.getpalette("RGB") or b"").ljust(768, b"\0")
    chunks = [(4, struct.pack("<HBB", 1, 0, 0) + palette), (16, image.tobytes())]
    body = b"".join(struct.pack("<IH", 6 + len(data), kind) + data for kind, data in chunks)
    frame = struct.pack("<IHH8x", 16 + len(body), 0xF1FA, len(chunks)) + body
    header = struct.pack("<IHHHHHHI", 128 + len(frame), 0xAF12, 1, *image.size, 8, 3, 50)
    return header.ljust(128, b"\0") + frame


def ftex(image: Image.Image) -> bytes:
    data = image.tobytes()
    return b"FTEX" + struct.pack("<iiiiiiii", 0, *image.size, 1, 1, 1, 32, len(data)) + data


def gbr(image: Image.Image) -> bytes:
    return struct.pack(">IIIII4sI", 28, 2, *image.size, 4, b"GIMP", 10) + image.convert("RGBA").tobytes()


def pixar(image: Image.Image) -> bytes:
    header = bytearray(b"\x80\xe8\0\0".ljust(1024, b"\0"))
    struct.pack_into("<HH4xHH", header, 416, image.height, image.width, 14, 2)
    return bytes(header) + image.tobytes()


def psd(image: Image.Image) -> bytes:
    """As it is shown; no layers."""
    header = struct.pack(">4sH6xHIIHH", b"8BPS", 1, 3, image.height, image.width, 8, 3)
    return header + bytes(12) + b"\0\0" + b"".join(band.tobytes() for band in image.split())


def sun(image: Image.Image) -> bytes:
    """Of an even width."""
    data = image.tobytes("raw", "BGR")
    return struct.pack(">IIIIIIII", 0x59A66A95, *image.size, 24, len(data), 1, 0, 0) + data


def xpm(image: Image.Image) -> bytes:
    image = image.quantize(16)
    colours = np.reshape(image.getpalette("RGB")[:48], (-1, 3))  # type: ignore[index]
    lines = [f"{image.width} {image.height} {len(colours)} 1"]
    lines += [f"{65 + i:c} c #{r:02x}{g:02x}{b:02x}" for i, (r, g, b) in enumerate(colours)]
    lines += ["".join(f"{65 + index:c}" for index in row) for row in np.asarray(image)]
    return b"/* XPM */\nstatic char *x[] = {\n" + ",\n".join(f'"{line}"' for line in lines).encode() + b"\n};\n"


def xvthumb(image: Image.Image) -> bytes:
    """Three bits of red and green, two of blue."""
    red, green, blue = (np.asarray(band) for band in image.split())
    return b"P7 332\n#END\n%d %d 255\n" % image.size + (red // 32 * 32 + green // 32 * 4 + blue // 64).tobytes()


MAKERS: dict[str, Maker] = {
    "DDS": saved("DDS"),
    "DDS RGBA": saved("DDS", "RGBA"),
    "DDS L": saved("DDS", "L"),
    "DDS DXT1": saved("DDS", "RGBA", pixel_format="DXT1"),
    "DDS BC5": saved("DDS", pixel_format="BC5"),
    "DIB": saved("DIB"),
    "FLI": fli,
    "FTEX": ftex,
    "GBR": gbr,
    "MSP": saved("MSP", "1"),
    "PCX": saved("PCX"),
    "PCX P": saved("PCX", "P"),
    "PCX 1": saved("PCX", "1"),
    "PIXAR": pixar,
    "PSD": psd,
    "SGI": saved("SGI"),
    "SGI RGBA": saved("SGI", "RGBA"),
    "SGI 16": saved("SGI", bpc=2),
    "SUN": sun,
    "XBM": saved("XBM", "1"),
    "XPM": xpm,
    "XVTHUMB": xvthumb,
}
# Where the header has width and height, as `struct` reads them.
_SIZES = {
    "DDS": ("<I", 16, 12),
    "DIB": ("<I", 4, 8),
    "FLI": ("<H", 8, 10),
    "FTEX": ("<I", 8, 12),
    "GBR": (">I", 8, 12),
    "MSP": ("<H", 4, 6),
    "PCX": ("<H", 8, 10),
    "PIXAR": ("<H", 418, 416),
    "PSD": (">I", 18, 14),
    "SGI": (">H", 6, 8),
    "SUN": (">I", 4, 8),
}


def telling(data: bytes, format: str, width: int, height: int) -> bytes:
    """The same file of 24x18 with another size in its header."""
    if format not in _SIZES:
        return data.replace(b"24", b"%d" % width, 1).replace(b"18", b"%d" % height, 1)
    file = bytearray(data)
    kind, *places = _SIZES[format]
    if format == "PCX":  # the last column and row
        width, height = width - 1, height - 1
    if format == "MSP":  # again, for its checksum
        places += [16, 18]
    for place, value in zip(places, (width, height) * 2, strict=False):
        struct.pack_into(kind, file, place, value)
    return bytes(file)
