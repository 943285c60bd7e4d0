"""The engine under load: one fetch, decode and forward for all who want the same, limits, deadlines, no leaks."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from numpy.typing import NDArray
from test_engine import as_data_url
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.errors import BadItemsError, DeadlineError, MMError, NotSupportedError, QueueFullError
from rtp_mm.models.registry import load_model
from rtp_mm.types import LIBRARY_CALLER, Caller, MMEmbeddingRes, MMPreprocessConfig, MMUrlType, MultimodalInput

STRANGER = Caller("ipv4:10.0.0.1:1", is_local=False)
SMALL = MMPreprocessConfig(width=56, height=56)  # 4 x 4 patches


class Watched:
    """An engine on this event loop; its prepare and its forward are counted, and wait while they are held."""

    def __init__(self, engine: MMProcessEngine) -> None:
        self.engine = engine
        self.prepared = 0
        self.forwards: list[int] = []  # items in each
        self.may_prepare = asyncio.Event()
        self.may_forward = threading.Event()
        self.may_prepare.set()
        self.may_forward.set()
        prepare, forward = engine._workers.prepare, engine._mm_part.mm_process_batch

        async def watched_prepare(*args: Any, **kwargs: Any) -> Any:
            self.prepared += 1
            await self.may_prepare.wait()
            return await prepare(*args, **kwargs)

        def watched_forward(items: Sequence[Any], *rest: Any) -> Any:
            self.forwards.append(len(items))
            assert self.may_forward.wait(30)
            return forward(items, *rest)

        engine._workers.prepare = watched_prepare  # type: ignore[method-assign]
        engine._mm_part.mm_process_batch = watched_forward  # type: ignore[method-assign]

    def ask(self, *urls: str, config: MMPreprocessConfig = SMALL, **kwargs: Any) -> asyncio.Task[MMEmbeddingRes]:
        inputs = [MultimodalInput(url, kwargs.pop("mm_type", MMUrlType.DEFAULT), config) for url in urls]
        return asyncio.create_task(self.engine.embed(inputs, **kwargs))


@asynccontextmanager
async def watched(folder: Path, **options: Any) -> AsyncIterator[Watched]:
    """Checks, too, that nothing of it is left in the end."""
    before = asyncio.all_tasks()
    options = {"checkpoint_path": folder, "device": "cpu", "act_type": "fp32"} | options
    settings = load_settings(mm_allow_private_network=True, mm_fetch_retries=0, **options)
    watched = Watched(MMProcessEngine(load_model(settings), settings, asyncio.get_running_loop()))
    try:
        yield watched
        stats = watched.engine.stats()
        assert (stats.requests_running, stats.items_waiting, stats.patches_waiting, stats.bytes_in_flight) == (0,) * 4
        assert watched.engine._admission.patches == 0
    finally:
        watched.may_forward.set()
        await watched.engine.aclose()
    await until(lambda: asyncio.all_tasks() <= before)


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.001)


@pytest.fixture
async def source(photo: bytes) -> AsyncIterator[Source]:
    async with Source.serving() as source:
        source.answers_with("/photo.jpg", body=photo)
        yield source


@pytest.fixture
def urls(photos: dict[str, NDArray[np.uint8]]) -> list[str]:
    return [as_data_url(photos["chelsea"][i : i + 60, :60]) for i in range(8)]


def padded(url: str, nbytes: int) -> str:
    """The same image in a data URL of `nbytes`."""
    return url.replace(";base64", f";name={'A' * (nbytes - len(url) - 6)};base64")


def same(answers: Sequence[MMEmbeddingRes]) -> bool:
    return all(torch.equal(answer.embeddings[0], answers[0].embeddings[0]) for answer in answers)


async def test_a_hundred_requests_for_one_new_image_cost_one(tiny_qwen2_5_vl: Path, source: Source) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        url = source.url + "/photo.jpg"
        answers = await asyncio.gather(*(w.ask(url, mm_type=MMUrlType(i % 2)) for i in range(100)))
        assert same(answers)
        assert (len(source.requests), w.prepared, w.forwards) == (1, 1, [1])
        await w.ask(url)
        assert (w.prepared, w.forwards) == (1, [1])


async def test_the_same_bytes_by_many_ways_are_one_entry(
    tiny_qwen2_5_vl: Path, source: Source, photo: bytes, photo_path: Path
) -> None:
    """DEFAULT is told from the bytes; http, file and another URL come to the same content."""
    async with watched(tiny_qwen2_5_vl) as w:
        source.answers_with("/copy", body=photo)
        asked = [(source.url + "/photo.jpg", 0), (source.url + "/copy", 1), (str(photo_path), 0), (str(photo_path), 1)]
        assert same(await asyncio.gather(*(w.ask(url, mm_type=MMUrlType(mm_type)) for url, mm_type in asked)))
        assert (w.prepared, w.forwards, w.engine.stats().caches["embeddings"].items) == (1, [1], 1)


@pytest.mark.parametrize("leaver", [0, 1])
@pytest.mark.parametrize("stage", ["fetch", "prepare", "forward"])
async def test_who_leaves_at_any_stage_does_not_take_the_answer_from_the_other(
    stage: str, leaver: int, tiny_qwen2_5_vl: Path, source: Source, photo: bytes
) -> None:
    may_fetch = asyncio.Event()

    async def answer(request: web.Request) -> web.Response:
        await may_fetch.wait()
        return web.Response(body=photo)

    async with watched(tiny_qwen2_5_vl) as w:
        url = source.answers_by("/slow", answer)
        if stage != "fetch":
            may_fetch.set()
        if stage == "prepare":
            w.may_prepare.clear()
        if stage == "forward":
            w.may_forward.clear()
        tasks = [w.ask(url), w.ask(url)]
        await until(
            lambda: {"fetch": len(source.requests), "prepare": w.prepared, "forward": len(w.forwards)}[stage] == 1
        )
        tasks[leaver].cancel()
        await asyncio.wait([tasks[leaver]])
        may_fetch.set()
        w.may_prepare.set()
        w.may_forward.set()
        assert len((await tasks[1 - leaver]).embeddings[0]) == 4
        assert (len(source.requests), w.prepared, w.forwards) == (1, 1, [1])


async def test_when_the_last_leaves_the_download_is_closed(tiny_qwen2_5_vl: Path, source: Source) -> None:
    closed = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            await asyncio.sleep(60)
        finally:
            closed.set()
        raise AssertionError

    async with watched(tiny_qwen2_5_vl) as w:
        url = source.answers_by("/never", answer)
        tasks = [w.ask(url, timeout_s=0.2), w.ask(url, timeout_s=0.3)]
        for task in tasks:
            with pytest.raises(DeadlineError):
                await task
        await asyncio.wait_for(closed.wait(), 10)


async def test_a_deadline_takes_waiting_work_out_of_the_queue(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        late = w.ask(urls[1], timeout_s=0.3)
        await until(lambda: w.engine.stats().items_waiting == 1)
        with pytest.raises(DeadlineError):
            await late
        assert w.engine.stats().items_waiting == 0
        w.may_forward.set()
        await first
        assert w.forwards == [1]


async def test_access_is_checked_for_each_caller_before_joining(tiny_qwen2_5_vl: Path, photo_path: Path) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        w.may_forward.clear()
        trusted = w.ask(str(photo_path), caller=LIBRARY_CALLER)
        await until(lambda: len(w.forwards) == 1)
        with pytest.raises(BadItemsError) as caught:
            await w.ask(str(photo_path), caller=STRANGER)
        assert isinstance(caught.value.verdict, NotSupportedError)
        w.may_forward.set()
        await trusted
        with pytest.raises(BadItemsError):  # nor from the cache
            await w.ask(str(photo_path), caller=STRANGER)


@pytest.mark.parametrize(("side", "limit", "is_admitted"), [(4, 17, True), (4, 16, True), (4, 15, False)])
async def test_patches_per_item_are_limited_before_decoding(
    side: int, limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, urls: list[str]
) -> None:
    config = MMPreprocessConfig(width=14 * side, height=14 * side)
    async with watched(tiny_qwen2_5_vl, mm_max_patches_per_item=limit) as w:
        if is_admitted:
            assert len((await w.ask(urls[0], config=config)).embeddings[0]) == 4
            return
        with pytest.raises(BadItemsError, match=r"16 patches, over the limit of 15 \(MM_MAX_PATCHES_PER_ITEM\)"):
            await w.ask(urls[0], config=config)
        assert w.prepared == 0
        assert w.engine.stats().rejections == {"item_patches": 1}


async def test_a_huge_size_of_a_small_image_is_refused_by_default(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        for config in (
            MMPreprocessConfig(width=8000, height=8000, max_pixels=1 << 30),
            MMPreprocessConfig(-1, -1, 1 << 26, 1 << 26),
        ):
            with pytest.raises(BadItemsError, match="MM_MAX_PATCHES_PER_ITEM"):
                await w.ask(urls[0], config=config)
        assert w.prepared == 0


async def test_pixels_are_limited_before_decoding(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl, mm_max_pixels=60 * 60) as w:
        assert await w.ask(urls[0])
    async with watched(tiny_qwen2_5_vl, mm_max_pixels=60 * 60 - 1) as w:
        with pytest.raises(BadItemsError, match="MM_MAX_PIXELS"):
            await w.ask(urls[0])
        assert w.prepared == 0


@pytest.mark.parametrize(("limit", "is_admitted"), [(33, True), (32, True), (31, False)])
async def test_patches_in_the_queue_are_limited(
    limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, urls: list[str]
) -> None:
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=limit) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        second = w.ask(urls[1])
        if is_admitted:
            await until(lambda: w.prepared == 2)
            w.may_forward.set()
            assert await second
        else:
            with pytest.raises(QueueFullError, match="MM_MAX_QUEUE_PATCHES") as caught:
                await second
            assert caught.value.retry_after_ms > 0
            assert w.engine.stats().rejections == {"patches": 1}
            assert w.prepared == 1
            w.may_forward.set()
        await first


async def test_an_idle_server_takes_one_request_however_large(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=1, mm_max_bytes_in_flight_mb=1) as w:
        long = padded(urls[0], 4 << 20)
        assert len((await w.ask(*urls, long)).embeddings) == 9


async def test_bytes_in_flight_are_limited(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    """A message that does not fit beside another is refused at the door; alone it is welcome."""
    async with watched(tiny_qwen2_5_vl, mm_max_bytes_in_flight_mb=1) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        held = w.engine.stats().bytes_in_flight
        assert held >= len(urls[0])
        room = (1 << 20) - held
        fits, too_large = (padded(urls[1], n) for n in (room - 100_000, room + 1))
        with pytest.raises(QueueFullError, match="MM_MAX_BYTES_IN_FLIGHT_MB"):
            await w.ask(too_large)
        assert w.engine.stats().rejections == {"bytes": 1}
        w.may_forward.set()
        await asyncio.gather(first, w.ask(fits))
        assert await w.ask(too_large)


async def test_a_download_is_refused_while_it_comes(tiny_qwen2_5_vl: Path, urls: list[str], source: Source) -> None:
    """By its Content-Length, or where there is none, by what has come; alone it is welcome."""
    body = b"x" * (3 << 19)

    async def chunked(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(body)
        return response

    announced, streamed = source.answers_with("/announced", body=body), source.answers_by("/streamed", chunked)
    async with watched(tiny_qwen2_5_vl, mm_max_bytes_in_flight_mb=1) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        for url in (announced, streamed):
            with pytest.raises(QueueFullError, match="MM_MAX_BYTES_IN_FLIGHT_MB"):
                await w.ask(url)
        w.may_forward.set()
        await first
        for url in (announced, streamed):
            with pytest.raises(BadItemsError, match="no image"):
                await w.ask(url)


async def test_an_answer_counts_until_nobody_holds_it(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    """A server holds it until its caller has read it; a library's caller may keep it for ever."""
    async with watched(tiny_qwen2_5_vl) as w:
        library, server = await w.ask(urls[0]), await w.ask(urls[0], caller=STRANGER)
        assert w.engine.stats().bytes_in_flight == server.embeddings[0].nbytes == library.embeddings[0].nbytes
        del server
        await until(lambda: w.engine.stats().bytes_in_flight == 0)


async def test_what_cannot_come_in_time_is_refused_at_once(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        await w.ask(urls[0])  # it learns how fast the device is
        w.engine._batcher._rate = 16.0  # patches a second
        w.may_forward.clear()
        first = w.ask(urls[1])
        await until(lambda: len(w.forwards) == 2)
        with pytest.raises(QueueFullError, match="more than the deadline leaves") as caught:
            await w.ask(urls[2], timeout_s=0.5)
        assert caught.value.retry_after_ms == 1000
        patient = w.ask(urls[3], timeout_s=30)
        w.may_forward.set()
        await asyncio.gather(first, patient)
        assert w.engine.stats().rejections == {"deadline": 1}


async def test_prepared_patches_are_kept(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    """Where the embedding is not there any more, decoding and resizing are not done again."""
    async with watched(tiny_qwen2_5_vl, mm_embedding_cache_mb=0) as w:
        first, again = await w.ask(urls[0]), await w.ask(urls[0])
        assert (w.prepared, w.forwards) == (1, [1, 1])
        assert same([first, again])
        assert w.engine.stats().caches["patches"].hits == 1
    async with watched(tiny_qwen2_5_vl, mm_embedding_cache_mb=0, mm_patch_cache_mb=0) as w:
        assert same([await w.ask(urls[0]), await w.ask(urls[0])])
        assert w.prepared == 2


async def test_what_is_kept_does_not_hold_the_workers_memory(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        seen: list[NDArray[np.uint8]] = []
        prepare = w.engine._workers.prepare

        async def remembering(*args: Any) -> Any:
            prepared = await prepare(*args)
            seen.append(prepared.value.rows)
            return prepared

        w.engine._workers.prepare = remembering  # type: ignore[method-assign]
        await w.ask(urls[0])
        kept = next(iter(w.engine._patches._values.values()))
        assert np.array_equal(kept.rows, seen[0])
        assert not np.shares_memory(kept.rows, seen[0])


async def test_counters_tell_what_happened(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        await asyncio.gather(*(w.ask(url) for url in urls))
        await asyncio.gather(*(w.ask(url) for url in urls))
        stats = w.engine.stats()
        assert stats.batches == len(w.forwards) == w.engine.worker_status().iterations
        assert (stats.batch_items, stats.batch_patches) == (8, 8 * 16)
        assert stats.batch_patches_budget == w.engine.worker_status().max_batch_tokens == 4096
        embeddings = stats.caches["embeddings"]
        assert (embeddings.items, embeddings.hits, embeddings.misses) == (8, 8, 8)
        cache = w.engine.cache_status(with_keys=True)
        assert cache.total_bytes - cache.available_bytes == embeddings.used_bytes
        assert len(cache.keys) == 8


async def test_a_bad_item_beside_a_full_queue_says_what_no_retry_mends(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=16) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        with pytest.raises(BadItemsError) as caught:
            await w.ask(urls[1], "data:image/png;base64,AAAA")
        assert caught.value.status == "INVALID_ARGUMENT"
        with pytest.raises(QueueFullError):
            await w.ask(urls[1], urls[2])
        w.may_forward.set()
        await first


async def test_a_storm_of_leavers_leaves_nothing_behind(tiny_qwen2_5_vl: Path, urls: list[str], source: Source) -> None:
    """Callers of the same and of other images leave at every moment; who stays is answered, and nothing is left."""
    async with watched(tiny_qwen2_5_vl, mm_embedding_cache_mb=0, mm_patch_cache_mb=0) as w:
        await w.ask(urls[0])
        threads = threading.active_count()
        rng = np.random.default_rng(3)
        for _ in range(10):
            tasks = [w.ask(urls[i % 8] if i % 3 else source.url + "/photo.jpg") for i in range(30)]
            leavers = [task for task in tasks if rng.random() < 0.6]
            for task in leavers:
                await asyncio.sleep(rng.random() * 0.003)
                task.cancel()
            for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                assert not isinstance(outcome, MMError)
        await until(lambda: w.engine.stats().requests_running == 0 and w.engine._admission.patches == 0)
        assert not w.engine._computations._tasks
        assert not w.engine._fetches._tasks
        assert threading.active_count() <= threads + 8  # asyncio's own pool
        gc.collect()


async def test_a_part_with_an_mm_embedding_of_its_own_is_called_through_it(
    tiny_qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rtp_mm.models.qwen2_vl import Qwen2VLEmbedding

    seen: list[Any] = []

    def mm_embedding(self: Any, url: str, mm_type: MMUrlType = MMUrlType.DEFAULT, **kwargs: Any) -> torch.Tensor:
        seen.append((url, mm_type, kwargs["configs"], threading.current_thread() is threading.main_thread()))
        if url.endswith("bad"):
            raise ZeroDivisionError
        return torch.full((3, 4), 1.5)

    monkeypatch.setattr(Qwen2VLEmbedding, "mm_embedding", mm_embedding)
    async with watched(tiny_qwen2_5_vl) as w:
        answer = await w.ask("https://host/a", mm_type=MMUrlType.IMAGE)
        assert torch.equal(answer.embeddings[0], torch.full((3, 4), 1.5))
        assert seen == [("https://host/a", MMUrlType.IMAGE, SMALL, False)]
        with pytest.raises(BadItemsError, match="ZeroDivisionError"):
            await w.ask("https://host/bad")
        with pytest.raises(BadItemsError, match="scheme"):
            await w.ask("gopher://host/c")
        assert len(seen) == 2
