"""Patch rows: byte for byte what the reference resizes to, whatever the file, its size and its mode."""

from __future__ import annotations

import io
import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blake3 import blake3
from numpy.typing import NDArray
from PIL import Image
from transformers import Qwen2VLImageProcessorPil

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError, WrongFormatError
from rtp_mm.media.probe import ImageHeader
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.types import Blob, CropBox, MMUrlType, Patches, PreprocessOptions

PUBLISHED = ImageProcessorConfig(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=3136,
    max_pixels=12845056,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)
PREPROCESS = ImagePreprocessor.from_config(PUBLISHED, load_settings())
NO_OPTIONS = PreprocessOptions()


def blob(data: bytes | NDArray[Any]) -> Blob:
    return Blob(data, blake3(bytes(data)).digest(), "test")


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def rows_of(data: bytes | NDArray[Any], options: PreprocessOptions = NO_OPTIONS) -> Patches:
    return PREPROCESS(blob(data), MMUrlType.IMAGE, options)


def reference(image: Image.Image, min_pixels: int = 3136, max_pixels: int = 12845056) -> Patches:
    """The reference's rows before rescaling and normalisation, one of their two equal frames."""
    processor = Qwen2VLImageProcessorPil(min_pixels=min_pixels, max_pixels=max_pixels)
    output = processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
    values = output["pixel_values"].reshape(-1, 3, 2, 14 * 14)
    np.testing.assert_array_equal(values[:, :, 0], values[:, :, 1])
    rows = values[:, :, 0].astype(np.uint8)
    np.testing.assert_array_equal(rows, values[:, :, 0])  # whole numbers: nothing was lost on the way to bytes
    t, h, w = output["image_grid_thw"][0].tolist()
    return Patches(rows.reshape(len(rows), -1), (t, h, w))


def assert_equal(ours: Patches, theirs: Patches) -> None:
    assert ours.grid_thw == theirs.grid_thw
    assert ours.rows.dtype == np.uint8
    np.testing.assert_array_equal(ours.rows, theirs.rows)


# (width, height): native, multiples of 28 (no resize), one pixel, slim and flat, half factors, up and down.
SIZES = [
    (640, 427),
    (56, 84),
    (1, 1),
    (1, 200),
    (400, 2),
    (42, 98),
    (27, 29),
    (13, 60),
    (333, 517),
    (1000, 10),
    (730, 487),
]


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_rows_are_the_references_bytes_at_native_size(photos: dict[str, NDArray[np.uint8]], name: str) -> None:
    data = encode(Image.fromarray(photos[name]), "JPEG")
    assert_equal(rows_of(data), reference(Image.open(io.BytesIO(data))))


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
def test_rows_are_the_references_bytes_at_any_size(photos: dict[str, NDArray[np.uint8]], size: tuple[int, int]) -> None:
    image = Image.fromarray(photos["coffee"]).resize(size)
    assert_equal(rows_of(encode(image)), reference(image))


@pytest.mark.parametrize("limits", [(3136, 50_000), (200_000, 12845056), (100_352, 100_352)], ids=repr)
def test_rows_are_the_references_bytes_within_other_limits(
    photos: dict[str, NDArray[np.uint8]], limits: tuple[int, int]
) -> None:
    image = Image.fromarray(photos["rocket"])
    options = PreprocessOptions(min_pixels=limits[0], max_pixels=limits[1])
    assert_equal(rows_of(encode(image), options), reference(image, *limits))


@pytest.mark.parametrize(
    ("mode", "format"),
    [("L", "PNG"), ("P", "PNG"), ("RGBA", "PNG"), ("LA", "PNG"), ("1", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG"),
     ("CMYK", "TIFF"), ("RGBA", "WEBP"), ("P", "GIF"), ("RGB", "BMP"), ("RGB", "AVIF"), ("RGB", "JPEG2000")],
)  # fmt: skip
def test_rows_are_the_references_bytes_in_any_mode(
    photos: dict[str, NDArray[np.uint8]], mode: str, format: str
) -> None:
    image = Image.fromarray(photos["astronaut"]).resize((150, 117))
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 2)
    else:
        image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    data = encode(image, format)
    assert_equal(rows_of(data), reference(Image.open(io.BytesIO(data))))


def test_another_filter_or_order_would_be_seen(photos: dict[str, NDArray[np.uint8]]) -> None:
    image = Image.fromarray(photos["chelsea"])
    ours = rows_of(encode(image)).rows
    height, width = 308, 448
    wrong_filter = rows_of(encode(image.resize((width, height), Image.Resampling.BILINEAR))).rows
    turned = rows_of(encode(image.transpose(Image.Transpose.TRANSPOSE))).rows
    raster = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC)).reshape(22, 14, 32, 14, 3)
    raster = raster.transpose(0, 2, 4, 1, 3).reshape(ours.shape)
    for wrong in (wrong_filter, turned, raster):
        assert wrong.shape == ours.shape
        assert (wrong != ours).mean() > 0.1


@pytest.mark.parametrize("rule", ["pillow-12.1", "pillow-12.2", "pillow-13.0"])
def test_a_rule_of_the_pass_order_can_be_fixed(photos: dict[str, NDArray[np.uint8]], rule: str) -> None:
    image = Image.fromarray(photos["chelsea"])  # 451 x 300, shrinks in height only: 448 x 280 is asked for
    options = PreprocessOptions(width=448, height=280)
    ours = ImagePreprocessor.from_config(PUBLISHED, load_settings(mm_resize_order=rule))(
        blob(encode(image)), MMUrlType.IMAGE, options
    )
    between = (451, 280) if rule == "pillow-13.0" else (448, 300)
    assert_equal(ours, reference(image.resize(between, 3).resize((448, 280), 3)))


def test_crop_comes_before_sizing(photos: dict[str, NDArray[np.uint8]]) -> None:
    image = Image.fromarray(photos["rocket"])  # 640 x 427
    options = PreprocessOptions(crop=CropBox(0.25, 0.5, 0.75, 1))
    assert_equal(rows_of(encode(image), options), reference(image.crop((160, 213, 480, 427))))


def test_a_crop_that_needs_no_resizing_is_cut_out_exactly(photos: dict[str, NDArray[np.uint8]]) -> None:
    image = Image.fromarray(photos["astronaut"])  # 512 x 512
    options = PreprocessOptions(crop=CropBox(0, 0, 280 / 512, 140 / 512))
    patches = rows_of(encode(image), options)
    assert patches.grid_thw == (1, 10, 20)
    assert_equal(patches, reference(image.crop((0, 0, 280, 140))))


def test_width_and_height_stand_in_for_the_images_own(photos: dict[str, NDArray[np.uint8]]) -> None:
    data = encode(Image.fromarray(photos["coffee"]))  # 600 x 400
    patches = rows_of(data, PreprocessOptions(width=300, height=310))
    assert patches.grid_thw == (1, 308 // 14, 308 // 14)
    resized = Image.fromarray(photos["coffee"]).resize((308, 308), Image.Resampling.BICUBIC)
    assert_equal(patches, reference(resized))
    with pytest.raises(WrongFormatError, match="aspect ratio"):
        rows_of(data, PreprocessOptions(width=10, height=2010))


def test_limits_that_cross_are_refused(photo: bytes) -> None:
    with pytest.raises(WrongFormatError, match="min_pixels 20000 is over max_pixels 10000"):
        rows_of(photo, PreprocessOptions(min_pixels=20000, max_pixels=10000))
    with pytest.raises(WrongFormatError, match="min_pixels 3136 is over max_pixels 1000"):  # the model's own minimum
        rows_of(photo, PreprocessOptions(max_pixels=1000))


def test_no_option_makes_an_image_larger_than_the_limit(photo: bytes) -> None:
    options = PreprocessOptions(min_pixels=10**9, max_pixels=2**31 - 1)
    with pytest.raises(WrongFormatError, match="over the limit of 178956970"):
        rows_of(photo, options)


def test_a_tensor_takes_the_way_of_an_image(photos: dict[str, NDArray[np.uint8]]) -> None:
    pixels = photos["chelsea"]
    patches = PREPROCESS(blob(pixels[None].copy()), MMUrlType.TENSOR, NO_OPTIONS)
    assert_equal(patches, reference(Image.fromarray(pixels)))


def test_a_tensor_over_the_limit_is_refused() -> None:
    with pytest.raises(WrongFormatError, match=r"20x10 is 200 pixels, over the limit of 199 \(MM_MAX_PIXELS\)"):
        ImagePreprocessor.from_config(PUBLISHED, load_settings(mm_max_pixels=199))(
            blob(np.zeros((1, 10, 20, 3), np.uint8)), MMUrlType.TENSOR, NO_OPTIONS
        )


def test_an_image_that_is_not_as_its_header_tells_is_refused(photo: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the worker itself, of which nothing else than predicted is taken; no header that we know of is so."""
    monkeypatch.setattr("rtp_mm.preprocess.patches.probe", lambda data: ImageHeader("JPEG", 451, 299, 1))
    with pytest.raises(WrongFormatError, match="broken image: its header tells 451x299, a decoder finds 451x300"):
        rows_of(photo)


def test_a_preprocessor_travels_to_a_worker(photo: bytes) -> None:
    copy = pickle.loads(pickle.dumps(PREPROCESS))
    assert copy == PREPROCESS
    assert hash(copy.cache_key) == hash(PREPROCESS.cache_key)
    assert_equal(copy(blob(photo), MMUrlType.IMAGE, NO_OPTIONS), rows_of(photo))


def test_every_rule_is_in_the_cache_key(monkeypatch: pytest.MonkeyPatch) -> None:
    variants = [
        ImagePreprocessor.from_config(PUBLISHED, load_settings(**{option: value}))
        for option, value in [
            ("mm_exif_transpose", True),
            ("mm_allow_truncated_images", True),
            ("mm_max_pixels", 10**6),
            ("mm_resize_order", "pillow-12.2"),
            ("mm_extra_image_formats", "dds"),  # a file without a signature may be taken for one
        ]
    ]
    keys = {p.cache_key for p in (PREPROCESS, *variants)}
    monkeypatch.setattr("PIL.__version__", "0")
    assert len(keys | {PREPROCESS.cache_key}) == 7


OLD = {"min_pixels": 3136, "max_pixels": 1003520, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2}
LAYOUTS = {
    "old": OLD,
    "edges": {"size": {"shortest_edge": 3136, "longest_edge": 1003520}},
    "pixels": {"size": {"min_pixels": 3136, "max_pixels": 1003520}, "min_pixels": None, "max_pixels": None},
    "both": {**OLD, "size": {"shortest_edge": 1, "longest_edge": 2}},  # the top wins, as in transformers
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("nested", [False, True])
def test_all_layouts_of_the_file_say_the_same(tmp_path: Path, layout: str, nested: bool) -> None:
    rules = LAYOUTS[layout]
    if nested:
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": rules}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 1}))  # loses, as in transformers
    else:
        (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "Qwen2VLProcessor"}))
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(rules))
    config = ImageProcessorConfig.from_checkpoint(tmp_path, PUBLISHED)
    assert (config.min_pixels, config.max_pixels) == (3136, 1003520)
    assert (config.patch_size, config.image_mean) == (14, PUBLISHED.image_mean)


def test_what_transformers_saves_is_read(tmp_path: Path) -> None:
    Qwen2VLImageProcessorPil(min_pixels=6272, max_pixels=1003520, image_std=[0.5, 0.5, 0.25]).save_pretrained(tmp_path)
    config = ImageProcessorConfig.from_checkpoint(tmp_path, PUBLISHED)
    assert (config.min_pixels, config.max_pixels, config.image_std) == (6272, 1003520, (0.5, 0.5, 0.25))


def test_a_checkpoint_without_the_file_has_the_published_rules(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert ImageProcessorConfig.from_checkpoint(tmp_path, PUBLISHED) == PUBLISHED
    assert "no preprocessor_config.json" in caplog.text


@pytest.mark.parametrize(
    "rules",
    [
        {"do_resize": False},
        {"do_rescale": False},
        {"do_normalize": False},
        {"resample": 2},
        {"rescale_factor": 1.0},
        {"size": {"height": 224, "width": 224}},
        {"size": {"shortest_edge": 3136}},
        {"size": 224},
        {"min_pixels": 200, "max_pixels": 100},
        {"patch_size": 0},
        {"patch_size": "14"},
        {"image_mean": [0.5]},
        {"image_std": [0.5, 0.5, 0]},
        {"image_std": [0.5, 0.5, "x"]},
    ],
    ids=str,
)
def test_rules_that_we_do_not_follow_stop_the_start(tmp_path: Path, rules: dict[str, Any]) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(rules))
    with pytest.raises(StartError, match=r"preprocessor_config\.json: "):
        ImageProcessorConfig.from_checkpoint(tmp_path, PUBLISHED)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_broken_file_stops_the_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(StartError, match=r"preprocessor_config\.json"):
        ImageProcessorConfig.from_checkpoint(tmp_path, PUBLISHED)


def test_a_tower_of_other_patches_is_named() -> None:
    PUBLISHED.check(14, 2, 2)
    with pytest.raises(StartError, match=r"\(16, 2, 2\) in its config\.json, \(14, 2, 2\) for its image processor"):
        PUBLISHED.check(16, 2, 2)


@pytest.mark.parametrize("padding", [0, 1 << 24], ids=["short", "long"])
def test_a_tiff_that_pillow_turns_unasked_is_what_it_makes_of_it(padding: int) -> None:
    """By the orientation in its XMP."""
    file = io.BytesIO()
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 192, 3), np.uint8))
    photo.save(file, "TIFF", tiffinfo={700: b'<x tiff:Orientation="6"/>'})
    data = file.getvalue() + bytes(padding)
    expected = reference(Image.open(io.BytesIO(data)).convert("RGB"))
    assert_equal(rows_of(data), expected)
