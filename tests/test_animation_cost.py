"""What an animation costs: limits come before pixels, and a file is decoded once, as far as it is needed."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from animations import animate, by_pillow, riff_chunk
from clips import moving
from numpy.typing import NDArray
from PIL import GifImagePlugin, Image
from test_animation import apng, webp

from rtp_mm import _core
from rtp_mm.config import load_settings
from rtp_mm.errors import WrongFormatError
from rtp_mm.media import animation
from rtp_mm.media.animation import open_animation
from rtp_mm.media.clip import ClipLimits
from rtp_mm.media.probe import probe
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

LIMITS = ClipLimits(max_pixels=10**6, max_seconds=10**9, max_animation_pixels=10**9)
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def frames(photos: dict[str, Pixels]) -> list[Pixels]:
    return moving(photos["chelsea"])


@pytest.fixture
def unopened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow is not asked."""
    monkeypatch.setattr(animation.Image, "open", None)


@pytest.fixture
def wide_webp() -> bytes:
    """4 KB that claim 80 frames of 1048640 x 48."""
    pixel = io.BytesIO()
    Image.new("RGBA", (1, 1)).save(pixel, "WEBP", lossless=True)
    size = struct.pack("<I", 1048639)[:3] + struct.pack("<I", 47)[:3]
    frame = riff_chunk(b"ANMF", bytes(12) + b"\x64\0\0\0" + pixel.getvalue()[12:])
    chunks = [riff_chunk(b"VP8X", b"\x12\0\0\0" + size), riff_chunk(b"ANIM", bytes(6)), frame * 80]
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def test_limits_come_before_decoding(unopened: None, wide_webp: bytes, frames: list[Pixels], tmp_path: Path) -> None:
    assert len(wide_webp) < 4500
    data = animate(frames[:10], "WEBP", 500)
    size = 112 * 80
    for limits, reason in [
        ((size - 1, 5, 10 * size), "MM_MAX_PIXELS"),
        ((size, 4, 10 * size), "MM_MAX_VIDEO_SECONDS"),
        ((size, 5, 10 * size - 1), r"10 frames of 112x80 are 89600 pixels, over .* 89599 \(MM_MAX_ANIMATION_PIXELS\)"),
    ]:
        with pytest.raises(WrongFormatError, match=reason), open_animation(data, ClipLimits(*limits)):
            pass
    for pixels in (10 * size, 10 * size + 1):
        with open_animation(data, ClipLimits(size, 5, pixels)) as clip:
            assert (clip.frames, clip.fps, clip.decoded) == (10, 2, 0)
    settings = load_settings(None, mm_max_frames=8, mm_max_patches_per_item=1000)
    for file, options, reason in [
        (wide_webp, PreprocessOptions(max_frames=8), "aspect ratio"),
        (data, PreprocessOptions(max_frames=10), "MM_MAX_FRAMES"),
        (data, PreprocessOptions(width=280, height=280, max_frames=8), "MM_MAX_PATCHES_PER_ITEM"),
    ]:
        preprocess = MediaPreprocessor.from_checkpoint(tmp_path, PUBLISHED_PROCESSOR, settings)
        with pytest.raises(WrongFormatError, match=reason):
            preprocess(Blob(file, b"", ""), MMUrlType.VIDEO, options)


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_nothing_behind_the_last_chosen_frame_is_decoded(kind: str, frames: list[Pixels]) -> None:
    """Damage there is found by who reads it."""
    good = animate(frames[:6], kind, 50)
    damaged = bytearray(good)
    # bits of a GIF's codes, a method of zlib's, VP8L's tables
    marker, offset = {"GIF": (b",\0\0\0\0", 10 + 768), "PNG": (b"fdAT", 8), "WEBP": (b"VP8L", 13)}[kind]
    damage = damaged.rindex(marker) + offset
    length = 100 if kind == "WEBP" else 1
    damaged[damage : damage + length] = b"\xff" * length
    whole = by_pillow(good)[2]
    with open_animation(bytes(damaged), LIMITS) as clip:
        assert all(map(np.array_equal, clip.read([1, 4]), [whole[1], whole[4]]))
        assert clip.decoded == 5
    with pytest.raises(WrongFormatError, match="broken image"), open_animation(bytes(damaged), LIMITS) as clip:
        list(clip.read([5]))


def test_a_file_is_decoded_once(monkeypatch: pytest.MonkeyPatch, frames: list[Pixels]) -> None:
    """Frame by frame, in order."""
    sought: list[int] = []
    opened = Image.open

    def open_(*arguments: Any, **options: Any) -> Any:
        image = opened(*arguments, **options)
        seek = image.seek
        image.seek = lambda index: (sought.append(index), seek(index))  # type: ignore[method-assign]
        return image

    monkeypatch.setattr(animation.Image, "open", open_)
    with open_animation(animate(frames[:6], "PNG", 50), LIMITS) as clip:
        list(clip.read([0, 3]))
    assert sought == [0, 1, 2, 3]


def test_a_gif_is_not_gone_through_to_count_its_frames(monkeypatch: pytest.MonkeyPatch, frames: list[Pixels]) -> None:
    """Pillow does so in Python, block by block."""
    monkeypatch.delattr(GifImagePlugin.GifImageFile, "n_frames")
    with open_animation(animate(frames[:3], "GIF", 50), LIMITS) as clip:
        assert len(list(clip.read([0, 2]))) == 2


def gif_of(frames: int) -> bytes:
    """Of a pixel each."""
    return b"GIF89a\1\0\1\0\0\0\0" + b",\0\0\0\0\1\0\1\0\0\7\3\x80\0\x81\0" * frames + b";"


def test_more_frames_than_the_probe_looks_at_are_counted() -> None:
    gif = gif_of(70_000)
    header = probe(gif)
    assert header is not None
    assert header.frames is None
    assert len(_core.animation(gif)[2]) == 70_000


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_frames_are_counted_up_to_a_limit(kind: str) -> None:
    """A file that holds nothing but their headers would take a server's memory for their times."""
    most = 1 << 19
    make = {"GIF": gif_of, "PNG": lambda n: apng([n], n), "WEBP": lambda n: webp(riff_chunk(b"ANMF", bytes(16)) * n)}
    for frames in (most - 1, most):
        assert len(_core.animation(make[kind](frames))[2]) == frames
    with pytest.raises(ValueError, match="it holds over 524288 frames"):
        _core.animation(make[kind](most + 1))
