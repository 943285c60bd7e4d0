"""Decoding: every format and mode as the reference sees it, and a clear word for everything else."""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import zlib
from typing import Any

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from transformers.image_transforms import convert_to_rgb

from rtp_mm import _core
from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.image import FORMATS, decode
from rtp_mm.media.jpeg import decode_jpeg
from rtp_mm.media.probe import probe
from rtp_mm.media.sniff import sniff
from rtp_mm.types import MMUrlType

Photo = NDArray[np.uint8]


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def pixels(data: bytes, max_pixels: int = 10**8, allow_truncated: bool = False, exif_transpose: bool = False) -> Photo:
    return decode(data, max_pixels=max_pixels, allow_truncated=allow_truncated, exif_transpose=exif_transpose)


@pytest.fixture(scope="session")
def chelsea(photos: dict[str, Photo]) -> Image.Image:
    return Image.fromarray(photos["chelsea"])


CASES = [
    *(("PNG", mode) for mode in ("RGB", "RGBA", "P", "L", "LA", "1", "I;16")),
    *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
    *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    *(("TIFF", mode) for mode in ("RGB", "RGBA", "CMYK", "LAB", "YCbCr", "I;16", "F")),
    *((format, "RGB") for format in FORMATS if format not in ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "ICO")),
    ("GIF", "P"),
    ("ICO", "RGBA"),
    ("TGA", "RGBA"),
    ("QOI", "RGBA"),
    ("AVIF", "RGBA"),
    ("PPM", "L"),
]


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    """The photo with a gradient for alpha, and grey levels of 16 bit where they are asked for."""
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 3)
    converted = image.convert("RGB").convert("LAB") if mode == "LAB" else image.convert(mode)
    if mode in ("RGBA", "LA"):
        converted.putalpha(Image.linear_gradient("L").resize(image.size))
    return converted


@pytest.mark.parametrize(("format", "mode"), CASES, ids=lambda value: value)
def test_every_format_and_mode_is_decoded_as_the_reference_does(chelsea: Image.Image, format: str, mode: str) -> None:
    size = (64, 64) if format == "ICO" else (101, 67)
    data = encode(in_mode(chelsea.resize(size), mode), format)
    with Image.open(io.BytesIO(data)) as image:
        expected = convert_to_rgb(image, return_numpy=True)
    assert probe(data) == (format, *size, 1)
    np.testing.assert_array_equal(pixels(data), expected)
    assert sniff(data) is (None if format == "TGA" else MMUrlType.IMAGE)


def test_every_value_is_blended_with_white_as_pillow_does() -> None:
    values = np.arange(256, dtype=np.uint8)
    image = np.stack(np.broadcast_arrays(values, values[::-1], 7, values[:, None]), axis=-1).astype(np.uint8)
    expected = convert_to_rgb(Image.fromarray(image, "RGBA"), return_numpy=True)
    assert np.array_equal(_core.over_white(image), expected)


JPEG_OPTIONS: list[dict[str, Any]] = [
    {},
    {"progressive": True},
    {"optimize": True, "restart_marker_rows": 1},
    {"subsampling": "4:4:4", "quality": 100},
    {"subsampling": "4:2:2"},
    {"subsampling": "4:2:0", "quality": 20, "progressive": True},
    {"keep_rgb": True},
]


@pytest.mark.parametrize("options", JPEG_OPTIONS, ids=str)
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (16, 16), (101, 67), (17, 200), (451, 300)], ids=str)
def test_every_jpeg_is_pillows(chelsea: Image.Image, options: dict[str, Any], mode: str, size: tuple[int, int]) -> None:
    data = encode(chelsea.resize(size).convert(mode), "JPEG", **options)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(pixels(data), expected)
    np.testing.assert_array_equal(pixels(data + b"\0 after the end"), expected)
    if options != {"keep_rgb": True}:
        fast = decode_jpeg(data, *size)
        assert fast is not None
        np.testing.assert_array_equal(fast, expected)


def test_a_quicker_chroma_upsampling_would_be_seen(photo: bytes) -> None:
    quicker = simplejpeg.decode_jpeg(photo, "RGB", fastupsample=True)
    assert (quicker != pixels(photo)).mean() > 0.05


def test_a_jpeg_of_4_to_4_to_1_is_left_to_pillow() -> None:
    """Luma of 1x4, which simplejpeg has no name for: 2x2 written anew, with as many blocks in each unit."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize((64, 32)).convert("RGB").save(file, "JPEG", subsampling="4:1:1")
    data = bytearray(file.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 11] = 0x14
    data[frame + 5 : frame + 9] = struct.pack(">HH", 128, 16)
    np.testing.assert_array_equal(pixels(bytes(data)), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("scans", [199, 200, 201])
def test_a_jpegs_scans_are_limited(chelsea: Image.Image, scans: int) -> None:
    """Each costs a few bytes, and as much time as the image."""
    file = io.BytesIO()
    chelsea.resize((64, 64)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    last = data.rindex(b"\xff\xda")
    scan = data[last:-2]
    repeated = data[:-2] + scan * (scans - data.count(b"\xff\xda")) + data[-2:]
    assert repeated.count(b"\xff\xda") == scans
    if scans > 200:
        with pytest.raises(WrongFormatError, match="a JPEG of 201 scans, over the limit of 200"):
            pixels(repeated)
    else:
        np.testing.assert_array_equal(pixels(repeated), np.asarray(Image.open(io.BytesIO(repeated)).convert("RGB")))


def tiff_of_one_tile(tile: int, kind: int = 4) -> bytes:
    """An image of 64x64 in a tile of `tile` a side, a value of this TIFF type."""
    data = zlib.compress(bytes(min(tile, 80) ** 2 * 3))
    tags = {256: 64, 257: 64, 258: 8, 259: 8, 262: 2, 277: 3, 322: tile, 323: tile, 324: 0, 325: len(data)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    entries = [struct.pack("<HHII", tag, kind if tag in (322, 323) else 4, 1, value) for tag, value in tags.items()]
    return struct.pack("<4sIH", b"II*\0", 8, len(tags)) + b"".join(entries) + bytes(4) + data


def test_a_tiffs_tiles_are_limited() -> None:
    """libtiff takes memory for all of a tile, however little of it the image covers."""
    for limit in (6401, 6400):
        assert pixels(tiff_of_one_tile(80), limit).shape == (64, 64, 3)
    with pytest.raises(WrongFormatError, match="80x80 is 6400 pixels, over the limit of 6399"):
        pixels(tiff_of_one_tile(80), 6399)
    with pytest.raises(WrongFormatError, match="30000x30000 is 900000000 pixels, over the limit"):
        pixels(tiff_of_one_tile(30000))
    with pytest.raises(WrongFormatError, match="broken image"):
        pixels(tiff_of_one_tile(30000, kind=2))  # a text, which is libtiff's to refuse


def test_a_jpeg_that_is_not_plain_is_left_to_pillow(chelsea: Image.Image, photo: bytes) -> None:
    assert decode_jpeg(photo, 451, 300) is not None
    assert decode_jpeg(photo, 451, 299) is None  # Pillow read another header than libjpeg-turbo does
    assert decode_jpeg(encode(chelsea.convert("CMYK"), "JPEG"), 451, 300) is None
    assert decode_jpeg(photo[: len(photo) // 2], 451, 300) is None
    assert decode_jpeg(photo[:-2], 451, 300) is None  # no end marker
    assert decode_jpeg(b"", 451, 300) is None
    twelve_bits = bytearray(photo)
    twelve_bits[photo.index(b"\xff\xc0") + 4] = 12
    assert decode_jpeg(bytes(twelve_bits), 451, 300) is None


def test_a_damaged_jpeg_is_what_pillow_makes_of_it(chelsea: Image.Image) -> None:
    data = encode(chelsea, "JPEG")
    rng = np.random.default_rng(7)
    decoded = 0
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.integers(2, len(data))] ^= 1 << rng.integers(8)
        try:
            expected = np.asarray(Image.open(io.BytesIO(damaged), formats=FORMATS).convert("RGB"))
        except (OSError, SyntaxError):
            with pytest.raises(WrongFormatError):
                pixels(bytes(damaged))
            continue
        np.testing.assert_array_equal(pixels(bytes(damaged)), expected)
        decoded += 1
    assert decoded > 30


@pytest.mark.parametrize("mode", ["RGB", "P", "L", "1"])
def test_a_transparent_colour_counts_as_transparent(chelsea: Image.Image, mode: str) -> None:
    image = chelsea.resize((32, 32)).convert(mode)
    colour = image.getpixel((5, 5))
    data = encode(image, "PNG", transparency=colour)
    np.testing.assert_array_equal(pixels(data)[5, 5], [255, 255, 255])


def test_transparency_is_laid_over_white_and_not_dropped() -> None:
    data = encode(Image.new("RGBA", (4, 4), (200, 100, 50, 0)), "PNG")
    assert (pixels(data) == 255).all()
    assert (np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) == [200, 100, 50]).all()  # the other rule differs


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_an_animation_is_its_first_frame(format: str) -> None:
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "lime")]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    red, green, blue = pixels(data)[16, 16]
    assert red > 200
    assert max(green, blue) < 50


def test_exif_orientation_counts_only_when_asked_for(chelsea: Image.Image) -> None:
    upright = encode(chelsea, "JPEG", exif=Image.Exif())
    np.testing.assert_array_equal(pixels(upright, exif_transpose=True), pixels(upright))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise
    data = encode(chelsea, "JPEG", exif=exif)
    assert pixels(data).shape == (300, 451, 3)
    np.testing.assert_array_equal(pixels(data, exif_transpose=True), np.rot90(pixels(data), -1))


def test_pixels_over_the_limit_are_refused_from_the_header(photo: bytes) -> None:
    assert pixels(photo, max_pixels=451 * 300).shape == (300, 451, 3)
    with pytest.raises(WrongFormatError, match=r"451x300 is 135300 pixels, over the limit of 135299 \(MM_MAX_PIXELS\)"):
        pixels(photo, max_pixels=451 * 300 - 1)
    header_only = photo[: photo.index(b"\xff\xda")]  # refused although there is nothing to decode
    with pytest.raises(WrongFormatError, match="135300 pixels"):
        pixels(header_only, max_pixels=1000)


def png_header(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header)) + b"\0\0\0\0IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_001, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_refused(side: int) -> None:
    with pytest.raises(WrongFormatError, match="pixels"):
        pixels(png_header(side, side))


def test_an_icon_whose_directory_lies_is_refused_by_its_image(chelsea: Image.Image) -> None:
    data = bytearray(encode(chelsea.resize((200, 200)), "ICO", sizes=[(200, 200)]))
    data[6:8] = bytes([16, 16])
    with pytest.raises(WrongFormatError, match="200x200 is 40000 pixels"):
        pixels(bytes(data), max_pixels=1000)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "QOI"])
def test_a_truncated_image_is_an_error(chelsea: Image.Image, format: str) -> None:
    data = encode(chelsea, format)
    with pytest.raises(WrongFormatError, match=r"broken image|no image"):
        pixels(data[: len(data) * 2 // 3])


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_truncated_image_is_decoded_as_far_as_it_goes_when_allowed(chelsea: Image.Image, format: str) -> None:
    data = encode(chelsea, format)
    partial = pixels(data[: len(data) * 2 // 3], allow_truncated=True)
    whole = pixels(data)
    np.testing.assert_array_equal(partial[:100], whole[:100])
    assert (partial[-20:] != whole[-20:]).any()
    with pytest.raises(WrongFormatError):  # and the next one is strict again
        pixels(data[: len(data) * 2 // 3])


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", ""),
        (b"\0", ""),
        (b"\n<!DOCTYPE html><html>", "; these bytes are HTML"),
        (b"<HTML>", "; these bytes are HTML"),
        ("not found: \u00e4".encode() * 20, "; these bytes are text"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "; these bytes are text"),
        (b"\x89PNG\r\n\x1a\n", ""),
    ],
)
def test_what_is_no_image_is_told_so(data: bytes, found: str) -> None:
    with pytest.raises(WrongFormatError, match=rf"no image in a supported format \([A-Z0-9, ]+\){found}$"):
        pixels(data)
    assert probe(data) is None


def mp4(brand: bytes) -> bytes:
    return b"\0\0\0\x18ftyp" + brand + b"\0\0\2\0isomiso2" + b"\0" * 64


@pytest.mark.parametrize(
    ("data", "mm_type"),
    [
        (mp4(b"isom"), MMUrlType.VIDEO),
        (mp4(b"qt  "), MMUrlType.VIDEO),
        (mp4(b"M4A "), MMUrlType.AUDIO),
        (mp4(b"avif"), MMUrlType.IMAGE),
        (mp4(b"heic"), MMUrlType.IMAGE),
        (b"\x1a\x45\xdf\xa3" + b"\0" * 60, MMUrlType.VIDEO),
        (b"RIFF\x24\0\0\0WAVEfmt ", MMUrlType.AUDIO),
        (b"RIFF\x24\0\0\0AVI LIST", MMUrlType.VIDEO),
        (b"RIFF\n\n\n\nWEBPVP8 ", MMUrlType.IMAGE),
        (b"ID3\4\0\0", MMUrlType.AUDIO),
        (b"\xff\xfb\x90\x64", MMUrlType.AUDIO),
        (b"fLaC\0\0\0\x22", MMUrlType.AUDIO),
        (b"RF64\xff\xff\xff\xffWAVEds64", MMUrlType.AUDIO),
        (b"riff\x2e\x91\xcf\x11\xa5\xd6", MMUrlType.AUDIO),
        (b"caff\0\1\0\0desc", MMUrlType.AUDIO),
        (b"wvpk\x10\0\0\0", MMUrlType.AUDIO),
        (b"FLV\1\5", MMUrlType.VIDEO),
        ((b"\1\2\3\4\x47" + b"\0" * 187) * 3, MMUrlType.VIDEO),
        ((b"\x47" + b"\0" * 187) * 3, MMUrlType.VIDEO),
        (b"OggS\0\2" + b"\0" * 22 + b"\x80theora", MMUrlType.VIDEO),
        (b"OggS\0\2" + b"\0" * 22 + b"\1vorbis", MMUrlType.AUDIO),
        (b"\xff\xd8\xff\xe0", MMUrlType.IMAGE),
        (b"", None),
        (b"hello", None),
    ],
    ids=repr,
)
def test_containers_are_told_by_their_first_bytes(data: bytes, mm_type: MMUrlType | None) -> None:
    assert sniff(data) is mm_type


@pytest.mark.parametrize(("data", "kind"), [(mp4(b"isom"), "video"), (b"fLaC\0\0\0\x22" + b"\0" * 50, "audio")])
def test_a_video_in_place_of_an_image_is_named(data: bytes, kind: str) -> None:
    with pytest.raises(NotSupportedError, match=f"expected an image, got {kind}"):
        pixels(data)


def test_heic_without_its_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(NotSupportedError, match=r"pip install 'rtp_mm\[heif\]'"):
        pixels(mp4(b"heic"))


def damage(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    for position in rng.integers(0, min(len(data), 400), size=3):
        damaged[position] = rng.integers(256)
    return bytes(damaged)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("format", FORMATS)
def test_damage_gives_an_image_or_one_of_our_errors(chelsea: Image.Image, format: str) -> None:
    data = encode(chelsea.resize((48, 48)), format)
    rng = np.random.default_rng(5)
    refused = 0
    for _ in range(100):
        try:
            pixels(damage(data, rng), max_pixels=10**6)
        except (WrongFormatError, NotSupportedError):
            refused += 1
    assert refused


@pytest.mark.parametrize(("decoder", "format"), [("read_jpeg", "JPEG"), ("decode_jpeg", "JPEG"), ("decode_png", "PNG")])
def test_a_bug_of_a_faster_decoder_is_no_broken_file(
    decoder: str, format: str, chelsea: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("ours")

    data = encode(chelsea, format)
    if decoder == "decode_jpeg":
        data = data[:2] + b"\xff" + data[2:]  # a fill byte, which our own leaves to it
    monkeypatch.setattr(f"rtp_mm.media.image.{decoder}", broken)
    with pytest.raises(ValueError, match="ours"):
        pixels(data)


@pytest.mark.parametrize("call", ["rtp_mm.media.image", "rtp_mm.media.fetch", "rtp_mm.preprocess.patches"])
def test_neither_torch_nor_heif_is_imported(call: str) -> None:
    code = f"import json, sys, {call}; print(json.dumps([m for m in ('torch', 'pillow_heif') if m in sys.modules]))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert json.loads(printed) == []
