"""The engine under load: one fetch, decode and forward for all who want the same, deadlines, no leaks."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from aiohttp import web
from numpy.typing import NDArray
from torch_threads import torch_threads
from waiting import until
from watched_engine import SMALL, STRANGER, watched
from web_source import Source

from rtp_mm.errors import BadItemsError, DeadlineError, MMError, NotSupportedError
from rtp_mm.types import LIBRARY_CALLER, MMEmbeddingRes, MMUrlType, MultimodalInput


@pytest.fixture
def source(source: Source, photo: bytes) -> Source:
    source.answers_with("/photo.jpg", body=photo)
    return source


def same(answers: Sequence[MMEmbeddingRes]) -> bool:
    return all(torch.equal(answer.embeddings[0], answers[0].embeddings[0]) for answer in answers)


async def test_a_hundred_requests_for_one_new_image_cost_one(tiny_qwen2_5_vl: Path, source: Source) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        url = source.url + "/photo.jpg"
        answers = await asyncio.gather(*(w.ask(url) for _ in range(100)))
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


async def test_a_deadline_hides_no_bad_item_that_is_known(tiny_qwen2_5_vl: Path, source: Source) -> None:
    """An item that must fail again decides; else each that was late is named, and how far it came."""

    async def stall(_: web.Request) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    async with watched(tiny_qwen2_5_vl) as w:
        source.answers_with("/absent", status=404)
        stalled, absent = source.answers_by("/stalled", stall), source.url + "/absent"
        late = r"item 0 \(http.*/stalled\): no answer within 0\.300 s, the caller's deadline \(fetch 0\.\d+ s\)"
        with pytest.raises(BadItemsError, match=rf"^item 1 \(http.*/absent\): .*404.*; {late}$") as caught:
            await w.engine.embed([MultimodalInput(stalled), MultimodalInput(absent)], timeout_s=0.3)
        assert (caught.value.name, caught.value.status) == ("MM_DOWNLOAD_FAILED", "INVALID_ARGUMENT")
        assert [failure.index for failure in caught.value.failures] == [1, 0]
        good = MultimodalInput(source.url + "/photo.jpg")
        with pytest.raises(DeadlineError, match=rf"^{late}; {late.replace('0', '2', 1)}$"):
            await w.engine.embed([MultimodalInput(stalled), good, MultimodalInput(stalled)], timeout_s=0.3)


async def test_a_download_is_judged_by_whoever_still_waits_for_it(tiny_qwen2_5_vl: Path, source: Source) -> None:
    """Who asked first has left; the oldest that is left is never refused, however little room there is."""
    may_send = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await may_send.wait()
        await response.write(bytes(3 << 20))
        return response

    async with watched(tiny_qwen2_5_vl, mm_max_bytes_in_flight_mb=1) as w:
        url = source.answers_by("/large", answer)
        first, second = w.ask(url), w.ask(url)
        await until(lambda: source.requests)
        first.cancel()
        await until(lambda: w.engine.worker_status().running == 1)
        may_send.set()
        with pytest.raises(BadItemsError, match="no image"):  # as its bytes are zeros; not `QueueFullError`
            await second


async def test_a_deadline_takes_waiting_work_out_of_the_queue(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        late = w.ask(urls[1], timeout_s=0.3)
        await until(lambda: w.engine.stats().items_waiting == 1)
        with pytest.raises(
            DeadlineError,
            match=r"^item 0 \(data:.*\): no answer within 0\.300 s, the caller's deadline "
            r"\(fetch .* s, preprocess .* s, queue .* s\)$",
        ) as caught:
            await late
        assert set(caught.value.timings_ms) == {"fetch", "preprocess", "queue"}
        assert w.engine.stats().items_waiting == 0
        w.may_forward.set()
        await first
        assert w.forwards == [1]


@pytest.fixture
def two_threads() -> Iterator[None]:
    with torch_threads(2):
        yield


@pytest.mark.usefixtures("two_threads")
async def test_a_cpu_forwards_two_requests_at_once(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl, lanes=2) as w:
        w.may_forward.clear()
        both = [w.ask(url) for url in urls[:2]]
        await until(lambda: w.forwards == [1, 1])
        w.may_forward.set()
        assert not same(await asyncio.gather(*both))


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
        prepare = w.engine._items.workers.prepare

        async def remembering(*args: Any, **kwargs: Any) -> Any:
            prepared = await prepare(*args, **kwargs)
            seen.append(prepared.value.rows)
            return prepared

        w.engine._items.workers.prepare = remembering  # type: ignore[method-assign]
        await w.ask(urls[0])
        kept = next(iter(w.engine._items.patch_cache._values.values()))
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
        await until(lambda: w.engine.stats().requests_running == 0 and w.engine._items.admission.patches == 0)
        assert not w.engine._items._computations._tasks
        assert not w.engine._items._fetches._tasks
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
        await w.ask("https://host/a", mm_type=MMUrlType.IMAGE)  # not kept: nobody but the part saw its bytes
        assert seen.pop() == seen[0]
        with pytest.raises(BadItemsError, match="ZeroDivisionError"):
            await w.ask("https://host/bad")
        with pytest.raises(BadItemsError, match="scheme"):
            await w.ask("gopher://host/c")
        assert len(seen) == 2
