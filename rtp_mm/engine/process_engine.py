"""`MMProcessEngine`: async inside, with a synchronous face. One request's way: fetch, cache, preprocess, forward."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rtp_mm.config import Settings, load_settings
from rtp_mm.engine.batcher import Batcher
from rtp_mm.engine.caches import CacheKey, Embedded, EmbeddingCache
from rtp_mm.engine.interface import as_inputs
from rtp_mm.engine.workers import PreprocessWorkers
from rtp_mm.errors import BadItemsError, DeadlineError, ItemFailure, MMError, QueueFullError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.redact import redact
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.types import (
    LIBRARY_CALLER,
    CacheStatus,
    Caller,
    MMEmbeddingRes,
    MMUrlType,
    MultimodalInput,
    WorkerStatus,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
Timings = dict[str, float]


class MMProcessEngine:
    """Answers requests with `model.mm_part`. Implements `rtp_mm.engine.interface.Engine`.

    Lives on `loop`, a running event loop, or, without one, on a thread with a loop of its own.
    """

    def __init__(
        self,
        model: MultimodalMixin,
        settings: Settings | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._settings = settings = settings or model.config.settings or load_settings()
        self._mm_part = mm_part = model.mm_part
        self._tower_key = (
            model.weights_fingerprint,
            settings.act_type,
            str(mm_part._device),
            str(getattr(getattr(mm_part, "visual", None), "attention_backend", "")),
        )
        self._cache = EmbeddingCache(settings.mm_embedding_cache_mb << 20)
        self._workers = PreprocessWorkers(mm_part, settings.mm_preprocess_max_workers)
        self._batcher = Batcher(mm_part, ACT_DTYPES[settings.act_type], settings.vit_max_batch_patches)
        self._fetcher: Fetcher | None = None  # made on the loop
        self._running = 0  # requests
        self._finished = 0
        self._is_closed = False
        self._owns_loop = loop is None
        self._loop = loop or _start_loop()

    # --- the interface

    async def embed(
        self, inputs: Sequence[MultimodalInput], *, caller: Caller = LIBRARY_CALLER, timeout_s: float | None = None
    ) -> MMEmbeddingRes:
        return await self._on_loop(self._embed(inputs, caller, timeout_s))

    def submit(
        self,
        urls: Sequence[str],
        types: Sequence[MMUrlType] | None = None,
        tensors: Sequence[Tensor | None] | None = None,
        preprocess_configs: Sequence[Any] | None = None,
    ) -> MMEmbeddingRes:
        inputs = as_inputs(urls, types, tensors, preprocess_configs)
        return self._call(self._embed(inputs, LIBRARY_CALLER, None))

    def worker_status(self) -> WorkerStatus:
        cache = self._cache.status()
        return WorkerStatus(
            available_concurrency=max(0, self._settings.mm_max_queue_size - self._running),
            waiting=self._batcher.waiting,
            running=self._running,
            step_latency_ms=self._batcher.step_latency_ms,
            iterations=self._batcher.iterations,
            finished_version=self._finished,
            is_alive=True,
            precision=self._settings.act_type,
            cache_available_bytes=cache.available_bytes,
            cache_total_bytes=cache.total_bytes,
            max_batch_tokens=self._settings.vit_max_batch_patches,
        )

    def cache_status(self, *, with_keys: bool = False) -> CacheStatus:
        async def status() -> CacheStatus:
            return self._cache.status(with_keys=with_keys)

        return self._cache.status(with_keys=with_keys) if _is_running(self._loop) else self._call(status())

    def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._workers.close()
        self._batcher.close()
        if self._owns_loop:
            self._call(self._close_fetcher())
            self._loop.call_soon_threadsafe(self._loop.stop)
        elif self._fetcher is not None:
            self._loop.create_task(self._close_fetcher())

    # --- on the loop

    async def _embed(
        self, inputs: Sequence[MultimodalInput], caller: Caller, timeout_s: float | None
    ) -> MMEmbeddingRes:
        self._admit()
        try:
            async with asyncio.timeout(timeout_s):
                outcomes = await asyncio.gather(
                    *(self._embed_item(item, caller) for item in inputs), return_exceptions=True
                )
        except TimeoutError:
            raise DeadlineError(f"no answer within {timeout_s:.3f} s") from None
        finally:
            self._running -= 1
            self._finished += 1
        return _as_response(inputs, outcomes)

    def _admit(self) -> None:
        if self._running >= self._settings.mm_max_queue_size:
            retry_after_ms = max(1, round(self._batcher.step_latency_ms))
            raise QueueFullError(f"{self._running} requests are waiting or running (MM_MAX_QUEUE_SIZE)", retry_after_ms)
        self._running += 1

    async def _embed_item(self, item: MultimodalInput, caller: Caller) -> tuple[Embedded, Timings]:
        options = item.config.options()
        if self._fetcher is None:
            self._fetcher = Fetcher(self._settings)
        self._fetcher.check_access(item, caller)
        timings: Timings = {}
        with _Stopwatch(timings, "fetch"):
            blob = await self._fetcher.fetch(item, caller)
        preprocess_key = getattr(self._mm_part.preprocessor, "cache_key", ())
        key = CacheKey(blob.content_hash, item.mm_type, options, preprocess_key, self._tower_key)
        if (cached := self._cache.get(key)) is not None:
            return cached, timings
        with _Stopwatch(timings, "preprocess"):
            prepared = await self._workers.prepare(blob, item.mm_type, item.config)
        embedded, device_timings = await self._batcher.run(prepared, item.mm_type, item.config)
        self._cache.put(key, embedded)
        return embedded, timings | device_timings

    async def _close_fetcher(self) -> None:
        if self._fetcher is not None:
            await self._fetcher.close()

    # --- between loops and threads

    async def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        if _is_running(self._loop):
            return await work
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self._loop))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if _is_running(self._loop):
            work.close()
            raise RuntimeError("a synchronous call on the engine's own event loop would wait for itself; await embed()")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()


def _as_response(
    inputs: Sequence[MultimodalInput], outcomes: Sequence[tuple[Embedded, Timings] | BaseException]
) -> MMEmbeddingRes:
    """All items' answers, or `BadItemsError` that names every bad one; a bug is raised as it is."""
    failures = []
    answers: list[tuple[Embedded, Timings]] = []
    for index, (item, outcome) in enumerate(zip(inputs, outcomes, strict=True)):
        if isinstance(outcome, MMError):
            failures.append(ItemFailure(index, redact(item.url), outcome))
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            answers.append(outcome)
    if failures:
        raise BadItemsError(failures)
    timings: Timings = {}
    for _, item_timings in answers:
        for stage, milliseconds in item_timings.items():
            timings[stage] = max(milliseconds, timings.get(stage, 0.0))
    position_ids = [embedded.position_ids for embedded, _ in answers if embedded.position_ids is not None]
    return MMEmbeddingRes([embedded.embedding for embedded, _ in answers], position_ids or None, None, timings)


class _Stopwatch:
    """Writes the milliseconds spent inside it to `timings[stage]`."""

    def __init__(self, timings: Timings, stage: str) -> None:
        self._timings, self._stage = timings, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._timings[self._stage] = (time.perf_counter() - self._started) * 1e3


def _is_running(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the caller runs on `loop`."""
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


def _start_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=_run_loop, args=(loop,), name="rtp_mm-engine", daemon=True).start()
    return loop


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()
