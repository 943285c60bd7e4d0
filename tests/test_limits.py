"""Every limit just below, at and just above it. Of the options' own bounds all are tried; those of queues stand with
the engine's tests, of bytes in flight in `test_admission.py`, of what PNG holds beside its pixels in `test_png.py`.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import annotated_types
import grpc
import numpy as np
import pytest
from animations import animate
from clips import encode, moving
from fake_engine import serving
from numpy.typing import NDArray
from server_calls import call_raw, request
from test_error_table import REFUSED, WRONG_FORMAT, data_url, item, message, png, said, served
from waiting import until
from watched_engine import watched
from web_source import Source

from rtp_mm.config import Settings, load_settings
from rtp_mm.engine.caches import CountedCache
from rtp_mm.errors import MAX_DETAILS_BYTES, ProcessError, StartError, WrongFormatError
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.models.registry import load_model
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.server.app import grpc_options
from rtp_mm.server.http import _seconds
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

ANY = PreprocessOptions()


def bounds() -> list[tuple[str, int, int]]:
    """Option, the last value that it takes, and the first that it does not."""
    found = []
    for name, field in Settings.model_fields.items():
        for bound in field.metadata:
            match bound:
                case annotated_types.Gt(int(limit)):
                    found.append((name, limit + 1, limit))
                case annotated_types.Ge(int(limit)):
                    found.append((name, limit, limit - 1))
                case annotated_types.Lt(int(limit)):
                    found.append((name, limit - 1, limit))
                case annotated_types.Le(int(limit)):
                    found.append((name, limit, limit + 1))
    return found


def test_bounds_are_found() -> None:
    assert {("start_port", 1, 0), ("start_port", 65534, 65535), ("mm_fetch_retries", 10, 11)} <= set(bounds())
    assert len(bounds()) > 12


@pytest.mark.parametrize(("name", "last", "beyond"), bounds())
def test_an_option_takes_its_bound_and_nothing_beyond(name: str, last: int, beyond: int) -> None:
    assert getattr(load_settings([f"--{name}={last}"]), name) == last
    with pytest.raises(StartError, match=rf"{name.upper()}='{beyond}'"):
        load_settings([f"--{name}={beyond}"])


@pytest.fixture(scope="module")
def model(tiny_qwen2_5_vl: Path) -> MultimodalMixin:
    return load_model(
        load_settings(None, checkpoint_path=tiny_qwen2_5_vl, act_type="fp32", device="cpu", mm_max_pixels=40_000)
    )


async def test_pixels(model: MultimodalMixin) -> None:
    async with served(model) as server:
        for width in (199, 200):
            await call_raw(server.grpc_address, message(item(data_url(png(width, 200)))).SerializeToString())
        pattern = "40200.*40000.*MM_MAX_PIXELS"
        await said(server, message(item(data_url(png(201, 200)))), WRONG_FORMAT, pattern)


@pytest.fixture(scope="module")
def frames(photos: dict[str, NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    return moving(photos["chelsea"], 49)


def taken(data: bytes | NDArray[np.uint8], options: PreprocessOptions, **limits: int) -> int:
    """Frames of a clip that a preprocessor with these limits takes."""
    settings = load_settings(None, **limits)
    media = MediaPreprocessor.from_checkpoint(Path("/nowhere"), PUBLISHED_PROCESSOR, settings)
    mm_type = MMUrlType.VIDEO if isinstance(data, bytes) else MMUrlType.TENSOR
    return 2 * media(Blob(data, b"", "clip"), mm_type, options).grid_thw[0]


@pytest.mark.parametrize("kind", ["file", "animation", "tensor"])
def test_frames(kind: str, frames: list[NDArray[np.uint8]]) -> None:
    """6 are taken of each."""
    options = PreprocessOptions(min_frames=6)
    data = {
        "file": lambda: encode(frames[:48]),
        "animation": lambda: animate(frames[:20], "WEBP", 50),
        "tensor": lambda: np.stack(frames[:6]),
    }[kind]()
    for limit in (7, 6):
        assert taken(data, options, mm_max_frames=limit) == 6
    with pytest.raises(WrongFormatError, match=r"6 frames, over the limit of 5 \(MM_MAX_FRAMES\)"):
        taken(data, options, mm_max_frames=5)


@pytest.mark.parametrize("kind", ["file", "animation"])
def test_seconds_of_a_clip(kind: str, frames: list[NDArray[np.uint8]]) -> None:
    """2, at 24 frames a second or in steps of 50 ms."""

    def clip(beyond: int) -> bytes:
        return encode(frames[: 48 + beyond]) if kind == "file" else animate(frames[: 40 + beyond], "WEBP", 50)

    for beyond in (-1, 0):
        assert taken(clip(beyond), ANY, mm_max_video_seconds=2) == 4
    with pytest.raises(WrongFormatError, match=r"a video of 2\.[01] s, over the limit of 2 s \(MM_MAX_VIDEO_SECONDS\)"):
        taken(clip(1), ANY, mm_max_video_seconds=2)


def padded(size: int) -> bytes:
    """A PNG file of that many bytes; what follows its end is nobody's."""
    file = png(60, 60)
    return file + bytes(size - len(file))


@pytest.mark.parametrize("where", ["data", "file", "http"])
async def test_bytes_of_an_image_file(model: MultimodalMixin, tmp_path: Path, where: str) -> None:
    async with (
        Source.serving() as source,
        served(model, mm_image_max_file_size_kb=1, mm_allow_private_network=True) as server,
    ):

        def url(size: int) -> str:
            if where == "data":
                return data_url(padded(size))
            if where == "http":
                return source.answers_with(f"/{size}", body=padded(size))
            path = tmp_path / f"{size}.png"
            path.write_bytes(padded(size))
            return str(path)

        for size in (1023, 1024):
            await call_raw(server.grpc_address, message(item(url(size))).SerializeToString())
        await said(server, message(item(url(1025))), WRONG_FORMAT, "1024.*MM_IMAGE_MAX_FILE_SIZE_KB")


async def test_bytes_of_a_clips_file(model: MultimodalMixin, frames: list[NDArray[np.uint8]], tmp_path: Path) -> None:
    """Not those of an image's; an item that does not say what it is counts as what its bytes tell."""
    clip = encode([frame[:112, :112] for frame in frames[:4]])
    kilobytes = -(-len(clip) // 1024)
    limits = {"mm_video_max_file_size_kb": kilobytes, "mm_image_max_file_size_kb": 1}
    async with served(model, **limits) as server:
        for beyond in (-1, 0, 1):
            path = tmp_path / f"{beyond}.mp4"
            path.write_bytes(clip + bytes(1024 * kilobytes + beyond - len(clip)))
            for kind in (MMUrlType.VIDEO, MMUrlType.DEFAULT):
                request_ = message(item(str(path), kind, width=112, height=56))
                if beyond <= 0:
                    await call_raw(server.grpc_address, request_.SerializeToString())
                else:
                    pattern = f"{1024 * kilobytes + 1} bytes.*limit of {1024 * kilobytes}.*MM_VIDEO_MAX_FILE_SIZE_KB"
                    await said(server, request_, WRONG_FORMAT, pattern)


@pytest.mark.parametrize("nbytes", [99, 100, 101])
def test_bytes_of_a_cache(nbytes: int) -> None:
    """200 in all, of which a value may have half; 100 are there, and used last."""
    cache = CountedCache[str, Any](200, largest_share=1 / 2)
    cache.put("old", np.zeros(100, np.uint8))
    cache.put("kept", np.zeros(100, np.uint8))
    assert cache.get("old") is not None
    cache.put("new", np.zeros(nbytes, np.uint8))
    assert ("new" in cache) == cache.has_room_for(nbytes) == (nbytes <= 100)
    assert "old" in cache
    assert ("kept" in cache) == (nbytes > 100)
    assert cache.stats().used_bytes <= 200


@pytest.mark.parametrize("patches", [31, 32, 33])
async def test_patches_of_a_batch(patches: int, tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    """Two images of 16 fit into a batch of 32 and 33, and not of 31."""
    async with watched(tiny_qwen2_5_vl, vit_max_batch_patches=patches) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        others = [w.ask(url) for url in urls[1:3]]
        await until(lambda: w.engine.stats().items_waiting == 2)
        w.may_forward.set()
        await asyncio.gather(first, *others)
        assert sorted(w.forwards) == ([1, 2] if patches >= 32 else [1, 1, 1])


async def test_redirects(model: MultimodalMixin) -> None:
    options = {"mm_max_redirects": 2, "mm_allow_private_network": True}
    async with Source.serving() as source, served(model, **options) as server:
        source.answers_with("/0", body=png(60, 60))
        urls = [source.redirects(f"/{hops}", f"/{hops - 1}") for hops in (1, 2, 3)]
        for url in urls[:2]:
            await call_raw(server.grpc_address, message(item(url)).SerializeToString())
        await said(server, message(item(urls[2])), REFUSED, "more than 2 redirects")


@pytest.mark.parametrize(("ratio", "is_served"), [(199, True), (200, True), (201, False)])
async def test_aspect_ratio(model: MultimodalMixin, ratio: int, is_served: bool) -> None:
    async with served(model) as server:
        request_ = message(item(data_url(png(ratio * 2, 2))))
        if is_served:
            await call_raw(server.grpc_address, request_.SerializeToString())
        else:
            await said(server, request_, WRONG_FORMAT, "aspect ratio over the limit of 200")


async def test_a_request_message() -> None:
    assert dict(grpc_options(load_settings(None)))["grpc.max_receive_message_length"] == 1 << 30
    largest = 1 << 20
    overhead = len(request("img:1".ljust(largest)).SerializeToString()) - largest

    def of_size(size: int) -> bytes:
        data: bytes = request("img:1".ljust(size - overhead)).SerializeToString()
        assert len(data) == size
        return data

    async with serving(mm_max_message_mb=1) as server:
        for size in (largest - 1, largest):
            await call_raw(server.grpc_address, of_size(size))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_raw(server.grpc_address, of_size(largest + 1))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert len(server.engine.asked) == 2


@pytest.mark.parametrize(("beyond", "is_cut"), [(-1, False), (0, False), (1, True)])
def test_an_error_message(beyond: int, is_cut: bool) -> None:
    text = "x" * (MAX_DETAILS_BYTES - len("[MM_PROCESS_ERROR] ") + beyond)
    message_ = ProcessError(text).wire_message
    assert message_.endswith("...") is is_cut
    assert len(message_) == min(MAX_DETAILS_BYTES, MAX_DETAILS_BYTES + beyond)


@pytest.mark.parametrize(
    ("text", "seconds"), [("59.9", 59.9), ("60", 60.0), ("60.1", None), ("1e-3", 1e-3), ("0", None)]
)
def test_seconds_of_a_profile(text: str, seconds: float | None) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize(("number", "is_known"), [(-1, False), (0, True), (5, True), (6, False)])
async def test_multimodal_type(number: int, is_known: bool) -> None:
    items: Any = [item("img:1", MMUrlType.DEFAULT)]
    items[0].multimodal_type = number
    async with serving() as server:
        if is_known:
            await call_raw(server.grpc_address, message(*items).SerializeToString())
        else:
            await said(server, message(*items), WRONG_FORMAT, f"multimodal_type {number} is none of")
