"""PNG files to pixels: Pillow's for every filter and mode, and Pillow's own verdict on whatever is unusual."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from rtp_mm import _core
from rtp_mm.errors import WrongFormatError
from rtp_mm.media.image import decode
from rtp_mm.media.png import decode_png

COLOURS = {1: 0, 2: 4, 3: 2, 4: 6}  # by channels
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
LIMITS = {"max_pixels": 10**9, "allow_truncated": False, "exif_transpose": False}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", len(content), kind) + content + struct.pack(">I", zlib.crc32(kind + content))


def filtered(pixels: NDArray[np.uint8], filters: NDArray[np.uint8]) -> bytes:
    """Rows as the specification filters them, each by its own type, in plain integers."""
    height, width, channels = pixels.shape
    rows = []
    padded = np.zeros((height + 1, width + 1, channels), np.int64)
    padded[1:, 1:] = pixels
    for y, kind in enumerate(filters):
        here, left = padded[y + 1, 1:], padded[y + 1, :-1]
        above, corner = padded[y, 1:], padded[y, :-1]
        p = left + above - corner
        from_left, from_above, from_corner = abs(p - left), abs(p - above), abs(p - corner)
        nearest = np.where(
            (from_left <= from_above) & (from_left <= from_corner),
            left,
            np.where(from_above <= from_corner, above, corner),
        )
        guess = (0, left, above, (left + above) // 2, nearest)[kind]
        rows.append(bytes([kind]) + ((here - guess) % 256).astype(np.uint8).tobytes())
    return b"".join(rows)


def encode(pixels: NDArray[np.uint8], filters: NDArray[np.uint8], piece: int = 8192, before: bytes = b"") -> bytes:
    height, width, channels = pixels.shape
    data = zlib.compress(filtered(pixels, filters), 1)
    pieces = [chunk(b"IDAT", data[i : i + piece]) for i in range(0, len(data), piece)]
    header = struct.pack(">IIBBBBB", width, height, 8, COLOURS[channels], 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + b"".join(pieces) + chunk(b"IEND", b"")


def picture(width: int, height: int, channels: int, seed: int = 0) -> NDArray[np.uint8]:
    """Smooth with noise in it, so that every branch of the filters is taken."""
    rng = np.random.default_rng(seed)
    smooth = np.add.outer(np.arange(height) * 3, np.arange(width) * 2)[..., None] + rng.integers(0, 40, channels)
    return (smooth + rng.integers(0, rng.integers(1, 256), (height, width, channels))).astype(np.uint8)


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    with Image.open(io.BytesIO(data)) as image:
        return convert_to_rgb(image, return_numpy=True)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 40), st.integers(1, 24), st.integers(1, 4), st.integers(0, 2**32 - 1), st.integers(1, 200))
def test_any_filters_give_the_pixels_back(width: int, height: int, channels: int, seed: int, piece: int) -> None:
    pixels = picture(width, height, channels, seed)
    filters = np.random.default_rng(seed).integers(0, 5, height).astype(np.uint8)
    data = encode(pixels, filters, piece)
    decoded = decode_png(data, width, height)
    assert decoded is not None
    assert np.array_equal(decoded, pixels)
    assert np.array_equal(decode(data, **LIMITS), by_pillow(data))


@pytest.mark.parametrize("kind", range(5))
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_each_filter_alone_gives_the_pixels_back(channels: int, kind: int) -> None:
    pixels = picture(67, 31, channels)
    decoded = decode_png(encode(pixels, np.full(31, kind, np.uint8)), 67, 31)
    assert decoded is not None
    assert np.array_equal(decoded, pixels)


@pytest.mark.parametrize("mode", MODES.values())
@pytest.mark.parametrize("options", [{}, {"compress_level": 0}, {"optimize": True}], ids=str)
def test_what_pillow_saves_is_decoded_here(mode: str, options: dict[str, object]) -> None:
    image = Image.fromarray(picture(101, 57, 4)).convert(mode)
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    assert decode_png(file.getvalue(), 101, 57) is not None
    assert np.array_equal(decode(file.getvalue(), **LIMITS), by_pillow(file.getvalue()))


def saved(image: Image.Image, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def unusual() -> dict[str, bytes]:
    photo = Image.fromarray(picture(40, 30, 3))
    plain = saved(photo)
    end = plain.rindex(b"IDAT")
    end_chunk = plain.rindex(b"IEND") - 4
    return {
        "a palette": saved(photo.quantize(16)),
        "one bit": saved(photo.convert("1")),
        "16 bits": saved(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)),
        "a transparent colour": saved(photo, transparency=(0, 0, 0)),
        "an animation": saved(photo, save_all=True, append_images=[photo.rotate(90)]),
        "text after the image": plain[:end_chunk] + chunk(b"tEXt", b"a\0b") + plain[end_chunk:],
        "no end": plain[:end_chunk],
        "truncated": plain[: end + 200],
        "another size": b"",
    }


MIB = 1 << 20
COMPRESSED = {  # what a chunk holds before text or a profile
    "zTXt": b"Comment\0\0",
    "iTXt": b"Comment\0\1\0\0\0",
    "iCCP": b"Profile\0\0",
}


def with_compressed(kind: str, nbytes: int, count: int = 1, *, is_last: bool = False) -> bytes:
    """A PNG with this many bytes in each of `count` chunks, compressed a thousandfold, before or after its pixels."""
    plain = saved(Image.fromarray(picture(40, 30, 3)))
    at = plain.index(b"IEND" if is_last else b"IDAT") - 4
    extra = chunk(kind.encode(), COMPRESSED[kind] + zlib.compress(b"a" * nbytes, 9))
    return plain[:at] + extra * count + plain[at:]


@pytest.mark.parametrize("kind", COMPRESSED)
@pytest.mark.parametrize("is_last", [False, True])
def test_text_and_profiles_are_a_mib_at_most(kind: str, is_last: bool) -> None:
    for nbytes in (MIB - 1, MIB):
        assert decode(with_compressed(kind, nbytes, is_last=is_last), **LIMITS).shape == (30, 40, 3)
    for nbytes in (MIB + 1, 50 * MIB):
        bomb = with_compressed(kind, nbytes, is_last=is_last)
        assert len(bomb) < 100_000
        with pytest.raises(WrongFormatError, match=r"broken image: .*too large"):
            decode(bomb, **LIMITS)
        assert decode(bomb, **LIMITS | {"allow_truncated": True}).shape == (30, 40, 3)  # without the text


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_all_text_together_is_64_mib_at_most(kind: str) -> None:
    for count in (63, 64):
        assert decode(with_compressed(kind, MIB, count), **LIMITS).shape == (30, 40, 3)
    with pytest.raises(WrongFormatError, match="broken image: Too much memory used in text chunks"):
        decode(with_compressed(kind, MIB, 65), **LIMITS)


@pytest.mark.parametrize("name", unusual())
def test_what_is_unusual_is_left_to_pillow(name: str) -> None:
    data = unusual()[name] or saved(Image.fromarray(picture(41, 30, 3)))
    assert decode_png(data, 40, 30) is None
    try:
        expected = by_pillow(data)
    except OSError:
        with pytest.raises(WrongFormatError):
            decode(data, **LIMITS)
    else:
        assert np.array_equal(decode(data, **LIMITS), expected)


@pytest.mark.parametrize("filters", [[0, 5], [255, 0]])
def test_an_unknown_filter_is_refused(filters: list[int]) -> None:
    data = bytearray(filtered(picture(3, 2, 3), np.zeros(2, np.uint8)))
    data[0], data[10] = filters
    assert _core.unfilter_png(data, 2, 3, 3) is None


@pytest.mark.parametrize(
    ("nbytes", "height", "width", "channels"), [(19, 2, 3, 3), (21, 2, 3, 3), (20, 2, 3, 5), (0, 0, 3, 3), (2, 2, 0, 3)]
)
def test_other_sizes_of_data_are_refused(nbytes: int, height: int, width: int, channels: int) -> None:
    with pytest.raises(ValueError, match="unfilter_png"):
        _core.unfilter_png(bytes(nbytes), height, width, channels)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_file_is_decoded_as_pillow_does_or_not_at_all(data: st.DataObject) -> None:
    channels = data.draw(st.integers(1, 4))
    file = bytearray(encode(picture(9, 7, channels), np.arange(7, dtype=np.uint8) % 5, 50))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(file) - 1))
        file[at] = data.draw(st.integers(0, 255))
    damaged = bytes(file[: data.draw(st.integers(len(file) - 60, len(file)))])
    try:
        expected = by_pillow(damaged)
    except (OSError, SyntaxError, ValueError):
        with pytest.raises(WrongFormatError):
            decode(damaged, **LIMITS)
    else:
        assert np.array_equal(decode(damaged, **LIMITS), expected)
