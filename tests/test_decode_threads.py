"""Decoders share the cores: threads where a decode is alone, one each where as many run as there are cores."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sounds
from animations import animate
from clips import KINDS, encode, moving
from numpy.typing import NDArray
from scripted_worker import ScriptedPreprocessor, script
from waiting import until
from worker_pools import IMAGE, NO_OPTIONS, new_pool, run

from rtp_mm.config import load_settings
from rtp_mm.cores import CoreShare
from rtp_mm.engine import worker_pool, workers
from rtp_mm.engine.workers import PreprocessWorkers
from rtp_mm.errors import WrongFormatError
from rtp_mm.media.audio import CONTAINERS, _frames, _stream
from rtp_mm.media.clip import ClipLimits
from rtp_mm.media.container import opened
from rtp_mm.media.decode_threads import DECODE_THREADS
from rtp_mm.media.image import decode
from rtp_mm.media.video import open_video_header
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, MMUrlType

Pixels = NDArray[np.uint8]
THREADED = ["h264 mp4, B-frames", "hevc mp4", "vp9 webm", "av1 mp4", "mpeg4 mp4", "mjpeg mov"]


@pytest.fixture(autouse=True)
def _granted_before() -> Any:
    before = DECODE_THREADS.count
    yield
    DECODE_THREADS.grant(before)


@pytest.fixture(scope="module")
def frames(photos: dict[str, Pixels]) -> list[Pixels]:
    return moving(photos["chelsea"], 24)


@pytest.fixture(params=["h264", "avif"])
def clip(request: pytest.FixtureRequest, frames: list[Pixels], tmp_path: Path) -> Path:
    path = tmp_path / f"clip.{request.param}"
    path.write_bytes(encode(frames) if request.param == "h264" else animate(frames[:8], "AVIF", 50))
    return path


@pytest.mark.parametrize(
    ("cores", "users", "threads"),
    [(16, 1, 4), (16, 4, 4), (16, 5, 3), (16, 8, 2), (16, 9, 1), (16, 16, 1), (16, 99, 1), (2, 1, 2), (1, 1, 1)],
)
def test_no_more_threads_than_cores_but_one_for_each(cores: int, users: int, threads: int) -> None:
    assert CoreShare(cores).among(users) == threads
    assert threads * users <= max(cores, users)


async def test_a_worker_decodes_on_its_share_of_the_cores(clip: Path, tmp_path: Path) -> None:
    async with new_pool(tmp_path, count=2, cores=CoreShare(6)) as pool:

        async def threads() -> int:
            return int((await run(pool, script("decode", path=str(clip)))).rows.max())

        assert await threads() == 1 + 4  # the worker's own, which waits for them
        stalled = asyncio.create_task(run(pool, script("stall", note=str(tmp_path / "note"))))
        await until((tmp_path / "note").exists)
        assert await threads() == 1 + 3
        stalled.cancel()


async def test_under_load_a_worker_decodes_on_its_own_thread(clip: Path, tmp_path: Path) -> None:
    async with new_pool(tmp_path, cores=CoreShare(1)) as pool:
        assert (await run(pool, script("decode", path=str(clip)))).rows.max() == 1


@pytest.mark.parametrize("local", [0, 1])
async def test_the_setting_is_the_most(local: int, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Part(MultiModalEmbeddingInterface):
        preprocessor = ScriptedPreprocessor(IMAGE, tmp_path / "obstacle")

    for module in (workers, worker_pool):  # in threads, and in processes
        monkeypatch.setattr(module, "available_cores", lambda: 16)
    options = {"use_local_preprocess": local, "mm_preprocess_max_workers": 1}
    counts = []
    for most in (1, 3):
        pool = PreprocessWorkers(Part(), load_settings(None, mm_decode_threads=most, **options))
        idle = len(os.listdir("/proc/self/task")) + 1 if local else 1  # and the one thread that it runs on
        blob = script("decode", path=str(clip))
        counts.append(int((await pool.prepare(blob, MMUrlType.VIDEO, NO_OPTIONS)).value.rows.max()) - idle)
        pool.close()
    assert counts == [0, 3]


@pytest.mark.parametrize("kind", [*THREADED, "avif"])
def test_threads_change_no_byte(kind: str, frames: list[Pixels]) -> None:
    if kind == "avif":
        data = animate(frames[:8], "AVIF", 50)
    else:
        codec, container, options = KINDS[kind]
        data = encode(frames, codec, container, options)
    media = MediaPreprocessor.from_checkpoint(Path("/nowhere"), PUBLISHED_PROCESSOR, load_settings())
    rows = []
    for count in (1, 4):
        DECODE_THREADS.grant(count)
        rows.append(media(Blob(data, b"", kind), MMUrlType.VIDEO, NO_OPTIONS).rows)
    np.testing.assert_array_equal(*rows)


def test_the_setting_is_in_no_cache_key() -> None:
    keys = {
        MediaPreprocessor.from_checkpoint(
            Path("/nowhere"), PUBLISHED_PROCESSOR, load_settings(None, mm_decode_threads=most)
        ).cache_key
        for most in (1, 4)
    }
    assert len(keys) == 1


def test_a_header_is_read_on_the_calling_thread(frames: list[Pixels]) -> None:
    DECODE_THREADS.grant(4)
    before = len(os.listdir("/proc/self/task"))
    with open_video_header(encode(frames), ClipLimits(1 << 20, 60, 0)):
        assert len(os.listdir("/proc/self/task")) == before


@pytest.mark.parametrize(("container", "codec"), [("wv", "wavpack"), ("flac", "flac"), ("ipod", "aac")])
def test_sound_is_decoded_on_the_calling_thread(container: str, codec: str) -> None:
    data = sounds.encode(sounds.sine(2, 44100), 44100, container, codec)
    gc.collect()  # the encoder's own
    before = len(os.listdir("/proc/self/task"))
    with opened(data, CONTAINERS, "sound") as file:
        counts = {len(os.listdir("/proc/self/task")) for _ in _frames(file, _stream(file))}
    assert counts == {before}


def test_heics_reader_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    reader: Any = types.ModuleType("pillow_heif")
    reader.register_heif_opener = lambda decode_threads: told.append(decode_threads)
    monkeypatch.setitem(sys.modules, "pillow_heif", reader)
    for count in (1, 3):
        DECODE_THREADS.grant(count)
        with pytest.raises(WrongFormatError):
            decode(b"\0\0\0\x18ftypheic", max_pixels=100, allow_truncated=False, exif_transpose=False)
    assert told == [1, 3]
