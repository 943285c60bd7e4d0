"""Where a file is decoded is a pure function of its header, the setting and what the device's decoders take."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.media.clip import ClipHeader, ClipLimits
from rtp_mm.media.decode_backend import Choice, choose_for_clip, choose_for_image
from rtp_mm.media.nvdec import nvdec_codecs
from rtp_mm.media.plain_pixels import is_plain, plain_formats
from rtp_mm.media.probe import probe
from rtp_mm.media.video import open_video_header
from rtp_mm.models.registry import load_model
from tests.clips import encode, moving
from tests.stand_in_decoder import decoders
from tests.turned_images import TURNED

LIMITS = ClipLimits(1 << 24, 3600, 1 << 32)
ON_DEVICE, ON_CPU = Choice(True), Choice(False)
CLIP = ClipHeader("h264", "yuv420p", 2, 1920, 1080, 0, True)


def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def with_alpha(photo: Image.Image) -> Image.Image:
    image = photo.copy()
    image.putalpha(Image.linear_gradient("L").resize(photo.size))
    return image


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    """A PNG with another chunk behind its header."""
    return png[:33] + struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) + png[33:]


def two_frames(photo: Image.Image, image_format: str) -> bytes:
    return saved(photo, image_format, save_all=True, append_images=[photo.rotate(90)])


def sixteen_bits(_: Image.Image) -> Image.Image:
    return Image.fromarray((np.arange(64 * 48) * 21 % 65536).astype(np.uint16).reshape(48, 64))


Make = Callable[[Image.Image], bytes]

PLAIN: dict[str, Make] = {
    "jpeg": lambda p: saved(p, "JPEG"),
    "jpeg, 4:4:4": lambda p: saved(p, "JPEG", subsampling=0),
    "jpeg, 4:2:2, progressive": lambda p: saved(p, "JPEG", subsampling=1, progressive=True),
    "jpeg, 4:1:1": lambda p: saved(p, "JPEG", subsampling="4:1:1"),
    "jpeg, restarts, optimised": lambda p: saved(p, "JPEG", restart_marker_rows=1, optimize=True, quality=30),
    "jpeg, one pixel": lambda p: saved(p.crop((0, 0, 1, 1)), "JPEG"),
    "jpeg, odd sides": lambda p: saved(p.crop((0, 0, 37, 23)), "JPEG"),
    "jpeg, grey": lambda p: saved(p.convert("L"), "JPEG"),
    "jpeg, exif": lambda p: saved(p, "JPEG", exif=turned()),
    "jpeg, icc": lambda p: saved(p, "JPEG", icc_profile=b"x" * 300),
    "png": lambda p: saved(p, "PNG"),
    "png, grey": lambda p: saved(p.convert("L"), "PNG"),
    "png, black and white": lambda p: saved(p.convert("1"), "PNG"),
    "png, palette": lambda p: saved(p.convert("P"), "PNG"),
    "png, palette of 4 bits": lambda p: saved(p.quantize(13), "PNG", bits=4),
    "png, exif": lambda p: saved(p, "PNG", exif=turned()),
    "png, gamma": lambda p: with_chunk(saved(p, "PNG"), b"gAMA", struct.pack(">I", 22727)),
    "webp": lambda p: saved(p, "WEBP"),
    "webp, lossless": lambda p: saved(p, "WEBP", lossless=True),
    "webp, exif": lambda p: saved(p, "WEBP", exif=turned()),
    "tiff": lambda p: saved(p, "TIFF"),
    "tiff, grey": lambda p: saved(p.convert("L"), "TIFF"),
    "tiff, lzw": lambda p: saved(p, "TIFF", compression="tiff_lzw"),
    "tiff, deflate": lambda p: saved(p, "TIFF", compression="tiff_deflate"),
    "jpeg 2000": lambda p: saved(p, "JPEG2000"),
    "jpeg 2000, lossy": lambda p: saved(p, "JPEG2000", irreversible=True, quality_mode="rates", quality_layers=[20]),
    "jpeg 2000, grey": lambda p: saved(p.convert("L"), "JPEG2000"),
    "jpeg 2000, codestream": lambda p: saved(p, "JPEG2000", no_jp2=True),
}
NOT_PLAIN: dict[str, Make] = {
    "jpeg, cmyk": lambda p: saved(p.convert("CMYK"), "JPEG"),
    "jpeg, rgb": lambda p: saved(p, "JPEG", keep_rgb=True),
    "jpeg, cut off": lambda p: saved(p, "JPEG")[:-200],
    "jpeg, trailing bytes": lambda p: saved(p, "JPEG") + bytes(100),
    "png, alpha": lambda p: saved(with_alpha(p), "PNG"),
    "png, grey and alpha": lambda p: saved(with_alpha(p).convert("LA"), "PNG"),
    "png, transparent colour": lambda p: saved(p, "PNG", transparency=p.getpixel((0, 0))),
    "png, transparent grey": lambda p: saved(p.convert("L"), "PNG", transparency=p.convert("L").getpixel((0, 0))),
    "png, transparent in palette": lambda p: saved(p.convert("P"), "PNG", transparency=p.convert("P").getpixel((0, 0))),
    "png, 16 bits": lambda p: saved(sixteen_bits(p), "PNG"),
    "png, animated": lambda p: two_frames(p, "PNG"),
    "png, cut off": lambda p: saved(p, "PNG")[:-100],
    "webp, alpha": lambda p: saved(with_alpha(p), "WEBP"),
    "webp, lossless, alpha": lambda p: saved(with_alpha(p), "WEBP", lossless=True),
    "webp, animated": lambda p: two_frames(p, "WEBP"),
    "tiff, alpha": lambda p: saved(with_alpha(p), "TIFF"),
    "tiff, palette": lambda p: saved(p.convert("P"), "TIFF"),
    "tiff, cmyk": lambda p: saved(p.convert("CMYK"), "TIFF"),
    "tiff, turned": lambda p: saved(p, "TIFF", tiffinfo={274: 6}),
    "tiff, 16 bits": lambda p: saved(sixteen_bits(p), "TIFF"),
    "jpeg 2000, alpha": lambda p: saved(with_alpha(p), "JPEG2000"),
}


@pytest.fixture(scope="module")
def small(photos: dict[str, NDArray[np.uint8]]) -> Image.Image:
    return Image.fromarray(photos["chelsea"]).resize((64, 48))


def chosen(data: bytes, setting: Any = "gpu", *, exif_transpose: bool = False) -> Choice:
    return choose_for_image(probe(data), data, setting, decoders(), exif_transpose=exif_transpose)


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_images_go_to_the_device(kind: str, small: Image.Image) -> None:
    assert chosen(PLAIN[kind](small)) == ON_DEVICE


@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_what_other_decoders_may_mix_otherwise_is_pillows(kind: str, small: Image.Image) -> None:
    assert chosen(NOT_PLAIN[kind](small)) == Choice(False, "pixels")


@pytest.mark.parametrize("image_format", ["GIF", "BMP", "AVIF", "PPM"])
def test_other_formats_are_pillows(image_format: str, small: Image.Image) -> None:
    assert chosen(saved(small, image_format)) == Choice(False, "format")
    assert chosen(b"no image") == Choice(False, "format")


def test_images_are_on_the_cpu_unless_it_is_said(small: Image.Image) -> None:
    """And nothing is counted: it is no fallback."""
    data = saved(small, "JPEG")
    assert chosen(data, "auto") == chosen(data, "cpu") == ON_CPU
    assert choose_for_image(probe(data), data, "gpu", None, exif_transpose=False) == ON_CPU


@pytest.mark.parametrize("kind", TURNED)
def test_images_that_may_be_turned_are_pillows_where_turning_is_on(kind: str, small: Image.Image) -> None:
    reason = {"avif": "format", "tiff": "pixels"}.get(kind, "exif")  # a TIFF's tag keeps it from being plain
    assert chosen(TURNED[kind](np.asarray(small)), exif_transpose=True) == Choice(False, reason)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "JPEG2000"])
def test_others_go_to_the_device_then_too(image_format: str, small: Image.Image) -> None:
    assert chosen(saved(small, image_format), exif_transpose=True) == ON_DEVICE


@pytest.mark.parametrize("kind", PLAIN)
def test_a_header_that_ends_early_is_not_plain_and_no_error(kind: str, small: Image.Image) -> None:
    data = PLAIN[kind](small)
    header = probe(data)
    assert header is not None
    for length in range(min(200, len(data) - 100)):
        is_plain(data[:length], header.format)
        assert not (header.format in ("JPEG", "PNG") and is_plain(data[:length], header.format))
    generator = np.random.default_rng(len(kind))
    for _ in range(100):
        broken = np.frombuffer(data, np.uint8).copy()
        broken[generator.integers(0, min(300, len(data)), 4)] = generator.integers(0, 256, 4)
        is_plain(broken.tobytes(), header.format)


@pytest.mark.parametrize(
    ("change", "choice"),
    [
        ({}, ON_DEVICE),
        ({"matrix": 6}, ON_DEVICE),
        ({"pixel_format": "yuvj420p"}, ON_DEVICE),
        ({"codec": "mpeg4"}, Choice(False, "codec")),
        ({"matrix": 1}, Choice(False, "matrix")),
        ({"pixel_format": "yuv420p10le"}, Choice(False, "pixels")),
        ({"pixel_format": "yuv444p"}, Choice(False, "pixels")),
        ({"width": 1919}, Choice(False, "pixels")),
        ({"height": 1079}, Choice(False, "pixels")),
        ({"turn": 1}, Choice(False, "container")),
        ({"is_indexed": False}, Choice(False, "container")),
        ({"width": 16, "height": 16}, ON_DEVICE),
        ({"width": 14}, Choice(False, "size")),
        ({"height": 14}, Choice(False, "size")),
        ({"width": 4096, "height": 4096}, ON_DEVICE),
        ({"width": 4098}, Choice(False, "size")),
        ({"height": 4098}, Choice(False, "size")),
    ],
)
def test_a_clip_goes_to_the_device_by_its_header(change: dict[str, Any], choice: Choice) -> None:
    header = CLIP._replace(**change)
    assert choose_for_clip(header, "auto", decoders()) == choose_for_clip(header, "gpu", decoders()) == choice
    assert choose_for_clip(header, "cpu", decoders()) == choose_for_clip(header, "auto", None) == ON_CPU


def test_a_clips_macroblocks_have_a_limit() -> None:
    takes = decoders()
    narrow = takes.codecs[0][1]._replace(max_macroblocks=1920 * 1080 // 256)
    header = CLIP._replace(height=1088)
    takes = type(takes)(takes.library, takes.formats, (("h264", narrow),))
    assert choose_for_clip(CLIP, "auto", takes) == ON_DEVICE
    assert choose_for_clip(header, "auto", takes) == Choice(False, "size")


@pytest.mark.parametrize(
    ("codec", "container", "options", "expected"),
    [
        ("libx264", "mp4", {"bf": "2"}, ClipHeader("h264", "yuv420p", 2, 112, 80, 0, True)),
        ("libx264", "mp4", {"colorspace": "bt709"}, ClipHeader("h264", "yuv420p", 1, 112, 80, 0, True)),
        ("libx264", "avi", {"bf": "2"}, ClipHeader("h264", "yuv420p", 2, 112, 80, 0, False)),
        ("libsvtav1", "mp4", {"preset": "12"}, ClipHeader("av1", "yuv420p", 2, 112, 80, 0, True)),
        ("libvpx-vp9", "webm", {"deadline": "realtime"}, ClipHeader("vp9", "yuv420p", 2, 112, 80, 0, True)),
    ],
)
def test_a_clips_header_is_read(
    codec: str,
    container: str,
    options: dict[str, str],
    expected: ClipHeader,
    photos: dict[str, NDArray[np.uint8]],
) -> None:
    data = encode(moving(photos["chelsea"], 12), codec, container, options)
    with open_video_header(data, LIMITS) as (header, clip):
        assert header == expected
        assert (clip is not None) == expected.is_indexed
        assert clip is None or (clip.frames, clip.decoded) == (12, 1)


def test_a_clips_rotation_is_read(photos: dict[str, NDArray[np.uint8]]) -> None:
    with open_video_header(encode(moving(photos["chelsea"], 4), rotation=90), LIMITS) as (header, clip):
        assert header.turn % 2
        assert clip is not None
        assert (clip.width, clip.height) == (80, 112)
        assert (header.width, header.height) == (112, 80)


def test_formats_of_the_rule_are_the_probes_names() -> None:
    assert plain_formats() == {"JPEG", "PNG", "WEBP", "TIFF", "JPEG2000"}


def test_without_a_driver_there_is_no_video_decoder() -> None:
    if torch.cuda.is_available():
        assert dict(nvdec_codecs()).keys() <= {"h264", "hevc", "vp9", "av1"}
    else:
        assert nvdec_codecs() == ()


def test_a_cpu_has_no_gpu_backend(tiny_qwen2_5_vl: Path) -> None:
    with pytest.raises(StartError, match="MM_DECODE_BACKEND=gpu: the device is cpu"):
        load_model(load_settings(checkpoint_path=tiny_qwen2_5_vl, device="cpu", mm_decode_backend="gpu"))
    for setting in ("auto", "cpu"):
        model = load_model(load_settings(checkpoint_path=tiny_qwen2_5_vl, device="cpu", mm_decode_backend=setting))
        assert model.mm_part.device_preprocessor is None


def test_an_unknown_backend_ends_the_start() -> None:
    with pytest.raises(StartError, match="MM_DECODE_BACKEND='nvdec'"):
        load_settings(mm_decode_backend="nvdec")
