"""The header probe says what Pillow says, of files of every kind, from as little of them as possible."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
import skimage
from hypothesis import given, settings
from hypothesis import strategies as st
from image_seeds import ANIMATED, STILL, Variant, encode, seeds
from PIL import Image, UnidentifiedImageError

from rtp_mm.media.image import FORMATS
from rtp_mm.media.probe import NeedsMore, probe, probe_start

SEEDS = dict(seeds())


def opened(data: bytes) -> tuple[str, int, int, int]:
    """Format, size and frames as Pillow tells them."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        format = {"MPO": "JPEG"}.get(image.format or "", image.format or "")
        return format, *image.size, getattr(image, "n_frames", 1)


def agrees(data: bytes) -> bool:
    header = probe(data)
    assert header is not None
    expected = opened(data)
    return header[:3] == expected[:3] and header.frames in (expected[3], None)


@pytest.mark.parametrize("variant", STILL, ids=lambda variant: "-".join(map(str, variant)))
@settings(max_examples=12, deadline=None)
@given(width=st.integers(1, 700), height=st.integers(1, 700))
def test_every_still_image_is_as_pillow_opens_it(variant: Variant, width: int, height: int) -> None:
    format, mode, options = variant
    if format == "ICO":
        width, height = min(width, 256), min(height, 256)
        options = {**options, "sizes": [(width, height), (8, 8)]}
    data = encode(Image.new(mode, (width, height)), format, **options)
    assert agrees(data)
    header = probe(data)
    assert header is not None
    assert header.frames == 1


@pytest.mark.parametrize("format", ANIMATED)
@settings(max_examples=6, deadline=None)
@given(width=st.integers(2, 300), height=st.integers(2, 300), frames=st.integers(2, 9))
def test_the_frames_of_an_animation_are_counted(format: str, width: int, height: int, frames: int) -> None:
    stack = [Image.new("RGB", (width, height), (25 * i, 255 - 20 * i, 90)) for i in range(frames)]
    data = encode(stack[0], format, save_all=True, append_images=stack[1:])
    header = probe(data)
    assert header is not None
    expected = opened(data)
    assert header[:3] == expected[:3]
    assert header.frames == (None if format == "TIFF" else expected[3])
    assert expected[3] == frames


def real_files() -> Iterable[Path]:
    """Images that came with the libraries at hand."""
    for module in (skimage, matplotlib):
        for path in Path(module.__file__).parent.rglob("*"):
            if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".gif", ".tif", ".tiff", ".bmp", ".ico", ".webp"):
                yield path


def test_real_files_are_as_pillow_opens_them() -> None:
    agreed = 0
    for path in real_files():
        data = path.read_bytes()
        try:
            opened(data)
        except UnidentifiedImageError:  # some are broken on purpose
            continue
        assert agrees(data), path
        agreed += 1
    assert agreed > 20


@pytest.mark.parametrize("name", SEEDS)
def test_a_beginning_gives_the_answer_of_the_whole_or_asks_for_more(name: str) -> None:
    whole = probe(SEEDS[name])
    assert whole is not None
    first = None  # bytes at which the answer was there
    for size in range(len(SEEDS[name])):
        header = probe_start(SEEDS[name][:size])
        if isinstance(header, NeedsMore):
            assert size < header.nbytes
            assert first is None, "an answer was withdrawn"
            continue
        assert header is not None
        first = first or size
        assert header[:3] == whole[:3]
        assert header.frames in (whole.frames, None)
    assert first is not None
    if not name.endswith(("tiff", "ico")):  # whose tags and pictures come where they like
        assert first <= 1100  # a progressive JPEG's tables, or a GIF's palette, and no more


def test_what_it_asks_for_is_enough_in_few_steps() -> None:
    for name, data in SEEDS.items():
        size, asked = 0, 0
        while isinstance(header := probe_start(data[:size]), NeedsMore):
            size, asked = header.nbytes, asked + 1
        assert header is not None, name
        assert asked < 80, name


@pytest.mark.parametrize("marker", sorted({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}))
def test_every_jpeg_process_has_its_size(marker: int) -> None:
    data = SEEDS["00.jpeg"]
    at = data.index(b"\xff\xc0")
    data = data[: at + 1] + bytes([marker]) + data[at + 2 :]
    assert probe(data) == ("JPEG", 18, 17, 1)
    assert opened(data) == ("JPEG", 18, 17, 1)


def test_jpeg_segments_of_any_length_and_fill_bytes_are_passed() -> None:
    plain = SEEDS["00.jpeg"]
    profile = b"".join(b"\xff\xe2" + struct.pack(">H", 65535) + bytes(65533) for _ in range(3))
    data = plain[:2] + profile + b"\xff\xff\xff\xfe\0\2junk\xff\0" + plain[2:]
    assert probe(data) == ("JPEG", 18, 17, 1)
    assert agrees(data)
    assert probe_start(data[:65536]) == NeedsMore(2 + 65537 + 1)


def bmp(header_bytes: int, width: int, height: int) -> bytes:
    size = struct.pack("<HH", width, height) if header_bytes == 12 else struct.pack("<Ii", width, height)
    header = struct.pack("<I", header_bytes) + size + struct.pack("<HH", 1, 24)
    header = header.ljust(header_bytes, b"\0")
    pixels = bytes((width * 3 + 3) // 4 * 4 * abs(height))
    offset = 14 + len(header)
    return b"BM" + struct.pack("<IHHI", offset + len(pixels), 0, 0, offset) + header + pixels


@pytest.mark.parametrize("header_bytes", [12, 40, 52, 56, 64, 108, 124])
@pytest.mark.parametrize("height", [9, -9])
def test_every_bitmap_header_has_its_size(header_bytes: int, height: int) -> None:
    if header_bytes == 12 and height < 0:
        height = 300
    data = bmp(header_bytes, 5, height)
    assert probe(data) == ("BMP", 5, abs(height), 1)
    assert agrees(data)


def tiff(order: str, magic: bytes, tags: dict[int, tuple[int, int]], next_directory: int = 0) -> bytes:
    """tags: number to (type, value); BigTIFF where `magic` says so."""
    prefix = b"MM" if order == ">" else b"II"
    if magic in (b"\0\x2b", b"\x2b\0"):
        entries = [struct.pack(order + "HHQ", tag, type, 1) + field(order, *tag_value, 8)
                   for tag, tag_value in tags.items() for type in [tag_value[0]]]  # fmt: skip
        header = prefix + magic + struct.pack(order + "HHQ", 8, 0, 16) + struct.pack(order + "Q", len(entries))
        return header + b"".join(entries) + struct.pack(order + "Q", next_directory)
    entries = [struct.pack(order + "HHI", tag, type, 1) + field(order, type, value, 4)
               for tag, (type, value) in tags.items()]  # fmt: skip
    header = prefix + magic + struct.pack(order + "I", 8) + struct.pack(order + "H", len(entries))
    return header + b"".join(entries) + struct.pack(order + "I", next_directory)


def field(order: str, type: int, value: int, size: int) -> bytes:
    return struct.pack(order + {3: "H", 4: "I", 16: "Q"}[type], value).ljust(size, b"\0")


@pytest.mark.parametrize("type", [3, 4])
@pytest.mark.parametrize(
    ("order", "magic"), [("<", b"\x2a\0"), (">", b"\0\x2a"), (">", b"\x2a\0"), ("<", b"\x2b\0"), (">", b"\0\x2b")]
)
def test_every_tiff_order_has_its_size(order: str, magic: bytes, type: int) -> None:
    data = tiff(order, magic, {256: (type, 300), 257: (type, 200)})
    assert probe(data) == ("TIFF", 300, 200, 1)
    turned = tiff(order, magic, {256: (type, 300), 257: (type, 200), 274: (3, 6)}, next_directory=500)
    assert probe(turned) == ("TIFF", 200, 300, None)
    assert probe(tiff(order, magic, {256: (type, 300), 258: (3, 8)})) is None  # no height


def test_a_turned_tiff_is_turned_as_pillow_turns_it() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(Image.new("RGB", (30, 20)), "TIFF", exif=exif)
    assert probe(data) == ("TIFF", 20, 30, 1)
    assert agrees(data)


def test_a_first_frame_that_leaves_a_gifs_screen_makes_it_larger() -> None:
    data = bytearray(SEEDS["06.gif"])
    data[6:10] = struct.pack("<HH", 4, 400)  # the screen; the frame is 18 x 17
    assert probe(bytes(data)) == ("GIF", 18, 400, 1)
    assert agrees(bytes(data))


def test_an_icon_is_its_largest_picture_whatever_its_directory_says() -> None:
    image = Image.new("RGBA", (200, 200))
    data = bytearray(encode(image, "ICO", sizes=[(200, 200), (16, 16)]))
    sizes = [tuple(data[6 + 16 * i : 8 + 16 * i]) for i in range(2)]
    largest = 6 + 16 * sizes.index((200, 200))
    data[largest : largest + 2] = bytes([90, 90])
    assert probe(bytes(data)) == ("ICO", 200, 200, 1)
    data[largest : largest + 2] = bytes([8, 8])
    assert probe(bytes(data)) == ("ICO", 16, 16, 1)


def box(type: str, *content: bytes, version: int | None = None, flags: int = 0) -> bytes:
    full = b"" if version is None else bytes([version]) + flags.to_bytes(3, "big")
    body = full + b"".join(content)
    return struct.pack(">I", 8 + len(body)) + type.encode() + body


def heif(
    brands: list[bytes], extents: list[tuple[int, int]], primary: int, *, turn: int = 0, before: bytes = b""
) -> bytes:
    """Item i + 1 has extents[i] and, where it is `primary`, the turn."""
    properties = [box("ispe", struct.pack(">II", *extent), version=0) for extent in extents]
    properties.append(box("irot", bytes([turn])))
    entries = [struct.pack(">HBB", i + 1, 1, i + 1) for i in range(len(extents)) if i + 1 != primary]
    entries.append(struct.pack(">HBBB", primary, 2, 0x80 | primary, len(properties)))
    associations = struct.pack(">I", len(entries)) + b"".join(entries)
    ipma = box("ipma", associations, version=0)
    meta = box(
        "meta",
        box("hdlr", bytes(20), version=0),
        box("pitm", struct.pack(">H", primary), version=0),
        box("iprp", box("ipco", *properties), ipma),
        version=0,
    )
    return box("ftyp", brands[0], bytes(4), *brands[1:]) + before + meta


def test_heif_is_its_primary_item() -> None:
    extents = [(4000, 3000), (320, 240), (512, 512)]  # a thumbnail and a tile beside it
    assert probe(heif([b"heic", b"mif1"], extents, 1)) == ("HEIF", 4000, 3000, 1)
    assert probe(heif([b"heic"], extents, 2)) == ("HEIF", 320, 240, 1)
    assert probe(heif([b"mif1", b"heic"], extents, 1, turn=1)) == ("HEIF", 3000, 4000, 1)
    assert probe(heif([b"mif1", b"avif"], extents, 1, turn=1)) == ("AVIF", 4000, 3000, 1)
    assert probe(heif([b"heic"], extents, 9)) == ("HEIF", 4000, 3000, 1)  # an item that is not there: the largest
    late = heif([b"heic"], extents, 1, before=box("mdat", bytes(100_000)))
    assert probe(late) == ("HEIF", 4000, 3000, 1)
    assert probe_start(late[:65536]) == NeedsMore(16 + 100_008 + 4)
    assert probe(heif([b"isom", b"mp42"], extents, 1)) is None  # a film
    assert probe(heif([b"mif1", b"miaf"], extents, 1)) is None  # some other codec


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"hello, world, this is a text", b"<!DOCTYPE html><html>", b"\0\0\0\x18ftypisom" + bytes(200),
     b"\x1a\x45\xdf\xa3" + bytes(60), b"RIFF\x24\0\0\0WAVEfmt " + bytes(40), b"%!PS-Adobe-3.0 EPSF-3.0\n",
     b"P9 3 3 255\n" + bytes(27), b"BM" + bytes(60), b"\xff\xd8\xff\xda" + bytes(60), bytes(100)],
    ids=repr,
)  # fmt: skip
def test_what_is_no_image_has_no_header(data: bytes) -> None:
    assert probe(data) is None


@pytest.mark.parametrize("name", SEEDS)
def test_an_image_without_pixels_has_no_header(name: str) -> None:
    header = probe(SEEDS[name])
    assert header is not None
    assert header.width > 0
    assert header.height > 0


def test_headers_that_promise_the_most_are_read_as_they_stand() -> None:
    png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1)
    assert probe(png) == ("PNG", 2**31 - 1, 2**31 - 1, None)
    assert probe(b"P6 9999999999 9999999999 255\n") == ("PPM", 9999999999, 9999999999, 1)
    assert probe(b"P6 99999999999 1 255\n") is None


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff" + b"\xff" * 2_000_000,  # fill bytes
        b"\xff\xd8\xff" + b"\xff\xd0" * 1_000_000,  # markers
        b"GIF89a" + bytes(7) + b"!\xfe" + b"\1x" * 1_000_000,  # blocks of one byte
        b"P6 #" + b"x" * 2_000_000,  # a comment
        b"II\x2b\0\x08\0\0\0\x10\0\0\0\0\0\0\0" + b"\xff" * 2_000_000,  # entries
        box("ftyp", b"avif", bytes(4)) + box("free") * 250_000,
    ],
    ids=["fill", "markers", "blocks", "comment", "tags", "boxes"],
)
def test_a_file_of_nothing_but_headers_is_given_up(data: bytes) -> None:
    assert probe_start(data) is None


def test_frames_in_too_many_blocks_are_not_counted() -> None:
    def gif(blocks: int) -> bytes:
        return b"GIF89a" + bytes(7) + b"," + bytes(4) + b"\3\0\4\0\0\2" + b"\1x" * blocks + b"\0;"

    assert probe(gif(65_000)) == ("GIF", 3, 4, 1)
    assert probe(gif(66_000)) == ("GIF", 3, 4, None)


@settings(max_examples=120, deadline=None)
@given(st.binary(max_size=200), st.sampled_from([data[:12] for data in SEEDS.values()]))
def test_any_bytes_have_an_answer(data: bytes, signature: bytes) -> None:
    for file in (data, signature + data):
        header = probe_start(file)
        if isinstance(header, NeedsMore):
            assert header.nbytes > len(file)
        elif header is not None:
            assert min(header.width, header.height) > 0


def test_it_takes_any_buffer_and_nothing_else() -> None:
    data = SEEDS["02.png"]
    assert probe(memoryview(data)) == probe(bytearray(data)) == probe(data)
    wrong: Any
    for wrong in (memoryview(data)[::2], memoryview(bytes(16)).cast("I")):
        with pytest.raises(ValueError, match="data must be bytes"):
            probe(wrong)
    for wrong in ("text", None):
        with pytest.raises(TypeError):
            probe(wrong)
