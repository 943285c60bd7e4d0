"""The engine with a real (tiny) tower: order, errors by item, caching, batching, both faces."""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from watched_engine import as_data_url

from rtp_mm import _core
from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.errors import BadItemsError, DeadlineError, DrainingError, ProcessError, QueueFullError
from rtp_mm.models.registry import load_model
from rtp_mm.types import MMPreprocessConfig, MMUrlType, MultimodalInput


def new_engine(folder: Path, **options: Any) -> MMProcessEngine:
    settings = load_settings(checkpoint_path=folder, device="cpu", act_type="fp32", **options)
    return MMProcessEngine(load_model(settings), settings)


@pytest.fixture
def engine(tiny_qwen2_5_vl: Path) -> Iterator[MMProcessEngine]:
    engine = new_engine(tiny_qwen2_5_vl)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def data_urls(photos: dict[str, Any]) -> list[str]:
    photo = photos["chelsea"]
    return [as_data_url(photo[: 28 * i, : 28 * (i + 1)]) for i in range(2, 6)]


def test_answers_come_in_the_order_of_the_items(engine: MMProcessEngine, data_urls: list[str]) -> None:
    result = engine.submit(data_urls)
    assert [len(e) for e in result.embeddings] == [2 * 3, 3 * 4, 4 * 5, 5 * 6]
    assert result.position_ids is not None
    assert [p.shape for p in result.position_ids] == [(6, 3), (12, 3), (20, 3), (30, 3)]
    reversed_result = engine.submit(data_urls[::-1])
    for ours, other in zip(result.embeddings, reversed_result.embeddings[::-1], strict=True):
        assert torch.equal(ours, other)


def test_the_second_time_comes_from_the_cache_and_is_the_same(
    engine: MMProcessEngine, data_urls: list[str], photo_path: Path
) -> None:
    first = engine.submit([str(photo_path), *data_urls])
    forwards = engine.worker_status().iterations
    again = engine.submit([str(photo_path), *data_urls])
    assert engine.worker_status().iterations == forwards
    assert all(torch.equal(a, b) for a, b in zip(first.embeddings, again.embeddings, strict=True))
    assert "forward" in first.timings_ms
    assert "forward" not in again.timings_ms


def test_the_cache_knows_the_options(engine: MMProcessEngine, photo_path: Path) -> None:
    plain = engine.submit([str(photo_path)])
    small = engine.submit([str(photo_path)], preprocess_configs=[MMPreprocessConfig(max_pixels=28 * 28 * 9)])
    assert len(small.embeddings[0]) <= 9 < len(plain.embeddings[0])
    deadline_only = engine.submit([str(photo_path)], preprocess_configs=[MMPreprocessConfig(mm_timeout_ms=60000)])
    assert "forward" not in deadline_only.timings_ms


def test_the_cache_knows_how_the_tower_runs(tiny_qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "multiplies_bytes", lambda: True)
    engines = [new_engine(tiny_qwen2_5_vl, mm_quantization=q) for q in ("none", "int8", "none")]
    exact, int8, again = (engine._items.answers._tower_key for engine in engines)
    assert exact == again != int8
    for engine in engines:
        engine.close()


def test_the_cache_keeps_to_its_budget(tiny_qwen2_5_vl: Path, data_urls: list[str]) -> None:
    engine = new_engine(tiny_qwen2_5_vl, mm_embedding_cache_mb=0)
    engine.submit(data_urls)
    status = engine.cache_status(with_keys=True)
    assert (status.total_bytes, status.keys) == (0, ())
    engine.close()


def test_cache_status_names_what_is_kept(engine: MMProcessEngine, data_urls: list[str]) -> None:
    before = engine.cache_status()
    engine.submit(data_urls)
    status = engine.cache_status(with_keys=True)
    tokens = 6 + 12 + 20 + 30
    assert status.total_bytes - status.available_bytes == tokens * (48 * 4 + 3 * 4)
    assert len(status.keys) == 4
    assert all(-(2**63) <= key < 2**63 for key in status.keys)
    assert status.version != before.version


def test_every_bad_item_is_named_and_the_good_ones_stay_cached(
    engine: MMProcessEngine, data_urls: list[str], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 no picture")
    with pytest.raises(BadItemsError) as caught:
        engine.submit([data_urls[0], str(broken), data_urls[1], str(tmp_path / "absent.jpg")])
    assert [failure.index for failure in caught.value.failures] == [1, 3]
    assert "item 1 (" in str(caught.value)
    assert "absent.jpg" in str(caught.value)
    assert caught.value.status == "INVALID_ARGUMENT"
    assert "forward" not in engine.submit(data_urls[:2]).timings_ms


def test_both_faces_answer_the_same_from_any_loop(engine: MMProcessEngine, data_urls: list[str]) -> None:
    inputs = [MultimodalInput(url) for url in data_urls]
    awaited = asyncio.run(engine.embed(inputs))
    assert all(torch.equal(a, b) for a, b in zip(awaited.embeddings, engine.submit(data_urls).embeddings, strict=True))


def test_configs_may_be_lists_of_values(engine: MMProcessEngine, photo_path: Path) -> None:
    as_list = engine.submit([str(photo_path)], [MMUrlType.IMAGE], preprocess_configs=[[56, 84, -1, -1, -1, -1, -1]])
    assert len(as_list.embeddings[0]) == 2 * 3


def test_a_tensor_item_equals_the_same_image_as_a_file(engine: MMProcessEngine, photos: dict[str, Any]) -> None:
    pixels = photos["chelsea"][:84, :140]
    tensor = torch.from_numpy(pixels.copy()).int()
    by_tensor = engine.submit([""], [MMUrlType.TENSOR], [tensor])
    assert torch.equal(by_tensor.embeddings[0], engine.submit([as_data_url(pixels)]).embeddings[0])


def test_one_bad_forward_does_not_fail_its_batch(
    engine: MMProcessEngine, data_urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An item whose forward raises, and one whose embedding is NaN, fail alone; the rest of the batch is answered."""
    forward = engine._items._mm_part.mm_process_batch

    def sabotaged(items: list[Any], *rest: Any) -> list[Any]:
        if any(item.grid_thw == (1, 6, 8) for item in items):
            raise torch.OutOfMemoryError("no memory, and a /secret/path")
        results = list(forward(items, *rest))
        for i, item in enumerate(items):
            if item.grid_thw == (1, 8, 10):
                results[i] = (results[i][0] * float("nan"), results[i][1])
        return results

    monkeypatch.setattr(engine._items._mm_part, "mm_process_batch", sabotaged)
    with pytest.raises(BadItemsError) as caught:
        engine.submit(data_urls)
    assert [f.index for f in caught.value.failures] == [1, 2]
    assert all(isinstance(f.error, ProcessError) for f in caught.value.failures)
    assert "OutOfMemoryError" in str(caught.value)
    assert "/secret/path" not in str(caught.value)
    assert "NaN" in str(caught.value)
    assert "forward" not in engine.submit([data_urls[0], data_urls[3]]).timings_ms


def test_a_deadline_ends_the_wait_and_nothing_else(
    engine: MMProcessEngine, data_urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    forward = engine._items._mm_part.mm_process_batch
    monkeypatch.setattr(
        engine._items._mm_part, "mm_process_batch", lambda *args: (release.wait(30), forward(*args))[1], raising=True
    )
    with pytest.raises(DeadlineError, match=r"within 0\.050 s"):
        asyncio.run(engine.embed([MultimodalInput(data_urls[0])], timeout_s=0.05))
    release.set()
    assert len(engine.submit(data_urls[1:2]).embeddings) == 1


def test_a_full_queue_refuses_at_once(tiny_qwen2_5_vl: Path, data_urls: list[str]) -> None:
    engine = new_engine(tiny_qwen2_5_vl, mm_max_queue_size=1)
    release = threading.Event()
    forward = engine._items._mm_part.mm_process_batch
    engine._items._mm_part.mm_process_batch = lambda *args: (release.wait(30), forward(*args))[1]  # type: ignore[method-assign]

    async def two() -> None:
        first = asyncio.create_task(engine.embed([MultimodalInput(data_urls[0])]))
        while engine.worker_status().running == 0:
            await asyncio.sleep(0.001)
        with pytest.raises(QueueFullError) as caught:
            await engine.embed([MultimodalInput(data_urls[1])])
        assert caught.value.retry_after_ms > 0
        release.set()
        await first

    asyncio.run(two())
    engine.close()


def test_waiting_for_oneself_is_refused(engine: MMProcessEngine, data_urls: list[str]) -> None:
    async def on_own_loop() -> None:
        engine.submit(data_urls)

    with pytest.raises(RuntimeError, match="await embed"):
        asyncio.run_coroutine_threadsafe(on_own_loop(), engine._home.loop).result()


def test_close_ends_all_threads(tiny_qwen2_5_vl: Path, data_urls: list[str]) -> None:
    def ours() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name.startswith("rtp_mm") and t.is_alive()}

    before = ours()
    engine = new_engine(tiny_qwen2_5_vl)
    engine.submit(data_urls)
    started = ours() - before
    assert started
    engine.close()
    engine.close()
    for thread in started:
        thread.join(10)
    assert not ours() - before


def test_a_script_may_end_without_close(tiny_qwen2_5_vl: Path, data_urls: list[str]) -> None:
    script = (
        "import rtp_mm\n"
        f"engine = rtp_mm.create_engine(checkpoint_path={str(tiny_qwen2_5_vl)!r}, device='cpu')\n"
        f"print(len(engine.submit({data_urls[:2]!r}).embeddings))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


def test_one_url_in_place_of_a_list_is_refused(engine: MMProcessEngine, data_urls: list[str]) -> None:
    with pytest.raises(ValueError, match="urls must be a list"):
        engine.submit(data_urls[0])


def test_closing_ends_what_runs_and_refuses_what_comes(tiny_qwen2_5_vl: Path, data_urls: list[str]) -> None:
    engine = new_engine(tiny_qwen2_5_vl)
    release = threading.Event()
    forward = engine._items._mm_part.mm_process_batch
    engine._items._mm_part.mm_process_batch = lambda *args: (release.wait(30), forward(*args))[1]  # type: ignore[method-assign]
    with concurrent.futures.ThreadPoolExecutor(4) as callers:
        calls = [callers.submit(engine.submit, [url]) for url in data_urls]
        while engine.worker_status().running < len(data_urls):
            time.sleep(0.001)
        engine.close()
        for call in calls:
            with pytest.raises(DrainingError, match="closed"):
                call.result(30)
    release.set()
    with pytest.raises(DrainingError, match="closed"):
        engine.submit(data_urls)
    with pytest.raises(DrainingError, match="closed"):
        asyncio.run(engine.embed([MultimodalInput(data_urls[0])]))


def test_memory_stays_registered_until_the_last_forward_has_read_it(
    tiny_qwen2_5_vl: Path, data_urls: list[str]
) -> None:
    """And a forward that hangs holds no close up."""
    engine = new_engine(tiny_qwen2_5_vl, mm_preprocess_max_workers=1)
    begun, release, unpinned = (threading.Event() for _ in range(3))
    engine._items.workers._pinned = Mock(close=unpinned.set)
    forward = engine._items._mm_part.mm_process_batch
    engine._items._mm_part.mm_process_batch = lambda *args: (begun.set(), release.wait(30), forward(*args))[2]  # type: ignore[method-assign]
    with concurrent.futures.ThreadPoolExecutor(1) as caller:
        call = caller.submit(engine.submit, data_urls[:1])
        assert begun.wait(30)
        engine.close()
        assert isinstance(call.exception(30), DrainingError)
    assert not unpinned.is_set()
    release.set()
    assert unpinned.wait(30)


def test_a_caller_who_writes_into_an_answer_does_not_change_the_cache(
    engine: MMProcessEngine, data_urls: list[str]
) -> None:
    first = engine.submit(data_urls)
    kept = [embedding.clone() for embedding in first.embeddings]
    for embedding in first.embeddings:
        embedding.zero_()
    assert all(torch.equal(a, b) for a, b in zip(engine.submit(data_urls).embeddings, kept, strict=True))


def test_an_items_own_time_counts_in_the_library_too(
    engine: MMProcessEngine, data_urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    forward = engine._items._mm_part.mm_process_batch
    monkeypatch.setattr(engine._items._mm_part, "mm_process_batch", lambda *args: (release.wait(30), forward(*args))[1])
    with pytest.raises(DeadlineError, match=r"within 0\.040 s"):
        engine.submit(data_urls[:1], preprocess_configs=[MMPreprocessConfig(mm_timeout_ms=40)])
    release.set()


@pytest.mark.parametrize("answers", [[], [torch.ones(1, 48)] * 5])
def test_a_model_that_answers_too_few_or_too_many_fails_its_batch_alone(
    answers: list[torch.Tensor], engine: MMProcessEngine, data_urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine._items._mm_part, "mm_process_batch", lambda *_: answers)
        with pytest.raises(BadItemsError, match=rf"answered 1 items with {len(answers)} embeddings"):
            engine.submit(data_urls[:1])
    assert len(engine.submit(data_urls).embeddings) == len(data_urls)


class Panic(BaseException):
    """What Rust code raises through its bindings."""


@pytest.mark.parametrize("error", [ZeroDivisionError, Panic])
def test_a_cost_that_cannot_be_told_fails_its_item_alone(
    engine: MMProcessEngine, data_urls: list[str], monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    def patches(_: Any) -> int:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine._items._mm_part, "patches", patches)
        with pytest.raises(BadItemsError, match=f"preprocessing failed with {error.__name__}"):
            engine.submit(data_urls[:1])
    assert len(engine.submit(data_urls).embeddings) == len(data_urls)


@pytest.mark.parametrize(
    ("position_ids", "text"),
    [
        (lambda i: torch.zeros(3, 3) if i else None, "for some items and none for others"),
        (lambda i: torch.zeros(4 + i, 3), "3 tokens have 4 position ids"),
    ],
)
def test_position_ids_that_do_not_fit_are_an_error(
    position_ids: Any, text: str, engine: MMProcessEngine, data_urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = itertools.count()
    monkeypatch.setattr(
        engine._items._mm_part,
        "mm_process_batch",
        lambda items, *_: [(torch.ones(3, 48), position_ids(next(counter))) for _ in items],
    )
    with pytest.raises((BadItemsError, ProcessError), match=text):
        engine.submit(data_urls)
