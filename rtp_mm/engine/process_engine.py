"""`MMProcessEngine`: async inside, with a synchronous face. One request's way: fetch, cache, preprocess, forward."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from rtp_mm.config import Settings, load_settings
from rtp_mm.engine.batcher import Batcher
from rtp_mm.engine.caches import CacheKey, Embedded, EmbeddingCache
from rtp_mm.engine.interface import as_inputs, time_limit_s
from rtp_mm.engine.workers import PreprocessWorkers
from rtp_mm.errors import (
    BadItemsError,
    DeadlineError,
    DrainingError,
    ItemFailure,
    MMError,
    ProcessError,
    QueueFullError,
)
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.redact import redact
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.types import (
    LIBRARY_CALLER,
    CacheStatus,
    Caller,
    MMEmbeddingRes,
    MMPreprocessConfig,
    MMUrlType,
    MultimodalInput,
    WorkerStatus,
)

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")
MIN_RETRY_AFTER_MS = 100  # before any forward has shown how long one takes
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
        self._data_type = model.config.data_type
        self._tower_key = (
            model.weights_fingerprint,
            self._data_type,
            str(mm_part._device),
            str(getattr(getattr(mm_part, "visual", None), "attention_backend", "")),
        )
        self._cache = EmbeddingCache(settings.mm_embedding_cache_mb << 20)
        self._workers = PreprocessWorkers(mm_part, settings.mm_preprocess_max_workers)
        self._batcher = Batcher(mm_part, ACT_DTYPES[self._data_type], settings.vit_max_batch_patches)
        self._fetcher = Fetcher(settings)
        self._requests: set[asyncio.Future[Any]] = set()  # the work of each running request
        self._finished = 0
        self._gate = threading.Lock()  # between closing and handing work to the loop
        self._is_closed = False
        self._thread: _LoopThread | None = None
        if loop is None:
            self._thread = _LoopThread()
            loop = self._thread.loop
        self._loop = loop

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
            available_concurrency=max(0, self._settings.mm_max_queue_size - len(self._requests)),
            waiting=self._batcher.waiting,
            running=len(self._requests),
            step_latency_ms=self._batcher.step_latency_ms,
            iterations=self._batcher.iterations,
            finished_version=self._finished,
            is_alive=not self._is_closed,
            precision=self._data_type,
            cache_available_bytes=cache.available_bytes,
            cache_total_bytes=cache.total_bytes,
            max_batch_tokens=self._settings.vit_max_batch_patches,
        )

    def cache_status(self, *, with_keys: bool = False) -> CacheStatus:
        async def status() -> CacheStatus:
            return self._cache.status(with_keys=with_keys)

        return self._cache.status(with_keys=with_keys) if _is_running(self._loop) else self._call(status())

    def close(self) -> None:
        if _is_running(self._loop):
            raise RuntimeError(
                "a synchronous close on the engine's own event loop would wait for itself; await aclose()"
            )
        if (shutdown := self._begin_closing()) is not None:
            shutdown.result()
            if self._thread is not None:
                self._thread.stop()

    async def aclose(self) -> None:
        if _is_running(self._loop):
            if (shutdown := self._begin_closing()) is not None:
                await asyncio.wrap_future(shutdown)
        else:
            await asyncio.to_thread(self.close)

    def _begin_closing(self) -> concurrent.futures.Future[None] | None:
        """From here on nothing is handed to the loop, so the shutdown is the last. `None` where it began before."""
        with self._gate:
            if self._is_closed:
                return None
            self._is_closed = True
            return asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)

    # --- on the loop

    async def _embed(
        self, inputs: Sequence[MultimodalInput], caller: Caller, timeout_s: float | None
    ) -> MMEmbeddingRes:
        self._admit()
        limit_s = time_limit_s(inputs, timeout_s, self._settings)
        work = asyncio.gather(*(self._embed_item(item, caller) for item in inputs), return_exceptions=True)
        self._requests.add(work)
        try:
            async with asyncio.timeout(limit_s):
                outcomes = await work
        except TimeoutError:
            raise DeadlineError(f"no answer within {limit_s:.3f} s") from None
        except asyncio.CancelledError:
            if self._is_closed:
                raise _closed() from None
            raise
        finally:
            self._requests.discard(work)
            self._finished += 1
        return _as_response(inputs, outcomes, is_own=caller is not LIBRARY_CALLER)

    def _admit(self) -> None:
        if len(self._requests) >= self._settings.mm_max_queue_size:
            retry_after_ms = max(MIN_RETRY_AFTER_MS, round(self._batcher.step_latency_ms))
            raise QueueFullError(
                f"{len(self._requests)} requests are waiting or running (MM_MAX_QUEUE_SIZE)", retry_after_ms
            )

    async def _embed_item(self, item: MultimodalInput, caller: Caller) -> tuple[Embedded, Timings]:
        options = item.config.options()
        config = MMPreprocessConfig.from_options(options)  # what the key says and no more
        self._fetcher.check_access(item, caller)
        timings: Timings = {}
        with _Stopwatch(timings, "fetch"):
            blob = await self._fetcher.fetch(item, caller)
        preprocess_key = getattr(self._mm_part.preprocessor, "cache_key", ())
        key = CacheKey(blob.content_hash, item.mm_type, options, preprocess_key, self._tower_key)
        if (cached := self._cache.get(key)) is not None:
            return cached, timings
        with _Stopwatch(timings, "preprocess"):
            prepared = await self._workers.prepare(blob, item.mm_type, config)
        embedded, device_timings = await self._batcher.run(prepared, item.mm_type, config)
        self._cache.put(key, embedded)
        return embedded, timings | device_timings

    async def _shut_down(self) -> None:
        """Ends all requests, then what they used."""
        requests = [*self._requests]
        for work in requests:
            work.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        self._workers.close()
        self._batcher.close()
        await self._fetcher.close()

    # --- between loops and threads

    async def _on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        if _is_running(self._loop) and not self._is_closed:
            return await work
        return await asyncio.wrap_future(self._hand_over(work))

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if _is_running(self._loop):
            work.close()
            raise RuntimeError("a synchronous call on the engine's own event loop would wait for itself; await embed()")
        return self._hand_over(work).result()

    def _hand_over(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        with self._gate:
            if self._is_closed:
                work.close()
                raise _closed()
            return asyncio.run_coroutine_threadsafe(work, self._loop)


def _closed() -> DrainingError:
    return DrainingError("the engine is closed")


def _as_response(
    inputs: Sequence[MultimodalInput], outcomes: Sequence[tuple[Embedded, Timings] | BaseException], *, is_own: bool
) -> MMEmbeddingRes:
    """All items' answers, or `BadItemsError` that names every bad one; a bug is raised as it is.

    `is_own`: the answer is ours to read; a library's caller, who may write into it, gets copies of what is cached.
    """
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
    items = [embedded if is_own else embedded.copy() for embedded, _ in answers]
    position_ids = [item.position_ids for item in items if item.position_ids is not None]
    if position_ids and len(position_ids) < len(items):
        raise ProcessError("the model gave position ids for some items and none for others")
    return MMEmbeddingRes([item.embedding for item in items], position_ids or None, None, timings)


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


class _LoopThread:
    """An event loop that runs on a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="rtp_mm-engine", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self.loop) as runner:
            runner.get_loop().run_forever()

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
