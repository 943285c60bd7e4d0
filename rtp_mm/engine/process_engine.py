"""`MMProcessEngine`: async inside, with a synchronous face. `_embed` tells a request's way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

from rtp_mm.config import Settings, load_settings
from rtp_mm.engine.admission import Visit
from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.home import Home, closed
from rtp_mm.engine.interface import ClosedByWith, TimeLimit, as_inputs, time_limit
from rtp_mm.engine.item_pipeline import ItemPipeline
from rtp_mm.engine.response import Answer, Begun, Stages, Timings, as_response, slowest
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.errors import DeadlineError, MMError, QueueFullError
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.types import (
    LIBRARY_CALLER,
    CacheStatus,
    Caller,
    EngineStats,
    MMEmbeddingRes,
    MMUrlType,
    MultimodalInput,
    WorkerStatus,
)

if TYPE_CHECKING:
    from torch import Tensor
BEGUN_AT_ONCE = 4 << 20  # bytes of URLs and tensors; they are hashed in a millisecond


class MMProcessEngine(ClosedByWith):
    """Answers requests with `model.mm_part`. Implements `rtp_mm.engine.interface.Engine`.

    Lives on `loop`, a running event loop, or, without one, on a thread with a loop of its own.
    """

    def __init__(
        self,
        model: MultimodalMixin,
        settings: Settings | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        seal: Callable[[Embedded], Embedded] | None = None,
        pool: WorkerPool | None = None,
    ) -> None:
        """seal: puts an answer into the form that it is kept in, if that is another than it is in.
        pool: workers that have begun already, for a model with a `preprocessor`; by default it starts its own.
        """
        self._settings = settings = settings or model.config.settings or load_settings()
        self._data_type = model.config.data_type
        self._items = ItemPipeline(model, settings, lambda: self._home.loop.time(), seal, pool)
        self._home = Home(loop)  # after what may fail: it starts a thread
        self._home.close_at_exit(self.close)
        self._requests: dict[asyncio.Task[Any], asyncio.Future[None]] = {}  # those that wait, and the end of each
        self._ended: set[asyncio.Task[Any]] = set()  # by the end of the engine
        self._finished = 0

    # --- a request's way

    async def embed(
        self, inputs: Sequence[MultimodalInput], *, caller: Caller = LIBRARY_CALLER, timeout_s: float | None = None
    ) -> MMEmbeddingRes:
        return await self._home.run(self._embed(inputs, caller, timeout_s))

    def submit(
        self,
        urls: Sequence[str | os.PathLike[str]],
        types: Sequence[MMUrlType] | None = None,
        tensors: Sequence[Tensor | None] | None = None,
        preprocess_configs: Sequence[Any] | None = None,
    ) -> MMEmbeddingRes:
        inputs = as_inputs(urls, types, tensors, preprocess_configs)
        return self._home.call(self._embed(inputs, LIBRARY_CALLER, None))

    async def _embed(
        self, inputs: Sequence[MultimodalInput], caller: Caller, timeout_s: float | None
    ) -> MMEmbeddingRes:
        limit = time_limit(inputs, timeout_s, self._settings)
        nbytes = sum(item.nbytes for item in inputs)
        with self._items.admission.visiting(nbytes, self._home.loop.time() + limit.seconds) as visit:
            try:
                if limit.seconds <= 0:
                    raise _late(limit, {})
                begun = await self._begin(inputs, caller, visit)
                outcomes: Sequence[Answer | BaseException | None] = [each.outcome for each in begun]
                is_refused = any(isinstance(outcome, QueueFullError) for outcome in outcomes)  # and so are its others
                if not is_refused and any(outcome is None for outcome in outcomes):
                    ways = [
                        self._in_time(limit, each, item, caller, visit)
                        for each, item in zip(begun, inputs, strict=True)
                    ]
                    outcomes = await self._all(ways)
                may_share = caller is not LIBRARY_CALLER
                response = as_response(inputs, outcomes, may_share=may_share)
            except MMError as error:
                error.timings_ms = slowest(stages.so_far() for stages in visit.stages)
                raise
            finally:
                self._finished += 1
            if may_share:  # the library's caller may keep it for ever
                self._items.admission.follow(response, sum(embedding.nbytes for embedding in response.embeddings))
            return response

    async def _begin(self, inputs: Sequence[MultimodalInput], caller: Caller, visit: Visit) -> list[Begun]:
        """All items, in order; others have their turn on the loop where data URLs take long to be recognised."""
        begun, seen_bytes = [], 0
        for item in inputs:
            begun.append(self._items.begin(item, caller, visit))
            seen_bytes += item.nbytes
            if seen_bytes > BEGUN_AT_ONCE:
                seen_bytes = 0
                await asyncio.sleep(0)
        return begun

    async def _in_time(
        self, limit: TimeLimit, begun: Begun, item: MultimodalInput, caller: Caller, visit: Visit
    ) -> Answer | MMError:
        """An item's outcome: a `DeadlineError` where it is not there as the request's time is over."""
        visit.stages.append(stages := Stages())
        try:
            async with asyncio.timeout_at(visit.ends_at) as time:
                return await self._items.end(begun, item, caller, visit, stages)
        except TimeoutError:
            if not time.expired():
                raise
            return _late(limit, stages.so_far())

    async def _all(self, ways: Sequence[Coroutine[Any, Any, Answer | MMError]]) -> Sequence[Answer | BaseException]:
        """Side by side, each to its own end. Raises `DrainingError` where the engine is closed."""
        task = asyncio.current_task()
        assert task is not None
        ended = self._requests[task] = self._home.loop.create_future()
        try:
            if len(ways) == 1:
                return [await ways[0]]  # without a task of its own
            outcomes: Sequence[Answer | BaseException] = await asyncio.gather(*ways, return_exceptions=True)
            return outcomes
        except asyncio.CancelledError:
            if task not in self._ended:
                raise
            task.uncancel()
            raise closed() from None
        finally:
            del self._requests[task]
            ended.set_result(None)

    # --- figures

    def worker_status(self) -> WorkerStatus:
        embeddings, batcher = self._items.answers.stats(), self._items.batcher
        return WorkerStatus(
            available_concurrency=max(0, self._settings.mm_max_queue_size - self._items.admission.requests),
            waiting=batcher.waiting,
            running=self._items.admission.requests,
            step_latency_ms=batcher.step_latency_ms,
            iterations=batcher.forwards,
            finished_version=self._finished,
            is_alive=not (self._home.is_closed or batcher.is_device_gone or batcher.is_hung),
            precision=self._data_type,
            cache_available_bytes=embeddings.budget_bytes - embeddings.used_bytes,
            cache_total_bytes=embeddings.budget_bytes,
            max_batch_tokens=self._items.limits.batch,
        )

    def cache_status(self, *, with_keys: bool = False) -> CacheStatus:
        async def status() -> CacheStatus:
            return self._items.answers.status(with_keys=with_keys)

        return self._items.answers.status(with_keys=with_keys) if self._home.is_here else self._home.call(status())

    def stats(self) -> EngineStats:
        return self._items.stats()

    # --- the end

    def close(self) -> None:
        self._home.close(self._shut_down)

    async def aclose(self) -> None:
        await self._home.aclose(self._shut_down)

    async def _shut_down(self) -> None:
        """Ends all requests, then what they used."""
        self._ended = {*self._requests}
        for task in self._ended:
            task.cancel()
        await asyncio.gather(*self._requests.values())
        await self._items.close()


def _late(limit: TimeLimit, timings: Timings) -> DeadlineError:
    spent = ", ".join(f"{stage} {milliseconds / 1e3:.3f} s" for stage, milliseconds in timings.items())
    return DeadlineError(f"no answer within {limit}" + f" ({spent})" * bool(spent))
