"""Our own JPEG decoder: Pillow's bytes on every instruction set, also row by row, and silence where it is not sure."""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import mutated
from numpy.typing import NDArray
from PIL import Image

from rtp_mm import _core
from rtp_mm.config import load_settings
from rtp_mm.errors import WrongFormatError
from rtp_mm.media.image import decode, open_image
from rtp_mm.media.jpeg import read_jpeg
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.types import Blob, CropBox, MMUrlType, PreprocessOptions

LIMITS = {"max_pixels": 10**9, "allow_truncated": False, "exif_transpose": False}
SAMPLINGS = ["4:4:4", "4:2:2", "4:2:0", "4:4:0"]
MUTATIONS = int(os.environ.get("RTP_MM_MUTATIONS", "300"))


def encode(image: Image.Image, sampling: str = "4:2:0", **options: Any) -> bytes:
    """Pillow cannot write 4:4:0, simplejpeg no progressive files."""
    if sampling == "4:4:0":
        pixels = np.ascontiguousarray(np.asarray(image.convert("RGB")))
        return simplejpeg.encode_jpeg(pixels, quality=options.get("quality", 75), colorsubsampling="440")
    file = io.BytesIO()
    image.save(file, "JPEG", subsampling=sampling, **options)
    return file.getvalue()


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def by_ours(data: bytes) -> NDArray[np.uint8] | None:
    """`None`, or the pixels, on all instruction sets alike."""
    if (jpeg := _core.Jpeg.read(data)) is None:
        return None
    first, *others = (jpeg.pixels(level=level) for level in _core.resize_levels())
    for other in others:
        np.testing.assert_array_equal(first, other)
    return first


def picture(photo: NDArray[np.uint8], size: tuple[int, int], noise: float, seed: int) -> Image.Image:
    """A part of a photograph, and random pixels over some of it, whose coefficients are as large as they get."""
    rng = np.random.default_rng(seed)
    height, width, _ = photo.shape
    top, left = rng.integers(height - min(size[1], height) + 1), rng.integers(width - min(size[0], width) + 1)
    part = np.array(Image.fromarray(photo[top:, left:][: size[1], : size[0]]).resize(size))
    is_noise = rng.random(part.shape[:2]) < noise
    part[is_noise] = rng.choice([0, 255], (is_noise.sum(), 3))
    return Image.fromarray(part)


@settings(max_examples=150, deadline=None)
@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    sampling=st.sampled_from(SAMPLINGS),
    quality=st.integers(1, 100),
    noise=st.sampled_from([0.0, 0.0, 0.1, 1.0]),
    is_grey=st.booleans(),
    options=st.sampled_from([{}, {"optimize": True}, {"restart_marker_blocks": 3}, {"restart_marker_rows": 1}]),
    is_progressive=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_pixels_are_pillows(
    photos: dict[str, NDArray[np.uint8]],
    size: tuple[int, int],
    sampling: str,
    quality: int,
    noise: float,
    is_grey: bool,
    options: dict[str, Any],
    is_progressive: bool,
    seed: int,
) -> None:
    image = picture(photos["coffee"], size, noise, seed).convert("L" if is_grey else "RGB")
    data = encode(image, sampling, quality=quality, progressive=is_progressive, **options)
    ours = by_ours(data)
    assert ours is not None or noise or (size[0] <= 4 and sampling in ("4:2:0", "4:2:2"))
    if ours is not None:
        np.testing.assert_array_equal(ours, by_pillow(data))
        np.testing.assert_array_equal(ours, simplejpeg.decode_jpeg(data, "RGB"))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_a_photographs_pixels_are_pillows(photos: dict[str, NDArray[np.uint8]], name: str, sampling: str) -> None:
    for quality, progressive in itertools.product((5, 50, 75, 90, 100), (False, True)):
        data = encode(Image.fromarray(photos[name]), sampling, quality=quality, progressive=progressive)
        np.testing.assert_array_equal(by_ours(data), by_pillow(data))


@settings(max_examples=100, deadline=None)
@given(
    size=st.tuples(st.integers(5, 120), st.integers(1, 120)),
    sampling=st.sampled_from(SAMPLINGS),
    target=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    order=st.sampled_from(["horizontal", "vertical"]),
    filter=st.sampled_from(["nearest", "box", "bilinear", "bicubic", "lanczos"]),
    level=st.sampled_from(_core.resize_levels()),
    progressive=st.booleans(),
)
def test_rows_resized_as_they_are_decoded_are_those_of_the_pixels(
    photos: dict[str, NDArray[np.uint8]],
    size: tuple[int, int],
    sampling: str,
    target: tuple[int, int],
    corners: tuple[float, ...],
    order: Any,
    filter: Any,
    level: str,
    progressive: bool,
) -> None:
    """Of any part of the image."""
    jpeg = _core.Jpeg.read(encode(picture(photos["chelsea"], size, 0, 1), sampling, progressive=progressive))
    assert jpeg is not None
    assert jpeg.shape == (size[1], size[0], 3)
    pixels = jpeg.pixels()
    assert pixels is not None

    def part(a: float, b: float, length: int) -> slice:
        begin, end = sorted((int(a * length), int(b * length)))
        return slice(min(begin, length - 1), max(end, min(begin, length - 1) + 1))

    rows, columns = part(*corners[:2], size[1]), part(*corners[2:], size[0])
    options = {"order": order, "filter": filter, "level": level}
    height, width = 28 * target[0], 28 * target[1]
    expected = _core.resize_patchify(pixels[rows, columns], height, width, 14, 2, **options)
    window = jpeg[..., rows, columns, :]
    np.testing.assert_array_equal(_core.resize_patchify(window, height, width, 14, 2, **options), expected)
    np.testing.assert_array_equal(window.pixels(level=level), pixels[rows, columns])


def uncertain_files(photo: bytes, image: Image.Image) -> dict[str, bytes]:
    """What is another decoder's to judge."""
    frame, scan, table = photo.index(b"\xff\xc0"), photo.index(b"\xff\xda"), photo.index(b"\xff\xdb")

    def changed(at: int, *values: int) -> bytes:
        return photo[:at] + bytes(values) + photo[at + len(values) :]

    restarts = encode(image, restart_marker_rows=1)
    progressive = encode(image, progressive=True)
    last = progressive.rindex(b"\xff\xda")
    return {
        "nothing": b"",
        "no JPEG": b"\x89PNG" + photo[4:],
        "arithmetic coding, progressive": progressive.replace(b"\xff\xc2", b"\xff\xca", 1),
        "a missing scan": progressive[:last] + progressive[-2:],
        "a scan that comes twice": progressive[:-2] + progressive[last:],
        "quantisation between scans": progressive[:last] + photo[table : table + 69] + progressive[last:],
        "CMYK": encode(image.convert("CMYK")),
        "RGB": encode(image, "4:4:4", keep_rgb=True),
        "4:1:1": changed(frame + 11, 0x41),
        "12 bits": changed(frame + 4, 12),
        "arithmetic coding": changed(frame + 1, 0xC9),
        "lossless": changed(frame + 1, 0xC3),
        "no height": changed(frame + 5, 0, 0),
        "a side that libjpeg does not take": changed(frame + 5, 0xFF, 0xDD),
        "a table of 16 bits": changed(table + 4, 0x10),
        "a step of 0": changed(table + 5, 0),
        "a table that there is not": changed(scan + 6, 0x22),
        "spectral selection": changed(scan + 12, 40),
        "half of it": photo[: len(photo) // 2],
        "headers only": photo[: scan + 14],
        "no end": photo[:-2],
        "bytes ahead of the end": photo[:-2] + b"\x12\x34" + photo[-2:],
        "a wrong restart": restarts.replace(b"\xff\xd1", b"\xff\xd3", 1),
        "a missing restart": restarts.replace(b"\xff\xd1", b"", 1),
        "an unasked restart": photo[: scan + 200] + b"\xff\xd0" + photo[scan + 200 :],
        "fill bytes": photo[:2] + b"\xff" + photo[2:],
        "a second scan": photo[:-2] + photo[scan:],
    }


BLACK = Image.new("RGB", (9, 9))


@pytest.mark.parametrize("kind", uncertain_files(encode(BLACK), BLACK))
def test_an_uncertain_file_is_left_to_others(photos: dict[str, NDArray[np.uint8]], kind: str) -> None:
    image = Image.fromarray(photos["chelsea"])
    data = uncertain_files(encode(image), image)[kind]
    assert by_ours(data) is None
    try:
        expected = by_pillow(data)
    except (OSError, ValueError, SyntaxError):
        with pytest.raises(WrongFormatError):
            decode(data, **LIMITS)
    else:
        np.testing.assert_array_equal(decode(data, **LIMITS), expected)


def test_what_follows_the_image_is_not_looked_at(photos: dict[str, NDArray[np.uint8]]) -> None:
    data = encode(Image.fromarray(photos["chelsea"]))
    np.testing.assert_array_equal(by_ours(data + b"\0 after the end \xff\xda"), by_pillow(data))


def test_coefficients_that_no_pixels_have_are_left_to_others(photos: dict[str, NDArray[np.uint8]]) -> None:
    """Steps of 255 for coefficients that were divided by 1: decoders overflow in ways of their own."""
    data = encode(Image.fromarray(photos["chelsea"]), quality=100)
    table = data.index(b"\xff\xdb")
    assert by_ours(data[: table + 5] + bytes([255]) * 64 + data[table + 69 :]) is None


def test_a_usual_file_takes_no_other_decoder(
    photos: dict[str, NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor memory for its pixels: a silent way back to the others would cost what it is there for."""
    if "avx2" not in _core.resize_levels():
        pytest.skip("libjpeg-turbo is faster here")
    for name in ("decode_jpeg", "_decode"):
        monkeypatch.setattr(f"rtp_mm.media.image.{name}", None)
    for progressive in (False, True):
        data = encode(Image.fromarray(photos["chelsea"]), progressive=progressive)
        np.testing.assert_array_equal(decode(data, **LIMITS), by_pillow(data))
        with open_image(data, **LIMITS) as image:
            assert isinstance(image.give(lambda form: form), _core.Jpeg)


def test_another_size_than_pillow_read_is_left_to_pillow(photos: dict[str, NDArray[np.uint8]]) -> None:
    data = encode(Image.fromarray(photos["chelsea"]))
    assert read_jpeg(data, 451, 299) is None
    assert (read_jpeg(data, 451, 300) is None) == ("avx2" not in _core.resize_levels())


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS[:3])
def test_a_damaged_file_is_pillows_or_left_to_others(
    photos: dict[str, NDArray[np.uint8]], sampling: str, progressive: bool
) -> None:
    """RTP_MM_MUTATIONS: how many, of each."""
    image = Image.fromarray(photos["rocket"]).resize((75, 50))
    data = encode(image, sampling, quality=60, progressive=progressive)
    rng = np.random.default_rng(SAMPLINGS.index(sampling))
    decoded = 0
    for _ in range(MUTATIONS):
        damaged = mutated(data, rng, head=len(data))
        if (ours := by_ours(damaged)) is not None:
            np.testing.assert_array_equal(ours, by_pillow(damaged))
            decoded += 1
    assert decoded > MUTATIONS / 50


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("crop", [None, CropBox(0.0, 0.0, 0.5, 0.3), CropBox(0.2, 0.6, 1.0, 1.0)], ids=str)
@pytest.mark.parametrize("allow_truncated", [False, True])
def test_a_damaged_files_rows_are_those_of_its_pixels(
    photos: dict[str, NDArray[np.uint8]],
    progressive: bool,
    crop: CropBox | None,
    allow_truncated: bool,
) -> None:
    """Or its error is the same, also where no row of the part that was asked for is damaged."""
    config = ImageProcessorConfig(14, 2, 2, 3136, 100352, (0.5,) * 3, (0.5,) * 3)
    preprocessor = ImagePreprocessor.from_config(config, load_settings(mm_allow_truncated_images=allow_truncated))
    options = PreprocessOptions(crop=crop)

    def outcome(make: Callable[[], NDArray[np.uint8]]) -> NDArray[np.uint8] | str:
        try:
            return make()
        except WrongFormatError as error:
            return str(error)

    def rows(data: bytes | NDArray[np.uint8]) -> NDArray[np.uint8]:
        return preprocessor(Blob(data, b"", ""), MMUrlType.IMAGE, options).rows

    def rows_of_pixels(data: bytes) -> NDArray[np.uint8]:
        return rows(decode(data, max_pixels=10**9, allow_truncated=allow_truncated, exif_transpose=False)[None])

    data = encode(Image.fromarray(photos["astronaut"]).resize((150, 111)), progressive=progressive)
    rng = np.random.default_rng(5)
    cut = [data[: len(data) * i // 10] for i in range(1, 10)]
    late = [data[:-40] + data[-40 + i :] for i in range(1, 20)]
    outcomes = set()
    for damaged in (data, *cut, *late, *(mutated(data, rng, head=len(data)) for _ in range(60))):
        expected, found = outcome(partial(rows_of_pixels, damaged)), outcome(partial(rows, damaged))
        outcomes.add((type(expected), _core.Jpeg.read(damaged) is not None))
        np.testing.assert_equal(found, expected)
    assert {kind for kind, _ in outcomes} == {np.ndarray, str}
    assert {is_read for _, is_read in outcomes} == {True, False}


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_pixels_are_read_only(photos: dict[str, NDArray[np.uint8]], options: dict[str, Any]) -> None:
    assert not decode(encode(Image.fromarray(photos["chelsea"]), **options), **LIMITS).flags.writeable


@pytest.mark.parametrize(
    ("rows", "columns"),
    [(slice(0, 0), slice(0, 8)), (slice(0, 8), slice(4, 2)), (slice(0, 8, 2), slice(0, 8)), (slice(60, 70), slice(8))],
)
def test_no_part_is_empty_or_has_steps(rows: slice, columns: slice) -> None:
    jpeg = _core.Jpeg.read(encode(Image.new("RGB", (50, 40))))
    assert jpeg is not None
    with pytest.raises(ValueError, match="rows and columns of a part must be some, one after another, got slice"):
        jpeg[..., rows, columns, :]
    with pytest.raises(ValueError, match=r"Jpeg: a part is \[\.\.\., rows, columns, :\], got "):
        jpeg[..., slice(0, 8), slice(0, 8), slice(0, 1)]


def test_a_file_that_is_no_bytes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Jpeg\.read: data must be bytes"):
        _core.Jpeg.read(np.zeros((2, 2), np.uint8))
