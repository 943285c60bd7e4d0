"""`MMProcessEngine`: async inside, with a synchronous face. `_embed_item` tells an item's way from URL to embedding."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from rtp_mm.config import Settings, load_settings
from rtp_mm.engine.admission import Admission, Cost, Predicts, Visit, predicted_patches
from rtp_mm.engine.answers import Answers
from rtp_mm.engine.batcher import Batcher
from rtp_mm.engine.caches import ByteCache, Embedded, EmbeddingKey, PatchKey
from rtp_mm.engine.contents import is_data_url
from rtp_mm.engine.flights import Flights
from rtp_mm.engine.forward import Forward, WholeForward
from rtp_mm.engine.home import Home, closed
from rtp_mm.engine.interface import as_inputs, time_limit_s
from rtp_mm.engine.limits import bound_clips, device_limits
from rtp_mm.engine.response import Answer, Begun, Stopwatch, Timings, as_response
from rtp_mm.engine.workers import ForwardInput, PreprocessWorkers
from rtp_mm.errors import DeadlineError, MMError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.limits import SizeLimit
from rtp_mm.models.multimodal_common import ACT_DTYPES, MultiModalEmbeddingInterface
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.types import (
    LIBRARY_CALLER,
    Blob,
    CacheStatus,
    Caller,
    DevicePatches,
    EngineStats,
    LogMel,
    MMEmbeddingRes,
    MMPreprocessConfig,
    MMUrlType,
    MultimodalInput,
    Patches,
    WorkerStatus,
)

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_PATCHES_SHARE = 1 / 8  # of the patch cache, for one item: more is copied in a millisecond or more


class MMProcessEngine:
    """Answers requests with `model.mm_part`. Implements `rtp_mm.engine.interface.Engine`.

    Lives on `loop`, a running event loop, or, without one, on a thread with a loop of its own.
    """

    def __init__(
        self,
        model: MultimodalMixin,
        settings: Settings | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
        seal: Callable[[Embedded], Embedded] = lambda embedded: embedded,
    ) -> None:
        """`seal` puts an answer into the form that it is kept in."""
        self._settings = settings = settings or model.config.settings or load_settings()
        self._mm_part = mm_part = model.mm_part
        self._data_type = model.config.data_type
        self._on_device = mm_part.device_preprocessor
        self._predictor = mm_part.preprocessor if isinstance(mm_part.preprocessor, Predicts) else None
        self._row_bytes = getattr(mm_part.preprocessor, "row_bytes", 0)
        self._seal = seal
        self._is_whole = type(mm_part).mm_embedding is not MultiModalEmbeddingInterface.mm_embedding
        forward = (WholeForward if self._is_whole else Forward)(mm_part, ACT_DTYPES[self._data_type])
        self._limits = device_limits(mm_part, settings)
        bound_clips(mm_part, self._limits)
        self._batcher = Batcher(forward, self._limits.batch)
        self._admission = Admission(
            settings.mm_max_queue_size,
            self._limits.queue,
            settings.mm_max_bytes_in_flight_mb << 20,
            self._batcher.seconds_for,
        )
        self._answers = Answers(model, settings.mm_embedding_cache_mb << 20)
        self._patches = ByteCache[PatchKey, Patches | LogMel](
            settings.mm_patch_cache_mb << 20, largest_share=LARGEST_PATCHES_SHARE
        )
        self._fetcher = Fetcher(settings)
        self._fetches = Flights[Blob]()
        self._workers = PreprocessWorkers(mm_part, settings)
        self._computations = Flights[Answer]()
        self._requests: dict[asyncio.Task[Any], asyncio.Future[None]] = {}  # those that wait, and the end of each
        self._finished = 0
        self._decoded_frames = 0
        self._home = Home(loop)

    # --- an item's way

    def _begin(self, item: MultimodalInput, caller: Caller, visit: Visit) -> Begun:
        """As far as it goes without waiting: to the answer, where that is kept, or to a refusal."""
        timings: Timings = {}
        try:
            self._fetcher.check_access(item, caller)
            options = item.config.options()
            with Stopwatch(timings, "fetch"):
                blob = self._fetcher.at_hand(item)
            if (known := self._answers.recall(item, blob, options)) is None:
                if blob is None:
                    self._check_room(item, visit)
                return Begun(None, options, blob)
        except MMError as error:
            return Begun(error)
        self._admission.keep(visit, known.nbytes)
        return Begun(Answer(known, {} if blob is None else timings))

    async def _end(self, begun: Begun, item: MultimodalInput, caller: Caller, visit: Visit) -> Answer | MMError:
        """The rest of the way. An answer counts as held from here on, while other items are still under way."""
        if begun.outcome is not None:
            return begun.outcome
        try:
            answer = await self._embed_item(item, begun, caller, visit)
        except MMError as error:
            return error
        self._admission.keep(visit, answer.embedded.nbytes)
        return answer

    async def _embed_item(self, item: MultimodalInput, begun: Begun, caller: Caller, visit: Visit) -> Answer:
        options = begun.options
        if self._is_whole:
            config = MMPreprocessConfig.from_options(options)
            return Answer(*await self._batcher.run(item, None, item.mm_type, config))
        timings: Timings = {}
        with Stopwatch(timings, "fetch"):
            blob = begun.blob or await self._fetch(item, caller, visit)
        key = self._answers.key(item, blob, options)
        if (known := self._answers.get(key)) is not None:
            return Answer(known, timings)
        cost = self._admit(key.patches, blob, visit, is_under_way=key in self._computations)
        embedded, computed = await self._computations.join(key, partial(self._compute, key, blob, cost, visit))
        return Answer(embedded, timings | computed)

    async def _fetch(self, item: MultimodalInput, caller: Caller, visit: Visit) -> Blob:
        """One download for all who want the same now. What came with the message itself is at hand already."""

        async def fetch() -> Blob:
            with self._admission.metering(visit) as meter:
                return await self._fetcher.fetch(item, caller, meter)

        if _is_enclosed(item):
            return await fetch()
        return await self._fetches.join(self._fetch_key(item), fetch)

    def _check_room(self, item: MultimodalInput, visit: Visit) -> None:
        """Raises `QueueFullError` for what would begin a download in vain."""
        if not _is_enclosed(item) and self._fetch_key(item) not in self._fetches:
            self._admission.check_room(visit)

    def _fetch_key(self, item: MultimodalInput) -> tuple[str, SizeLimit]:
        return item.url, self._fetcher.limit(item)

    def _admit(self, key: PatchKey, blob: Blob, visit: Visit, *, is_under_way: bool) -> Cost:
        """What the item will take, read from its header before memory is spent. Raises `WrongFormatError` for an item
        over a limit, `QueueFullError` for one that would come too late.
        """
        patches = predicted_patches(self._predictor, blob, key.mm_type, key.options)
        if patches is None:  # a third party's, or no image: its own code judges
            return Cost(0, blob.nbytes)
        self._admission.check_item(patches, self._limits.item)
        if not is_under_way:
            self._admission.check_in_time(visit, self._batcher.seconds_before(patches), self._home.loop.time())
        return Cost(patches, blob.nbytes + patches * self._row_bytes)

    async def _compute(self, key: EmbeddingKey, blob: Blob, cost: Cost, visit: Visit) -> Answer:
        """Prepare and forward: once for all who want the same now, whoever came first."""
        config = MMPreprocessConfig.from_options(key.patches.options)  # what the key says and no more
        timings: Timings = {}
        with self._admission.holding(visit, cost):
            with Stopwatch(timings, "preprocess"):
                prepared = await self._prepare(key.patches, blob, cost.patches)
            if prepared.patches is not None:
                self._admission.check_item(prepared.patches, self._limits.item)
            embedded, device_timings = await self._batcher.run(*prepared, key.patches.mm_type, config)
        if isinstance(prepared.value, Patches | DevicePatches):
            embedded = embedded._replace(seconds_per_grid=prepared.value.seconds_per_grid)
        elif isinstance(prepared.value, LogMel):
            embedded = embedded._replace(cut_s=prepared.value.cut_s)
        embedded = self._seal(embedded)
        self._answers.put(key, embedded)
        return Answer(embedded, timings | device_timings)

    async def _prepare(self, key: PatchKey, blob: Blob, patches: int) -> ForwardInput:
        if (kept := self._patches.get(key)) is not None:
            return ForwardInput(kept, self._mm_part.patches(kept))
        shape = (patches, self._row_bytes) if patches else None
        prepared = await self._workers.prepare(blob, key.mm_type, key.options, shape)
        self._decoded_frames += getattr(prepared.value, "decoded_frames", 0)
        if isinstance(prepared.value, Patches | LogMel) and self._patches.has_room_for(prepared.value.nbytes):
            # A copy: the rows may be a worker's memory, given back after the forward.
            self._patches.put(key, prepared.value.copy())
        return prepared

    # --- a request's way

    async def embed(
        self, inputs: Sequence[MultimodalInput], *, caller: Caller = LIBRARY_CALLER, timeout_s: float | None = None
    ) -> MMEmbeddingRes:
        return await self._home.run(self._embed(inputs, caller, timeout_s))

    def submit(
        self,
        urls: Sequence[str],
        types: Sequence[MMUrlType] | None = None,
        tensors: Sequence[Tensor | None] | None = None,
        preprocess_configs: Sequence[Any] | None = None,
    ) -> MMEmbeddingRes:
        inputs = as_inputs(urls, types, tensors, preprocess_configs)
        return self._home.call(self._embed(inputs, LIBRARY_CALLER, None))

    async def _embed(
        self, inputs: Sequence[MultimodalInput], caller: Caller, timeout_s: float | None
    ) -> MMEmbeddingRes:
        limit_s = time_limit_s(inputs, timeout_s, self._settings)
        with self._admission.visiting(sum(map(_message_bytes, inputs)), self._home.loop.time() + limit_s) as visit:
            try:
                if limit_s <= 0:
                    raise _late(limit_s)
                begun = [self._begin(item, caller, visit) for item in inputs]
                outcomes: Sequence[Answer | BaseException] = [
                    each.outcome for each in begun if each.outcome is not None
                ]
                if len(outcomes) < len(begun):
                    ways = [self._end(each, item, caller, visit) for each, item in zip(begun, inputs, strict=True)]
                    outcomes = await self._all_within(limit_s, ways)
            finally:
                self._finished += 1
            is_own = caller is not LIBRARY_CALLER
            response = as_response(inputs, outcomes, is_own=is_own)
            if is_own:  # the library's caller may keep it for ever
                self._admission.follow(response, sum(embedding.nbytes for embedding in response.embeddings))
            return response

    async def _all_within(
        self, limit_s: float, ways: Sequence[Coroutine[Any, Any, Answer | MMError]]
    ) -> Sequence[Answer | BaseException]:
        """Side by side, each to its own end. Raises `DeadlineError`, and `DrainingError` where the engine is closed."""
        task = asyncio.current_task()
        assert task is not None
        ended = self._requests[task] = self._home.loop.create_future()
        try:
            async with asyncio.timeout(limit_s):
                if len(ways) == 1:
                    return [await ways[0]]  # without a task of its own
                outcomes: Sequence[Answer | BaseException] = await asyncio.gather(*ways, return_exceptions=True)
                return outcomes
        except TimeoutError:
            raise _late(limit_s) from None
        except asyncio.CancelledError:
            if not self._home.is_closed:
                raise
            task.uncancel()
            raise closed() from None
        finally:
            del self._requests[task]
            ended.set_result(None)

    # --- figures

    def worker_status(self) -> WorkerStatus:
        embeddings = self._answers.stats()
        return WorkerStatus(
            available_concurrency=max(0, self._settings.mm_max_queue_size - self._admission.requests),
            waiting=self._batcher.waiting,
            running=self._admission.requests,
            step_latency_ms=self._batcher.step_latency_ms,
            iterations=self._batcher.forwards,
            finished_version=self._finished,
            is_alive=not (self._home.is_closed or self._batcher.is_device_gone),
            precision=self._data_type,
            cache_available_bytes=embeddings.budget_bytes - embeddings.used_bytes,
            cache_total_bytes=embeddings.budget_bytes,
            max_batch_tokens=self._limits.batch,
        )

    def cache_status(self, *, with_keys: bool = False) -> CacheStatus:
        async def status() -> CacheStatus:
            return self._answers.status(with_keys=with_keys)

        return self._answers.status(with_keys=with_keys) if self._home.is_here else self._home.call(status())

    def stats(self) -> EngineStats:
        workers = self._workers.stats()
        return EngineStats(
            requests_running=self._admission.requests,
            items_waiting=self._batcher.waiting,
            patches_waiting=self._batcher.waiting_patches,
            bytes_in_flight=self._admission.nbytes,
            batches=self._batcher.forwards,
            batch_patches=self._batcher.patches,
            batch_items=self._batcher.items,
            batch_patches_budget=self._limits.batch,
            forward_failures=self._batcher.failures,
            rejections=dict(self._admission.rejections),
            caches={
                "bytes": self._fetcher.bytes_cache_stats(),
                "patches": self._patches.stats(),
                "embeddings": self._answers.stats(),
            },
            workers=workers.workers,
            workers_busy=workers.busy,
            worker_restarts=workers.restarts,
            fetched_bytes=self._fetcher.fetched_bytes,
            decoded_frames=self._decoded_frames,
            device_decodes=self._on_device.decodes if self._on_device is not None else 0,
            cpu_decodes=dict(self._on_device.cpu_decodes) if self._on_device is not None else {},
        )

    # --- the end

    def close(self) -> None:
        self._home.close(self._shut_down)

    async def aclose(self) -> None:
        await self._home.aclose(self._shut_down)

    async def _shut_down(self) -> None:
        """Ends all requests, then what they used."""
        for task in self._requests:
            task.cancel()
        await asyncio.gather(*self._requests.values())
        await self._fetches.settle()
        await self._computations.settle()
        last_read = self._batcher.close()
        self._workers.close()
        last_read.add_done_callback(lambda _: self._workers.unpin())  # a hung device holds no shutdown up
        await self._fetcher.close()


def _is_enclosed(item: MultimodalInput) -> bool:
    """Whether the message itself holds what others name by URL."""
    return item.mm_type is MMUrlType.TENSOR or is_data_url(item)


def _message_bytes(item: MultimodalInput) -> int:
    """What an item's message holds in memory, about."""
    return len(item.url) + getattr(item.tensor, "nbytes", 0)


def _late(limit_s: float) -> DeadlineError:
    return DeadlineError(f"no answer within {limit_s:.3f} s")
