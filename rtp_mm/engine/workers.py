"""The CPU-bound half, off the event loop: in worker processes, or in threads of this one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rtp_mm.config import Settings
from rtp_mm.cores import CoreShare, available_cores
from rtp_mm.engine.job_queue import Check, no_check
from rtp_mm.engine.pinning import PinnedBytes
from rtp_mm.engine.third_party import as_mm_error
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.media.decode_threads import DECODE_THREADS
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.models.registry import thread_on
from rtp_mm.types import Blob, Layout, MMPreprocessConfig, MMUrlType, PreprocessOptions

DEVICE_DECODES = 4  # at once: each has a thread, a stream and a decoder's memory


class ForwardInput(NamedTuple):
    """What a forward takes, and its cost there; `None`: it goes alone."""

    value: Any
    patches: int | None


class PoolStats(NamedTuple):
    """Live figures. `restarts` only grow: crash (while it held an item), memory (killed, its item needed more than it
    may hold), overrun (killed after the item's caller had left), idle (died without an item), start (a replacement that
    did not start).
    """

    workers: int
    busy: int
    restarts: Mapping[str, int]


class PreprocessWorkers:
    """Processes for a `mm_part` with a `preprocessor`, which imports no torch; threads for any other, for all where
    USE_LOCAL_PREPROCESS=1, and for what the device decodes.

    Rows that come from processes lie in shared memory, which is used again once they and all views of them are garbage:
    whoever copies them to a device asynchronously keeps them until the copy has ended. Some may lie half in registered
    memory: `vit.packing.packed_rows` copies these too.
    """

    def __init__(
        self, mm_part: MultiModalEmbeddingInterface, settings: Settings, pool: WorkerPool | None = None
    ) -> None:
        """Blocks until the workers are ready: those of `pool`, which it owns, where they have begun already. Raises
        `StartError`.
        """
        self._mm_part = mm_part
        self._count = settings.mm_preprocess_max_workers
        self._cores = CoreShare(available_cores(), settings.mm_decode_threads)
        self._running, self._counting = 0, threading.Lock()  # threads at work
        self._processes: WorkerPool | None = None
        self._pinned: PinnedBytes | None = None
        threads = self._count
        if mm_part.preprocessor is not None and not settings.use_local_preprocess:
            threads = DEVICE_DECODES
            self._processes = pool or WorkerPool.of(settings)
            self._processes.open(mm_part.preprocessor)
            if mm_part._device.type == "cuda":
                slab = self._processes.slab
                with thread_on(mm_part._device):
                    self._pinned = PinnedBytes(slab.bytes[: slab.kept_bytes])
        elif pool is not None:
            pool.close()
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="rtp_mm-preprocess")

    async def prepare(
        self,
        blob: Blob,
        mm_type: MMUrlType,
        options: PreprocessOptions,
        layout: Layout | None = None,
        check: Check = no_check,
    ) -> ForwardInput:
        """What the model's `prepare` gives. `layout` is how its rows are predicted to lie; a process that gives others
        is replaced. Where they are not predicted, `check` is told their shape once a process knows, before it makes
        them; never where something else does.

        Raises `MMError`; a third party's own exception becomes `ProcessError`. Cancelled, a process that still runs a
        second later is killed; a thread goes on to its end.
        """
        with as_mm_error(blob.source):
            if self._processes is None:
                config = MMPreprocessConfig.from_options(options)
                return await self._in_thread(self._mm_part.prepare, blob, mm_type, config)
            on_device = self._mm_part.device_preprocessor
            if on_device is not None and on_device.may_take(blob, mm_type):
                prepared = await self._in_thread(on_device, blob, mm_type, options)
                if prepared.value is not None:
                    return prepared
            patches = await self._processes.run(blob, mm_type, options, layout, check)
            return ForwardInput(patches, self._mm_part.patches(patches))

    async def _in_thread(self, prepare: Callable[..., Any], *arguments: Any) -> ForwardInput:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._run, prepare, *arguments)

    def _run(self, prepare: Callable[..., Any], *arguments: Any) -> ForwardInput:
        with self._counting:
            self._running += 1
            DECODE_THREADS.grant(self._cores.among(self._running))
        try:
            value = prepare(*arguments)
            return ForwardInput(value, self._mm_part.patches(value))
        finally:
            with self._counting:
                self._running -= 1

    def stats(self) -> PoolStats:
        if self._processes is not None:
            return PoolStats(self._processes.ready, self._processes.busy, dict(self._processes.restarts))
        return PoolStats(self._count, self._running, {})

    def close(self) -> None:
        """For the event loop; processes are gone when it returns, a thread goes on to the end of what it does. Their
        rows may still be read; see `unpin`.
        """
        if self._processes is not None:
            self._processes.close()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def unpin(self) -> None:
        """Once the device reads rows no more, on any thread: a copy from memory that is unregistered under it fails."""
        if self._pinned is not None:
            self._pinned.close()
