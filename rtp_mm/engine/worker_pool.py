"""Preprocess workers as processes: blobs in, patches in shared memory out. What breaks a worker fails alone.

A pool of our own, not pebble's (5.2): there all workers share one pipe each way, so that one killed half-way through
its result leaves every later task hanging; and a task cannot ask for memory half-way.
"""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from rtp_mm.config import Settings
from rtp_mm.cores import CoreShare, available_cores
from rtp_mm.engine import worker_protocol
from rtp_mm.engine.job_queue import Check, ChecksLayout, Job, JobQueue, no_check
from rtp_mm.engine.slab import Slab, Slot
from rtp_mm.engine.third_party import as_mm_error
from rtp_mm.engine.worker_process import WorkerDiedError, WorkerProcess
from rtp_mm.errors import DrainingError, MMError, ProcessError, StartError, WrongFormatError
from rtp_mm.logs import log_event
from rtp_mm.preprocess.worker import Place, Setup
from rtp_mm.types import Blob, Layout, MMUrlType, Prepared, PreprocessOptions, RowsShape

_log = logging.getLogger(__name__)

T = TypeVar("T")

_GRACE_S = 1.0  # for work that nobody waits for any more: about what a new worker costs
_AHEAD_BYTES = 8 << 20  # larger rows get their slot only as the worker asks: the item may be cancelled before
_INLINE_BYTES = 1 << 20  # a longer copy, of 0.3 ms and more, leaves the event loop
_LARGEST_MESSAGE = 1 << 30  # bytes that a gRPC call may bring
_FIRST_RETRY_S, _LAST_RETRY_S = 0.1, 1.0  # between starts of workers that do not start


class WorkerPool:
    """`count` processes, that begin at once and wait to be told what they are for. Used on one event loop, that of the
    first `run`.
    """

    def __init__(self, *, count: int, memory_mb: int, slab_mb: int, inbox_bytes: int, cores: CoreShare) -> None:
        """Waits for nothing: while processes begin, their engine may load its model.

        memory_mb:   data of one worker, MiB.
        slab_mb:     patch rows that are written, wait or are read, MiB.
        inbox_bytes: the largest blob, and the largest preprocessor.
        cores:       for the threads of decoders, among those that run.
        """
        self._memory_bytes = memory_mb << 20
        self._inbox_bytes = inbox_bytes
        self._cores = cores
        self.slab = Slab(slab_mb << 20)
        self._jobs = JobQueue(count)
        self._busy: dict[Job, WorkerProcess] = {}
        self._idle: list[asyncio.Future[Job | None]] = []  # each a worker's turn, the latest last
        self._space_queue = asyncio.Lock()
        self._space_freed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._starting: set[WorkerProcess] = set()
        self._workers: set[WorkerProcess] = set()
        self._is_closed = False
        self.restarts: Counter[str] = Counter()  # by cause
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="rtp_mm-workers")  # they outlive the workers
        self._begun = [self._threads.submit(self._begin) for _ in range(count)]

    @classmethod
    def of(cls, settings: Settings) -> WorkerPool:
        return cls(
            count=settings.mm_preprocess_max_workers,
            memory_mb=settings.mm_worker_memory_mb,
            slab_mb=settings.mm_slab_mb,
            inbox_bytes=max(_LARGEST_MESSAGE, settings.mm_video_max_file_size_kb * 1024),
            cores=CoreShare(available_cores(), settings.mm_decode_threads),
        )

    def open(self, preprocess: Callable[..., Prepared]) -> None:
        """Before the first `run`: what all are for. Blocks until they are ready. Raises `StartError`; it is closed
        then.
        """
        try:
            self._setup = _setup(preprocess, self._memory_bytes, self._inbox_bytes)
            self._judge = preprocess if isinstance(preprocess, ChecksLayout) else None
            begun = [start.result() for start in self._begun]
            self._begun = [self._threads.submit(self._greet_or_replace, worker) for worker in begun]
            self._workers = {start.result() for start in self._begun}
            self._begun = []
        except BaseException:  # a third party's preprocessor may raise anything where it is pickled
            self.close()
            raise

    @property
    def ready(self) -> int:
        """Workers that run, idle or busy."""
        return len(self._workers)

    @property
    def busy(self) -> int:
        return len(self._busy)

    async def run(
        self,
        blob: Blob,
        mm_type: MMUrlType,
        options: PreprocessOptions,
        layout: Layout | None = None,
        check: Check = no_check,
    ) -> Prepared:
        """Rows are read-only views of the slab, given back as they become garbage. A predicted `layout` spares a small
        item a turn of the conversation; a worker that gives another is replaced. Without one, `check` is told the shape
        before rows are made.

        Cancelled, a job that waits is forgotten, one that runs has a second to end before its worker is killed. Raises
        what the preprocessor raises as `MMError`, and `ProcessError` for any other exception or a worker that died.
        """
        self._loop = asyncio.get_running_loop()
        if not self._tasks:
            self._tasks = [self._loop.create_task(self._tend(worker)) for worker in self._workers]
        job = Job(blob, mm_type, options, self._loop.create_future(), layout, check)
        self._jobs.add(job)
        self._match()
        try:
            return await job.answer
        except asyncio.CancelledError:
            self._abandon(job)
            raise

    def _match(self) -> None:
        """The next job to the worker that became idle last, whose caches are warm."""
        while self._idle and not self._is_closed and (job := self._jobs.take()) is not None:
            self._idle.pop().set_result(job)

    def _abandon(self, job: Job) -> None:
        if job in self._busy:
            self._space_freed.set()  # it may wait for space
            self._loop.call_later(_GRACE_S, self._kill_at, job)
        else:
            with suppress(ValueError):
                self._jobs.remove(job)

    def _kill_at(self, job: Job) -> None:
        if (worker := self._busy.get(job)) is not None:
            worker.kill()

    async def _tend(self, worker: WorkerProcess) -> None:
        """One worker after another."""
        while True:
            self.restarts[await self._work(worker)] += 1
            worker = await self._replacement()
            self._workers.add(worker)

    async def _work(self, worker: WorkerProcess) -> str:
        """Job after job, until the worker is dead and reaped; says what it died of."""
        worker.watch(self._loop)
        while (cause := await self._work_once(worker)) is None:
            pass  # and holds on to nothing of the last job: its patches are its caller's
        return cause

    async def _work_once(self, worker: WorkerProcess) -> str | None:
        """The next job. What the worker died of, if it did."""
        job = await self._turn(worker)
        if job is None:
            await self._reap(worker)
            return "idle"
        self._busy[job] = worker
        try:
            if not job.answer.done():  # else its caller left in the moment in which it was handed over
                job.succeed(await self._patches(worker, job))
        except MMError as error:
            job.fail(error.with_traceback(None))  # whose frames would keep the worker and its inbox
            if isinstance(error, worker_protocol.OutOfMemoryError):
                worker.kill()
                await self._reap(worker, job)
                return "memory"
            worker.clear(job.blob.nbytes)
        except WorkerDiedError as error:
            return await self._bury(worker, job, str(error))
        finally:
            del self._busy[job]
            self._jobs.end(job)
            for slot in job.slots:  # the worker answered or is reaped
                self._free(slot)
            job.slots.clear()
            self._match()  # a long job may wait for this one's end
        return None

    async def _turn(self, worker: WorkerProcess) -> Job | None:
        """The next job; `None` where the worker dies without one."""
        turn: asyncio.Future[Job | None] = self._loop.create_future()

        def dies() -> None:
            if not turn.done():
                self._idle.remove(turn)
                turn.set_result(None)

        worker.on_idle_death = dies
        self._idle.append(turn)
        self._match()
        return await turn

    async def _patches(self, worker: WorkerProcess, job: Job) -> Prepared:
        """One conversation. Every figure of the worker's is checked before anything is read or written by it."""
        content = worker_protocol.content(job.blob)
        if content.size > _INLINE_BYTES:
            await self._in_thread(worker.fill, content)
        else:
            worker.fill(content)
        place = self._place_ahead(job)
        threads = self._cores.among(self.busy)
        worker.tell(worker_protocol.task(job.blob, job.mm_type, job.options, place, threads))
        job.is_begun = True
        answer = worker_protocol.checked(await worker.answer(), job.blob.source)
        if place is None or "shape" in answer:
            place = await self._asked_place(worker, job, worker_protocol.rows_shape(answer))
            answer = worker_protocol.checked(await worker.answer(), job.blob.source)
        worker.clear(content.size)
        layout = worker_protocol.layout(answer, place.shape)
        self._check_layout(job, layout)
        prepared = worker_protocol.prepared_by(answer, layout)
        return prepared(self.slab.rows(job.slots.pop(), place.shape, self._take_back))

    def _place_ahead(self, job: Job) -> Place | None:
        """For rows as predicted, if they are few and there is room that nobody waits for."""
        if job.layout is None or (nbytes := math.prod(job.layout.shape)) > _AHEAD_BYTES or self._space_queue.locked():
            return None
        if (slot := self.slab.allocate(nbytes)) is None:
            return None
        job.slots.append(slot)
        return Place(slot.offset, job.layout.shape)

    async def _asked_place(self, worker: WorkerProcess, job: Job, shape: RowsShape) -> Place:
        """For the rows that the worker asks room for, and knows of now. Raises `WrongFormatError` for too many, what
        the job's `check` raises, and `WorkerDiedError` for others than were predicted.
        """
        if job.layout is not None and shape != job.layout.shape:
            raise WorkerDiedError(f"it asked for {shape}, predicted was {job.layout.shape}")
        nbytes = math.prod(shape)
        if job.layout is None and nbytes <= self.slab.nbytes and not job.answer.done():
            try:
                job.check(shape)
            except MMError:
                worker.tell(None)
                raise
        if (slot := await self._space(nbytes, job)) is None:
            worker.tell(None)
            raise WrongFormatError(f"{nbytes} bytes of patch rows, over the limit of {self.slab.nbytes} (MM_SLAB_MB)")
        job.slots.append(slot)
        worker.tell(slot.offset)
        return Place(slot.offset, shape)

    def _check_layout(self, job: Job, layout: Layout) -> None:
        """Raises `WorkerDiedError` for one that is not as predicted, or can be no such item's, and `ProcessError` where
        that cannot be told.
        """
        if job.layout is not None and layout != job.layout:
            raise WorkerDiedError(f"it gave {layout}, predicted was {job.layout}")
        with as_mm_error(job.blob.source):
            is_possible = self._judge is None or self._judge.is_possible(layout, job.blob, job.mm_type)
        if not is_possible:
            raise WorkerDiedError(f"it gave {layout}, which no such item has")

    async def _bury(self, worker: WorkerProcess, job: Job, breach: str) -> str:
        """Reaps it; only after that its slot may be used again. What it died of. `breach`: what it did wrong, if that
        is known.
        """
        how = await self._reap(worker, job)
        if job.answer.cancelled():
            return "overrun"
        if not job.is_begun:  # it had died before
            self._jobs.add(job)
            return "idle"
        reason = f": {breach}" if breach else ""
        job.fail(ProcessError(f"the preprocess worker {how} while it held this item{reason}"))
        return "crash"

    async def _reap(self, worker: WorkerProcess, job: Job | None = None) -> str:
        """How it ended, with `job` in its hands."""
        self._workers.remove(worker)
        worker.unwatch()  # before its socket is closed: the loop would take the next one of that number for it
        how = await self._in_thread(worker.end)
        source = job.blob.source if job is not None else None
        log_event(_log, "preprocess worker lost", logging.WARNING, pid=worker.pid, end=how, source=source)
        return how

    async def _space(self, nbytes: int, job: Job) -> Slot | None:
        """First come, first served; `None` for more than there is, or once nobody waits for the job."""
        async with self._space_queue:
            while nbytes <= self.slab.nbytes and not job.answer.done():
                if (slot := self.slab.allocate(nbytes)) is not None:
                    return slot
                self._space_freed.clear()
                await self._space_freed.wait()
        return None

    def _free(self, slot: Slot) -> None:
        self.slab.free(slot)
        self._space_freed.set()

    def _take_back(self, slot: Slot) -> None:
        """Rows became garbage, on whatever thread."""
        with suppress(RuntimeError):  # the loop is closed, and so is the pool
            self._loop.call_soon_threadsafe(self._free, slot)

    async def _replacement(self) -> WorkerProcess:
        """A ready worker, however often it takes."""
        delay_s = _FIRST_RETRY_S
        while True:
            start = self._threads.submit(self._start)
            try:
                return await asyncio.wrap_future(start)
            except StartError as error:
                log_event(_log, "preprocess worker did not start", logging.ERROR, error=error, retry_s=delay_s)
                self.restarts["start"] += 1
            except asyncio.CancelledError:
                start.add_done_callback(_discard)  # the thread may be at it
                raise
            await asyncio.sleep(delay_s)
            delay_s = min(2 * delay_s, _LAST_RETRY_S)

    def _start(self) -> WorkerProcess:
        """On a thread of ours, as its two halves. Raises `StartError`."""
        return self._greet(self._begin())

    def _begin(self) -> WorkerProcess:
        worker = WorkerProcess(self.slab.fd, self._inbox_bytes)
        self._starting.add(worker)
        return worker

    def _greet_or_replace(self, worker: WorkerProcess) -> WorkerProcess:
        """One that waited while a model was loaded may have been killed meanwhile, for its memory say."""
        try:
            return self._greet(worker)
        except StartError:
            return self._start()

    def _greet(self, worker: WorkerProcess) -> WorkerProcess:
        try:
            if self._is_closed:
                worker.kill()
            worker.greet(self._setup)
        finally:
            self._starting.remove(worker)
        return worker

    def _stop_starts(self) -> None:
        """No worker starts any more, and no thread waits for one that does."""
        self._is_closed = True
        for worker in tuple(self._starting):
            worker.kill()

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        return await self._loop.run_in_executor(self._threads, function, *arguments)

    def close(self) -> None:
        """Ends all workers; blocks for milliseconds. Rows that are still in use stay readable. Idempotent."""
        if self._is_closed:
            return
        for task in self._tasks:
            task.cancel()
        self._stop_starts()
        for job in (*self._jobs, *self._busy):
            job.fail(DrainingError("the engine is closed"))
        for worker in self._workers:
            worker.unwatch()
            worker.kill()
        for worker in self._workers:
            worker.end()
        for start in self._begun:
            start.add_done_callback(_discard)
        self._threads.shutdown(wait=bool(self._begun))  # for those that are killed as they start
        self._begun = []
        self.slab.close()


def _setup(preprocess: Callable[..., Prepared], memory_bytes: int, most: int) -> bytes:
    """As a worker gets it. Raises `StartError` for what cannot be sent, or is more than `most` bytes."""
    try:
        setup = pickle.dumps(Setup(preprocess, memory_bytes))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise StartError(f"a preprocessor that workers cannot get ({error}) needs USE_LOCAL_PREPROCESS=1") from None
    if len(setup) > most:
        raise StartError(f"a preprocessor of {len(setup)} bytes, over {most}, needs USE_LOCAL_PREPROCESS=1")
    return setup


def _discard(start: Future[WorkerProcess]) -> None:
    """Ends a worker that nobody will use."""
    if not start.cancelled() and start.exception() is None:
        start.result().kill()
        start.result().end()
