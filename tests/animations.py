"""Animations as their specifications allow them, put together block by block: seeded, so that a failure comes again.

Pillow's own encoders write few of these variants.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rtp_mm.media.animation import FORMATS
from rtp_mm.media.image import rgb_pixels

Random = np.random.Generator
Pixels = NDArray[np.uint8]
Size = tuple[int, int]  # width, height


def region(rng: Random, screen: Size, step: int = 1) -> tuple[int, int, int, int]:
    """x, y, width, height of a part of the screen; x and y are multiples of `step`."""
    x, y = (step * int(rng.integers(0, (side - 1) // step + 1)) for side in screen)
    return x, y, int(rng.integers(1, screen[0] - x + 1)), int(rng.integers(1, screen[1] - y + 1))


def maybe(rng: Random, *choices: bytes) -> bytes:
    """One of these, or nothing."""
    return choices[rng.integers(len(choices))] if rng.random() < 0.5 else b""


# --- GIF


def random_gif(rng: Random) -> bytes:
    """Every disposal, with and without transparency, delays, palettes, comments, loops and a trailer."""
    screen = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    flags = 0x80 | 6 if rng.random() < 0.8 else 0
    parts = [b"GIF89a", struct.pack("<HHBBB", *screen, flags, int(rng.integers(128)), 0)]
    parts.append(rng.bytes(3 * 128) if flags else b"")
    parts.append(maybe(rng, b"!\xff\x0bNETSCAPE2.0\x03\1\0\0\0", b"!\xff\x0bANIMEXTS1.0\x03\1\7\0\0"))
    for _ in range(rng.integers(1, 9)):
        parts.append(maybe(rng, b"!\xfe" + blocks(rng, b"a comment"), b"!\x01" + blocks(rng, bytes(12) + b"text")))
        for _ in range(rng.choice([0, 1, 1, 1, 2])):  # the last one counts
            disposal, transparent = int(rng.integers(4)), int(rng.integers(2))
            delay = int(rng.choice([0, 1, 2, 5, 100, 65535]))
            parts.append(b"!\xf9\x04" + struct.pack("<BHBB", disposal << 2 | transparent, delay, rng.integers(128), 0))
        parts.append(gif_frame(rng, region(rng, screen)))
    return b"".join([*parts, maybe(rng, b";", b";", b";and more")])


def gif_frame(rng: Random, place: tuple[int, int, int, int]) -> bytes:
    """Codes of 8 bits throughout: the table is cleared before it needs more."""
    interlaced, local = 0x40 * int(rng.integers(2)), (0x80 | 6) * int(rng.integers(2))
    pixels = rng.integers(0, 128, place[2] * place[3], np.uint8).tobytes()
    codes = b"".join(b"\x80" + pixels[i : i + 126] for i in range(0, len(pixels), 126)) + b"\x81"
    palette = rng.bytes(3 * 128) if local else b""
    return b"," + struct.pack("<HHHHB", *place, interlaced | local) + palette + b"\7" + blocks(rng, codes)


def blocks(rng: Random, data: bytes) -> bytes:
    """In blocks of any length, closed by an empty one."""
    longest, parts = int(rng.choice([1, 7, 254, 255])), []
    while data:
        length = int(rng.integers(1, longest + 1))
        parts.append(bytes([len(data[:length])]) + data[:length])
        data = data[length:]
    return b"".join(parts) + b"\0"


# --- PNG


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def random_apng(rng: Random) -> bytes:
    """Every disposal and blending, with and without a default picture, other chunks between, and an end."""
    screen = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    kind, channels = [(0, 1), (2, 3), (3, 1), (4, 2), (6, 4)][rng.integers(5)]
    text = png_chunk(b"tEXt", b"Comment\0of no importance")
    parts = [b"\x89PNG\r\n\x1a\n", png_chunk(b"IHDR", struct.pack(">IIBBBBB", *screen, 8, kind, 0, 0, 0))]
    if kind == 3:
        parts += [png_chunk(b"PLTE", rng.bytes(768)), maybe(rng, png_chunk(b"tRNS", rng.bytes(100)))]
    frames, sequence = int(rng.integers(1, 9)), 0
    parts += [maybe(rng, text), png_chunk(b"acTL", struct.pack(">II", frames, rng.integers(3))), maybe(rng, text)]
    has_default = rng.random() < 0.3
    if has_default:
        parts += idat(rng, picture(rng, screen, channels))
    for index in range(frames):
        is_first = index == 0 and not has_default
        x, y, width, height = (0, 0, *screen) if is_first else region(rng, screen)
        delay = [(0, 0), (0, 100), (1, 0), (7, 100), (1, 3), (65535, 1), (1, 65535), (40, 1000)][rng.integers(8)]
        operations = (int(rng.integers(3)), int(rng.integers(2)))
        fields = (sequence, width, height, x, y, *delay, *operations)
        parts += [png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", *fields)), maybe(rng, text)]
        sequence += 1
        data = picture(rng, (width, height), channels)
        if is_first:
            parts += idat(rng, data)
            continue
        for piece in pieces(rng, data):
            parts.append(png_chunk(b"fdAT", struct.pack(">I", sequence) + piece))
            sequence += 1
    return b"".join([*parts, maybe(rng, text), maybe(rng, png_chunk(b"IEND", b""), png_chunk(b"IEND", b"") + b"rest")])


def picture(rng: Random, size: Size, channels: int) -> bytes:
    width, height = size
    return zlib.compress(b"".join(b"\0" + rng.bytes(width * channels) for _ in range(height)))


def pieces(rng: Random, data: bytes) -> list[bytes]:
    middle = int(rng.integers(1, len(data)))
    return [data[:middle], data[middle:]] if rng.random() < 0.5 else [data]


def idat(rng: Random, data: bytes) -> list[bytes]:
    return [png_chunk(b"IDAT", piece) for piece in pieces(rng, data)]


# --- WebP


def riff_chunk(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def number(value: int) -> bytes:
    return value.to_bytes(3, "little")


def random_webp(rng: Random) -> bytes:
    """Lossy, lossless, with alpha, every disposal and blending, metadata and unknown chunks between, bytes behind."""
    screen = (int(rng.integers(1, 40)), int(rng.integers(1, 40)))
    unknown = riff_chunk(b"HUH?", b"odd")
    metadata = 0x2C & int(rng.integers(256))  # flags of ICC, EXIF and XMP, whether they are there or not
    parts = [riff_chunk(b"VP8X", struct.pack("<I", 0x12 | metadata) + number(screen[0] - 1) + number(screen[1] - 1))]
    parts += [maybe(rng, unknown), riff_chunk(b"ANIM", rng.bytes(4) + b"\0\0"), maybe(rng, unknown)]
    for _ in range(rng.integers(1, 7)):
        x, y, width, height = region(rng, screen, step=2)
        duration = int(rng.choice([0, 1, 19, 20, 40, 1000, 2**24 - 1]))
        fields = [x // 2, y // 2, width - 1, height - 1, duration]
        header = b"".join(map(number, fields)) + bytes([rng.integers(4)])
        parts += [riff_chunk(b"ANMF", header + webp_image(rng, (width, height))), maybe(rng, unknown)]
    parts.append(maybe(rng, riff_chunk(b"EXIF", b"Exif\0\0"), riff_chunk(b"XMP ", b"<x/>")))
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body + maybe(rng, b"rest")


def webp_image(rng: Random, size: Size) -> bytes:
    """The chunks of a still image."""
    mode, is_lossless = ["RGB", "RGBA"][rng.integers(2)], bool(rng.integers(2))
    pixels = rng.bytes(size[0] * size[1] * len(mode))
    file = io.BytesIO()
    Image.frombytes(mode, size, pixels).save(file, "WEBP", lossless=is_lossless, exact=True, method=0)
    data = file.getvalue()
    return data[30:] if data[12:16] == b"VP8X" else data[12:]


RANDOM: dict[str, Callable[[Random], bytes]] = {"GIF": random_gif, "PNG": random_apng, "WEBP": random_webp}


# --- Pillow


def animate(frames: Sequence[Pixels], kind: str, milliseconds: int | list[int], **options: Any) -> bytes:
    file = io.BytesIO()
    first, *others = [Image.fromarray(frame) for frame in frames]
    lossless = {"lossless": True} if kind == "WEBP" else {}
    options = {"duration": milliseconds, "loop": 0, **lossless, **options}
    first.save(file, kind, save_all=True, append_images=others, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> tuple[tuple[int, int], list[float], list[Pixels]]:
    """Size, milliseconds of each frame and frames: the slow way, all decoded. Cut to the first frame's screen."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        size, first = image.size, int(getattr(image, "default_image", False))
        milliseconds, frames = [], []
        for index in range(first, getattr(image, "n_frames", 1)):
            image.seek(index)
            image.load()  # WebP tells a frame's duration no sooner
            milliseconds.append(float(image.info.get("duration") or 0))
            frames.append(rgb_pixels(image)[: size[1], : size[0]].copy())
    return size, milliseconds, frames
