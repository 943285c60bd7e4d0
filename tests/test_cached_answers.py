"""Answers that are kept: given in one step, by the same rules as all others, and sent as the bytes they are kept as."""

from __future__ import annotations

import sys
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import until
from watched_engine import STRANGER, watched
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.errors import BadItemsError, DeadlineError, QueueFullError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.server import wire
from rtp_mm.server.wire import seal
from rtp_mm.types import MMEmbeddingRes, MMPreprocessConfig, MMUrlType, MultimodalInput

MAX_AGE = {"Cache-Control": "max-age=3600"}


def at_once(work: Coroutine[Any, Any, MMEmbeddingRes]) -> MMEmbeddingRes:
    """What comes of it without a turn of the event loop."""
    try:
        work.send(None)
    except StopIteration as end:
        answer: MMEmbeddingRes = end.value
        return answer
    raise AssertionError("it waits")


def inputs(*urls: str, **config: int) -> list[MultimodalInput]:
    return [MultimodalInput(url, MMUrlType.IMAGE, MMPreprocessConfig(width=56, height=56, **config)) for url in urls]


@pytest.fixture
async def source(photo: bytes) -> AsyncIterator[Source]:
    async with Source.serving() as source:
        source.answers_with("/photo.jpg", body=photo, headers=MAX_AGE)
        source.answers_with("/stale.jpg", body=photo)
        yield source


async def test_what_is_cached_is_answered_without_waiting(
    tiny_qwen2_5_vl: Path, source: Source, urls: list[str]
) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        asked = inputs(source.url + "/photo.jpg", *urls[:2])
        first = await w.engine.embed(asked, caller=STRANGER)
        before = w.engine.stats().caches
        again = at_once(w.engine.embed(asked, caller=STRANGER))
        after = w.engine.stats().caches
        assert all(map(torch.equal, again.embeddings, first.embeddings))
        assert (first.cached_items, again.cached_items) == (0, 3)
        assert not again.timings_ms  # no stage was gone through
        assert [(after[c].hits - before[c].hits, after[c].misses - before[c].misses) for c in before] == [
            (1, 0),  # bytes
            (0, 0),  # patches
            (3, 0),  # embeddings
        ]
        assert w.engine.worker_status().finished_version == 2
        assert (len(source.requests), sum(w.forwards)) == (1, 3)
        del first, again  # an answer that somebody holds counts as in flight


async def test_what_must_be_asked_for_is_waited_for(tiny_qwen2_5_vl: Path, source: Source, photo_path: Path) -> None:
    """A source that does not say how long its file is good, a file, a cached image of another size."""
    async with watched(tiny_qwen2_5_vl, mm_bytes_cache_ttl_s=0) as w:
        good, stale = source.url + "/photo.jpg", source.url + "/stale.jpg"
        await w.engine.embed(inputs(good, stale, str(photo_path)))
        for url in (good, stale, str(photo_path)):
            assert (await w.engine.embed(inputs(url))).cached_items == 1
        assert len(source.requests) == 3
        other = [MultimodalInput(good, MMUrlType.IMAGE, MMPreprocessConfig(width=84, height=84))]
        assert (await w.engine.embed(other)).cached_items == 0
        stats = w.engine.stats().caches["bytes"]
        assert (stats.hits, stats.misses) == (2, 3)  # `good` twice: a download that is gone on with counts once


async def test_the_rules_are_the_same_for_what_is_cached(
    tiny_qwen2_5_vl: Path, source: Source, urls: list[str], photo_path: Path
) -> None:
    """Access, the deadline, the sizes, the queue; every bad item is named beside good ones."""
    async with watched(tiny_qwen2_5_vl, mm_max_queue_size=1, mm_image_max_file_size_kb=20000) as w:
        good = source.url + "/photo.jpg"
        await w.engine.embed(inputs(good, urls[0]))
        with pytest.raises(DeadlineError, match=r"within 0\.000 s"):
            at_once(w.engine.embed(inputs(good), timeout_s=0))
        with pytest.raises(BadItemsError, match=r"^item 1 .*local files"):
            await w.engine.embed(inputs(good, str(photo_path)), caller=STRANGER)
        crop = MMPreprocessConfig(crop_positions=[0.5])
        bad = [MultimodalInput(url, MMUrlType.IMAGE, crop) for url in (good, urls[0])]
        with pytest.raises(BadItemsError, match=r"(?s)item 0.*item 2"):
            at_once(w.engine.embed([bad[0], *inputs(good), bad[1]]))
        begun = len(w.forwards)
        w.may_forward.clear()
        task = w.ask(urls[1])
        await until(lambda: len(w.forwards) == begun + 1)
        with pytest.raises(QueueFullError):
            at_once(w.engine.embed(inputs(good)))
        w.may_forward.set()
        await task
        w.engine._items.fetcher._limits = Fetcher(load_settings(mm_image_max_file_size_kb=1))._limits
        with pytest.raises(BadItemsError, match="MM_IMAGE_MAX_FILE_SIZE_KB"):
            at_once(w.engine.embed(inputs(good)))


# --- sealed


def embedded(rows: int = 7) -> Embedded:
    return Embedded(torch.randn(rows, 5).bfloat16(), torch.arange(3 * rows).int().view(rows, 3), 0.5)


def answer(*items: Embedded) -> MMEmbeddingRes:
    ids = [item.position_ids for item in items if item.position_ids is not None]
    messages = [item.message for item in items if item.message is not None]
    return MMEmbeddingRes([item.embedding for item in items], ids or None, messages=messages or None)


@pytest.mark.parametrize("form", ["items", "concat"])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("has_ids", [True, False])
def test_a_sealed_answer_reads_the_same(form: Any, count: int, has_ids: bool) -> None:
    items = [embedded(rows) if has_ids else embedded(rows)._replace(position_ids=None) for rows in (7, 60, 1)[:count]]
    assert wire.write_result(answer(*map(seal, items)), form) == wire.write_result(answer(*items), form)


def test_a_sealed_item_is_sent_without_a_copy_and_kept_once() -> None:
    item = seal(embedded())
    assert item.message is not None
    assert item.position_ids is not None
    assert wire.write_result(answer(item), "items") is item.message
    assert torch.equal(item.position_ids, embedded().position_ids)
    place = item.embedding.data_ptr() - id(item.message)
    assert 0 < place < sys.getsizeof(item.message) - item.nbytes
    assert item.seconds_per_grid == 0.5


def test_a_library_caller_s_copy_of_a_sealed_item_is_its_own() -> None:
    item = seal(embedded())
    before = item.embedding.clone()
    mine = item.copy()
    mine.embedding.zero_()
    assert mine.message is None
    assert torch.equal(item.embedding, before)


def test_an_answer_without_rows_stays_as_it_is() -> None:
    nothing = embedded(0)
    assert seal(nothing) is nothing


@pytest.mark.parametrize("is_large", [True, False])
async def test_a_server_s_engine_keeps_sealed_answers(
    is_large: bool, tiny_qwen2_5_vl: Path, urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if is_large:
        monkeypatch.setattr("rtp_mm.engine.item_pipeline.SEALED_ON_LOOP", 0)
    async with watched(tiny_qwen2_5_vl) as w:
        engine: MMProcessEngine = w.engine
        sealed_by: list[threading.Thread] = []
        engine._items._seal = lambda embedded: (sealed_by.append(threading.current_thread()), seal(embedded))[1]
        result = await engine.embed(inputs(urls[0]), caller=STRANGER)
        again = at_once(engine.embed(inputs(urls[0]), caller=STRANGER))
        assert result.messages is not None
        assert again.messages is not None
        assert again.messages[0] is result.messages[0]
        assert [thread is threading.main_thread() for thread in sealed_by] == [not is_large]  # it copies
        assert wire.write_result(again, "items") == wire.write_result(
            MMEmbeddingRes(again.embeddings, again.position_ids), "items"
        )
        mine = at_once(engine.embed(inputs(urls[0])))
        assert mine.messages is None
        mine.embeddings[0].zero_()
        assert torch.equal(at_once(engine.embed(inputs(urls[0]), caller=STRANGER)).embeddings[0], result.embeddings[0])
        del result, again
