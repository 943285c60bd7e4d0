"""One device thread that never waits while there is work: a batch is whatever is ready when the device is free."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.workers import Prepared
from rtp_mm.errors import MMError, ProcessError
from rtp_mm.models.multimodal_common import Embedding, MultiModalEmbeddingInterface, as_embedding
from rtp_mm.types import MMPreprocessConfig, MMUrlType

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Work:
    """A prepared input on its way through the device."""

    prepared: Any
    patches: int | None  # `None`: goes alone
    mm_type: MMUrlType
    config: MMPreprocessConfig
    answer: asyncio.Future[Embedded]
    queued_at: float = field(default_factory=time.perf_counter)
    timings_ms: dict[str, float] = field(default_factory=dict)


class Batcher:
    """Packs prepared inputs into forwards of at most `max_patches`; lives on one event loop.

    A forward that fails is repeated item by item, so that only what is bad fails.
    """

    def __init__(self, mm_part: MultiModalEmbeddingInterface, dtype: torch.dtype, max_patches: int) -> None:
        self._mm_part = mm_part
        self._dtype = dtype
        self._max_patches = max_patches
        self._queue: deque[Work] = deque()
        self._feeder: asyncio.Task[None] | None = None
        self._device_thread = ThreadPoolExecutor(1, thread_name_prefix="rtp_mm-device")
        self.iterations = 0
        self.step_latency_ms = 0.0  # of the last forward

    @property
    def waiting(self) -> int:
        return len(self._queue)

    async def run(
        self, prepared: Prepared, mm_type: MMUrlType, config: MMPreprocessConfig
    ) -> tuple[Embedded, dict[str, float]]:
        """The embedding on the host, and milliseconds in the queue and in the forward.

        Work whose caller is cancelled before its forward begins is dropped. Raises `ProcessError`.
        """
        work = Work(prepared.value, prepared.patches, mm_type, config, asyncio.get_running_loop().create_future())
        self._queue.append(work)
        if self._feeder is None or self._feeder.done():
            self._feeder = asyncio.create_task(self._feed())
        return await work.answer, work.timings_ms

    async def _feed(self) -> None:
        while batch := self._take():
            try:
                await self._forward(batch)
            finally:  # whatever happened: nobody waits for an answer that cannot come
                for work in batch:
                    if not work.answer.done():
                        work.answer.set_exception(ProcessError("the engine stopped before the forward ended"))

    def _take(self) -> list[Work]:
        """The oldest work, and what follows it as far as the budget goes."""
        batch: list[Work] = []
        patches = 0
        while self._queue:
            work = self._queue[0]
            cost = self._max_patches if work.patches is None else work.patches
            if batch and patches + cost > self._max_patches:
                break
            self._queue.popleft()
            if not work.answer.done():  # its caller left
                batch.append(work)
                patches += cost
        return batch

    async def _forward(self, batch: list[Work]) -> None:
        started = time.perf_counter()
        step = asyncio.get_running_loop().run_in_executor(self._device_thread, self._process, batch)
        await asyncio.wait([step])
        self.iterations += 1
        self.step_latency_ms = (time.perf_counter() - started) * 1e3
        error = step.exception()
        if error is not None and len(batch) > 1:
            for work in batch:
                if not work.answer.done():
                    await self._forward([work])
            return
        for i, work in enumerate(batch):
            work.timings_ms = {"queue": (started - work.queued_at) * 1e3, "forward": self.step_latency_ms}
            if work.answer.done():
                continue
            if error is not None:
                work.answer.set_exception(_as_mm_error(error))
            elif isinstance(outcome := step.result()[i], MMError):
                work.answer.set_exception(outcome)
            else:
                work.answer.set_result(outcome)

    def _process(self, batch: Sequence[Work]) -> list[Embedded | MMError]:
        """On the device thread."""
        with torch.inference_mode():
            results = self._mm_part.mm_process_batch(
                [work.prepared for work in batch], [work.mm_type for work in batch], [work.config for work in batch]
            )
            if len(results) != len(batch):
                raise ProcessError(f"the model answered {len(batch)} items with {len(results)} embeddings")
            return _to_host([as_embedding(result) for result in results], self._dtype)

    def close(self) -> None:
        self._device_thread.shutdown(wait=False, cancel_futures=True)


def _to_host(results: Sequence[Embedding], dtype: torch.dtype) -> list[Embedded | MMError]:
    """Each answer in host memory of its own, so that keeping one does not keep its whole batch; see `_checked`."""
    copies = [
        Embedded(
            _own_host_copy(embedding.reshape(-1, embedding.shape[-1]), dtype),
            None if position_ids is None else _own_host_copy(position_ids.reshape(-1, 3), torch.int32),
        )
        for embedding, position_ids in results
    ]
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # the one wait: all copies above were asynchronous
    return [_checked(copy) for copy in copies]


def _checked(item: Embedded) -> Embedded | MMError:
    """The item, or what is wrong with it: NaN never leaves, and every token has its position."""
    if not torch.isfinite(item.embedding).all():
        return ProcessError("the embedding holds NaN or infinite values")
    if item.position_ids is not None and len(item.position_ids) != len(item.embedding):
        return ProcessError(f"{len(item.embedding)} tokens have {len(item.position_ids)} position ids")
    return item


def _own_host_copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    host = torch.empty(tensor.shape, dtype=dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)


def _as_mm_error(error: BaseException) -> MMError:
    """Callers get the error's type; its text and stack, which may hold secrets, stay in the log."""
    if isinstance(error, MMError):
        return error
    _log.error("the forward failed", exc_info=error)
    return ProcessError(f"the forward failed with {type(error).__name__}")
