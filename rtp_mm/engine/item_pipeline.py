"""An item's way from URL to embedding: `_embed_item` tells it. Each stage is done once for all who want the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from functools import partial

from rtp_mm.config import Settings
from rtp_mm.engine.admission import Admission, Cost, Visit
from rtp_mm.engine.answers import Answers
from rtp_mm.engine.batcher import Batcher
from rtp_mm.engine.caches import CountedCache, Embedded, EmbeddingKey, PatchKey
from rtp_mm.engine.contents import is_data_url
from rtp_mm.engine.flights import Flight, Flights
from rtp_mm.engine.forward import Forward, WholeForward, is_whole
from rtp_mm.engine.job_queue import Check, PredictsLayout, no_check
from rtp_mm.engine.limits import device_limits
from rtp_mm.engine.response import Answer, Begun, Stages
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.engine.workers import ForwardInput, PreprocessWorkers
from rtp_mm.errors import MMError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.limits import SizeLimit
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.types import (
    Blob,
    Caller,
    DevicePatches,
    EngineStats,
    Layout,
    LogMel,
    MMPreprocessConfig,
    MMUrlType,
    MultimodalInput,
    Patches,
    RowsShape,
)

LARGEST_HEADERS = 1 << 18  # bytes of a clip whose headers are read on the event loop; at worst it takes a millisecond
SEALED_ON_LOOP = 4 << 20  # bytes of an answer: copied in a millisecond; more would hold up all other calls
LARGEST_PATCHES_SHARE = 1 / 8  # of the patch cache, for one item: more is copied in a millisecond or more


class ItemPipeline:
    """Fetches, prepares and forwards single items with `model.mm_part`, on one event loop."""

    def __init__(
        self,
        model: MultimodalMixin,
        settings: Settings,
        clock: Callable[[], float],
        seal: Callable[[Embedded], Embedded] | None,
        pool: WorkerPool | None,
    ) -> None:
        """clock: the loop's, which `Visit.ends_at` is on. seal: puts an answer into the form that is kept, if that is
        another. pool: workers that have begun already.
        """
        self._mm_part = mm_part = model.mm_part
        self._clock = clock
        self._on_device = mm_part.device_preprocessor
        self._is_whole = is_whole(mm_part)
        forward = (WholeForward if self._is_whole else Forward)(mm_part, ACT_DTYPES[model.config.data_type])
        self.limits = device_limits(mm_part, settings)
        mm_part.bound_clips(self.limits.item)
        self._predictor = mm_part.preprocessor if isinstance(mm_part.preprocessor, PredictsLayout) else None
        if seal is None and mm_part._device.type == "cuda":
            seal = Embedded.copy  # out of page-locked memory, of which torch takes up to twice as much
        self._seal = seal
        self.batcher = Batcher(forward, self.limits.batch)
        self.admission = Admission(
            settings.mm_max_queue_size,
            self.limits.queue,
            settings.mm_max_bytes_in_flight_mb << 20,
            self.batcher.seconds_for,
        )
        self.answers = Answers(model, settings.mm_embedding_cache_mb << 20)
        self.patch_cache = CountedCache[PatchKey, Patches | LogMel](
            settings.mm_patch_cache_mb << 20, largest_share=LARGEST_PATCHES_SHARE
        )
        self.fetcher = Fetcher(settings)
        self.workers = PreprocessWorkers(mm_part, settings, pool)
        self._fetches = Flights[Blob]()
        self._computations = Flights[Answer]()
        self._decoded_frames = 0

    def begin(self, item: MultimodalInput, caller: Caller, visit: Visit) -> Begun:
        """As far as it goes without waiting: to the answer, where that is kept, or to a refusal."""
        try:
            self.fetcher.check_access(item, caller)
            options = item.config.options()
            blob = self.fetcher.at_hand(item)
            if (known := self.answers.recall(item, blob, options)) is None:
                if blob is None:
                    self._check_room(item, visit)
                return Begun(None, options, blob)
            self.admission.keep_answer(visit, known.nbytes)
        except MMError as error:
            return Begun(error)
        return Begun(Answer(known, {}))

    async def end(
        self, begun: Begun, item: MultimodalInput, caller: Caller, visit: Visit, stages: Stages
    ) -> Answer | MMError:
        """The rest of the way. An answer counts as held from here on, while other items are still under way."""
        if begun.outcome is not None:
            return begun.outcome
        try:
            answer = await self._embed_item(item, begun, caller, visit, stages)
            self.admission.keep_answer(visit, answer.embedded.nbytes)
        except MMError as error:
            return error
        return answer

    async def _embed_item(
        self, item: MultimodalInput, begun: Begun, caller: Caller, visit: Visit, stages: Stages
    ) -> Answer:
        options = begun.options
        if self._is_whole:
            await self.fetcher.check_path(item)  # the part opens it itself: no reading of ours looks where a path leads
            config = MMPreprocessConfig.from_options(options)
            return Answer(*await self.batcher.run(item, None, item.mm_type, config))
        if (blob := begun.blob) is None:
            with stages.inside("fetch"):
                blob = await self._fetch(item, caller, visit, stages)
        key = self.answers.key(item, blob, options)
        if (known := self.answers.get(key)) is not None:
            return Answer(known, stages.so_far())
        layout = await self._predict_layout(key.patches, blob)
        self._admit(key, layout and layout.shape, visit)
        embedded, computed = await self._computations.join(
            key, visit, stages, partial(self._compute, key, blob, layout)
        )
        return Answer(embedded, stages.so_far() | computed)

    async def _fetch(self, item: MultimodalInput, caller: Caller, visit: Visit, stages: Stages) -> Blob:
        """One download for all who want the same now. What came with the message itself is at hand already."""

        async def fetch(visits: Collection[Visit]) -> Blob:
            with self.admission.metering(visits) as meter:
                return await self.fetcher.fetch(item, caller, meter)

        if _is_enclosed(item):
            return await fetch([visit])
        return await self._fetches.join(self._fetch_key(item), visit, stages, lambda flight: fetch(flight.visits))

    def _check_room(self, item: MultimodalInput, visit: Visit) -> None:
        """Raises `QueueFullError` for what would begin a download in vain."""
        if not _is_enclosed(item) and self._fetch_key(item) not in self._fetches:
            self.admission.check_room(visit, len(self._fetches))

    def _fetch_key(self, item: MultimodalInput) -> tuple[str, SizeLimit]:
        return item.url, self.fetcher.limit(item)

    async def _predict_layout(self, key: PatchKey, blob: Blob) -> Layout | None:
        """How the item's rows will lie, read from its headers before memory is spent; `None` where they do not tell: a
        third party's, a container's. Raises `WrongFormatError` for an item over a limit, and `NotSupportedError`.
        """
        if self._predictor is None:
            return None
        if key.mm_type is MMUrlType.VIDEO and blob.nbytes > LARGEST_HEADERS:
            return await asyncio.to_thread(self._predictor.predict, blob, key.mm_type, key.options)
        return self._predictor.predict(blob, key.mm_type, key.options)

    def _admit(self, key: EmbeddingKey, rows: RowsShape | None, visit: Visit) -> None:
        """Raises `WrongFormatError` for an item too large for the device, `QueueFullError` for one that would come too
        late.
        """
        if rows is None:
            return
        self.limits.check_item(rows[0])
        if key not in self._computations:
            self._check_in_time(rows, visit)

    def _check_in_time(self, rows: RowsShape, visit: Visit) -> None:
        """Raises `QueueFullError`."""
        self.admission.check_in_time(visit, self.batcher.seconds_before(rows[0]), self._clock())

    async def _compute(self, key: EmbeddingKey, blob: Blob, layout: Layout | None, flight: Flight[Answer]) -> Answer:
        """Prepare and forward: once for all who want the same now, whoever came first. None is refused for another."""
        config = MMPreprocessConfig.from_options(key.patches.options)  # what the key says and no more
        stages = flight.stages
        cost = Cost.of(blob, layout and layout.shape)
        with self.admission.holding(self.admission.foremost(flight.visits), cost) as held:

            def check(shape: RowsShape) -> None:
                """Of what a worker alone knows: a container before it decodes, a turned image before it resizes."""
                self.limits.check_item(shape[0])
                visit = self.admission.foremost(flight.visits)
                self._check_in_time(shape, visit)
                held.expect(Cost.of(blob, shape), visit)

            with stages.inside("preprocess"):
                prepared = await self._prepare(key.patches, blob, layout, check if self._predictor else no_check)
            if prepared.patches is not None:
                self.limits.check_item(prepared.patches)
                if not held.cost.patches:  # nobody predicted them
                    nbytes = blob.nbytes + getattr(prepared.value, "nbytes", 0)
                    held.settle(Cost(prepared.patches, nbytes, blob.nbytes))
            with stages.inside("queue"):  # and the forward, which only the batcher tells apart
                embedded, on_device = await self.batcher.run(*prepared, key.patches.mm_type, config)
        if isinstance(prepared.value, Patches | DevicePatches):
            embedded = embedded._replace(seconds_per_grid=prepared.value.seconds_per_grid)
        elif isinstance(prepared.value, LogMel):
            embedded = embedded._replace(cut_s=prepared.value.cut_s)
        embedded = await self._sealed(embedded)
        self.answers.put(key, embedded)
        return Answer(embedded, stages.so_far() | on_device)

    async def _sealed(self, embedded: Embedded) -> Embedded:
        if self._seal is None:
            return embedded
        if embedded.nbytes <= SEALED_ON_LOOP:
            return self._seal(embedded)
        return await asyncio.to_thread(self._seal, embedded)

    async def _prepare(self, key: PatchKey, blob: Blob, layout: Layout | None, check: Check) -> ForwardInput:
        if (kept := self.patch_cache.get(key)) is not None:
            return ForwardInput(kept, self._mm_part.patches(kept))
        prepared = await self.workers.prepare(blob, key.mm_type, key.options, layout, check)
        self._decoded_frames += getattr(prepared.value, "decoded_frames", 0)
        if isinstance(prepared.value, Patches | LogMel) and self.patch_cache.has_room_for(prepared.value.nbytes):
            # A copy: the rows may be a worker's memory, given back after the forward.
            self.patch_cache.put(key, prepared.value.copy())
        return prepared

    def stats(self) -> EngineStats:
        workers = self.workers.stats()
        return EngineStats(
            requests_running=self.admission.requests,
            items_waiting=self.batcher.waiting,
            patches_waiting=self.batcher.waiting_patches,
            bytes_in_flight=self.admission.nbytes,
            batches=self.batcher.forwards,
            batch_patches=self.batcher.patches,
            batch_items=self.batcher.items,
            batch_patches_budget=self.limits.batch,
            forward_failures=self.batcher.failures,
            rejections=dict(self.admission.rejections),
            caches={
                "bytes": self.fetcher.cache_stats(),
                "patches": self.patch_cache.stats(),
                "embeddings": self.answers.stats(),
            },
            workers=workers.workers,
            workers_busy=workers.busy,
            worker_restarts=workers.restarts,
            fetched_bytes=self.fetcher.fetched_bytes,
            decoded_frames=self._decoded_frames,
            device_decodes=self._on_device.decodes if self._on_device is not None else 0,
            cpu_decodes=dict(self._on_device.cpu_decodes) if self._on_device is not None else {},
        )

    async def close(self) -> None:
        """Ends what nobody waits for any more, then what it used."""
        await self._fetches.settle()
        await self._computations.settle()
        last_read = self.batcher.close()
        self.workers.close()
        last_read.add_done_callback(lambda _: self.workers.unpin())  # a hung device holds no shutdown up
        await self.fetcher.close()


def _is_enclosed(item: MultimodalInput) -> bool:
    """Whether the message itself holds what others name by URL."""
    return item.mm_type is MMUrlType.TENSOR or is_data_url(item)
