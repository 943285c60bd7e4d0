"""The device never waits while there is work: what is ready is launched behind, or beside, the batch that runs."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.forward import Forward, Launched, NonFiniteError, Outcome
from rtp_mm.engine.forward_queue import ForwardQueue, Work
from rtp_mm.errors import MMError, ProcessError
from rtp_mm.types import MMPreprocessConfig, MMUrlType

_log = logging.getLogger(__name__)
IN_FLIGHT = 2  # of a lane: the GPU finds one launched when the other ends; a third's batch would be taken too early
_GONE = "the device is gone: restart the server"
_MEMORY = 0.8  # how much of its rate the past keeps at each forward


class _Moment(NamedTuple):
    """By the clock, and by the device's time: of a second each of k busy lanes gets 1 / k."""

    clock_s: float
    device_s: float


class _Lane:
    """Forwards one behind another: a thread launches them, another waits for their answers, in the same order."""

    def __init__(self, forward: Forward) -> None:
        self.device_thread = ThreadPoolExecutor(1, "rtp_mm-device", forward.enter_thread)
        self.answer_thread = ThreadPoolExecutor(1, "rtp_mm-answers", forward.enter_thread)
        self.launching: list[Work] | None = None  # where the launch fails, until that is sorted out
        self.launched = deque[float]()  # when: of that one, and of those whose answers are awaited
        self.patches = 0  # in them
        self.last_end = _Moment(float("-inf"), float("-inf"))  # of a forward

    @property
    def in_flight(self) -> int:
        return len(self.launched)

    @property
    def can_launch(self) -> bool:
        return self.launching is None and self.in_flight < IN_FLIGHT


class Batcher:
    """Packs prepared inputs of many requests into forwards of at most `max_patches`; answers on one event loop.

    A batch is taken when it can be launched at once, however busy the event loop is: on a GPU behind the one that runs;
    on a CPU, where a launch ends with its forward, in a lane that is free (see `Forward.lanes`). It is kept until its
    answers are there: the device may still read its inputs. A forward that fails is halved until what is bad stands
    alone: the good are answered, the bad fail. When the device itself is gone, everything waiting fails, and all that
    comes.
    """

    def __init__(
        self,
        forward: Forward,
        max_patches: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._forward = forward
        self._clock = clock
        self._lock = threading.Lock()  # over all below
        self._lanes = [_Lane(forward) for _ in range(forward.lanes)]
        self._queue = ForwardQueue(max_patches, takers=forward.lanes)
        self._halves: list[list[Work]] = []  # of forwards that failed: they go next
        self._is_closed = False
        self._last_read: Future[Any] | None = None  # once closed
        self.max_patches = max_patches
        self.is_device_gone = False
        self.forwards = 0
        self.failures = 0
        self.items = 0  # in all forwards
        self.patches = 0
        self.step_latency_ms = 0.0  # of the last forward
        self._now = _Moment(clock(), 0.0)  # when a forward was last launched or answered
        self._mean_patches = self._mean_device_s = 0.0  # of a forward, of late

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def is_hung(self) -> bool:
        """Whether a forward is in flight for longer than any takes; it may end still."""
        with self._lock:
            oldest = min((lane.launched[0] for lane in self._lanes if lane.launched), default=math.inf)
            return self._clock() - oldest > self._forward.longest_s

    @property
    def waiting_patches(self) -> int:
        return self._queue.patches

    def seconds_for(self, patches: int) -> float:
        """How long the device takes for so many, judged by its last forwards; 0 before the first."""
        return patches * self._mean_device_s / self._mean_patches if self._mean_patches else 0.0

    def seconds_before(self, patches: int) -> float:
        """How long an item of `patches` that came now would wait; see `seconds_for`."""
        with self._lock:
            running = len(self._lanes) * min(lane.patches for lane in self._lanes)  # until the first of them is free
            return self.seconds_for(running + self._queue.patches_before(patches, self._clock()))

    async def run(
        self, value: Any, patches: int | None, mm_type: MMUrlType, config: MMPreprocessConfig
    ) -> tuple[Embedded, dict[str, float]]:
        """The embedding on the host, and milliseconds in the queue and in the forward. Raises `ProcessError`.

        Work whose caller is cancelled before it is launched is dropped at once.
        """
        loop = asyncio.get_running_loop()
        work = Work(value, patches, mm_type, config, loop.create_future(), self._clock())
        with self._lock:
            self._check_usable()
            self._queue.add(work)
            self._launch_ready()
        try:
            return await work.answer, work.timings_ms
        finally:
            with self._lock:
                self._queue.remove(work)

    def close(self) -> Future[Any]:
        """On the event loop. Nobody is left waiting; forwards in flight end, and the threads with them. Done once the
        device has read the last input: never, where it hangs. Idempotent.
        """
        with self._lock:
            self._is_closed = True
            left = self._everything()
            if self._last_read is None:
                first, *others = self._lanes
                answered = [lane.answer_thread.submit(_nothing) for lane in others]  # after all its answers
                self._last_read = first.answer_thread.submit(wait, answered)
        _answer([(work, ProcessError("the engine stopped")) for work in left])
        for lane in self._lanes:
            lane.device_thread.shutdown(wait=False)
            lane.answer_thread.shutdown(wait=False)
        return self._last_read

    # --- under the lock, on the event loop or a lane's thread

    def _check_usable(self) -> None:
        if self.is_device_gone:
            raise ProcessError(_GONE)
        if self._is_closed:
            raise ProcessError("the engine stopped")

    def _launch_ready(self) -> None:
        while (self._halves or len(self._queue)) and (lane := self._next_lane()) is not None:
            batch = self._halves.pop() if self._halves else self._queue.take()
            batch = [work for work in batch if not work.answer.done()]  # the others' callers left
            if batch:
                launched = self._advance()
                lane.launching = batch
                lane.launched.append(launched.clock_s)
                lane.patches += self._cost(batch)
                launch = lane.device_thread.submit(self._launch, lane, batch)
                step = lane.answer_thread.submit(_collected, launch)
                lane.answer_thread.submit(self._finish, lane, batch, launched, step)  # one thread: after it

    def _next_lane(self) -> _Lane | None:
        """The emptiest of those that can launch."""
        free = [] if self._is_closed else [lane for lane in self._lanes if lane.can_launch]
        return min(free, key=lambda lane: lane.in_flight, default=None)

    def _advance(self) -> _Moment:
        """Now; the time since the last moment goes to the lanes that were busy."""
        clock_s, busy = self._clock(), sum(lane.in_flight > 0 for lane in self._lanes)
        device_s = self._now.device_s + (clock_s - self._now.clock_s) / max(1, busy)
        self._now = _Moment(clock_s, device_s)
        return self._now

    def _cost(self, batch: list[Work]) -> int:
        return sum(map(self._queue.cost, batch))

    def _everything(self) -> list[Work]:
        """Takes out all that waits."""
        everything = [work for half in self._halves for work in half]
        self._halves.clear()
        while batch := self._queue.take():
            everything += batch
        return everything

    # --- on a device thread

    def _launch(self, lane: _Lane, batch: list[Work]) -> Launched:
        try:
            launched = self._forward.launch(batch)
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # of what they hold there
            self._forward.free_memory()
            raise
        with self._lock:
            lane.launching = None
            self._launch_ready()
        return launched

    # --- on an answer thread

    def _finish(self, lane: _Lane, batch: list[Work], launched: _Moment, step: Future[list[Outcome]]) -> None:
        """Answers a batch, or sorts what is to go again, and has the next one launched."""
        error = step.exception()
        is_gone = error is not None and self._forward.is_device_gone()
        outcomes: Sequence[Outcome] = step.result() if error is None else [_as_mm_error(error)] * len(batch)
        with self._lock:
            started, lane.last_end = max(launched, lane.last_end), self._advance()
            seconds = lane.last_end.clock_s - started.clock_s
            self._count(lane, batch, seconds, lane.last_end.device_s - started.device_s, has_failed=error is not None)
            if is_gone:
                self.is_device_gone = True
                batch = batch + self._everything()
                outcomes = [ProcessError(_GONE)] * len(batch)
            is_over = is_gone or self._is_closed
            suspects = set() if is_over else _suspects(batch, outcomes, has_failed=error is not None)
            if len(suspects) == len(batch):
                middle = len(batch) // 2
                self._halves += [batch[middle:], batch[:middle]]
            elif suspects:
                self._halves.append([work for work in batch if work in suspects])
            self._launch_ready()
        answered = [(w, outcome) for w, outcome in zip(batch, outcomes, strict=True) if w not in suspects]
        for work, _ in answered:
            work.timings_ms = {"queue": (started.clock_s - work.queued_at) * 1e3, "forward": seconds * 1e3}
        if answered:
            loop = answered[0][0].answer.get_loop()
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_answer, answered)

    def _count(self, lane: _Lane, batch: list[Work], seconds: float, device_s: float, *, has_failed: bool) -> None:
        patches = self._cost(batch)
        if lane.launching is batch:  # it failed
            lane.launching = None
        lane.launched.popleft()
        lane.patches -= patches
        self.forwards += 1
        self.failures += has_failed
        self.items += len(batch)
        self.patches += patches
        self.step_latency_ms = seconds * 1e3
        if not has_failed:
            weight = 1 - _MEMORY if self._mean_patches else 1.0
            self._mean_patches += weight * (patches - self._mean_patches)
            self._mean_device_s += weight * (device_s - self._mean_device_s)


def _nothing() -> None:
    pass


def _collected(launch: Future[Launched]) -> list[Outcome]:
    try:
        return launch.result().collect()
    finally:
        del launch  # else an error's stack would hold it, and it the error, with all that a failed forward held


def _suspects(batch: list[Work], outcomes: Sequence[Outcome], *, has_failed: bool) -> set[Work]:
    """Items that may have failed by a neighbour's fault: they go again in smaller company, down to one."""
    if len(batch) == 1:
        return set()
    return {w for w, outcome in zip(batch, outcomes, strict=True) if has_failed or isinstance(outcome, NonFiniteError)}


def _answer(answers: Sequence[tuple[Work, Outcome]]) -> None:
    """On the event loop."""
    for work, outcome in answers:
        if work.answer.done():  # its caller left
            continue
        if isinstance(outcome, MMError):
            work.answer.set_exception(outcome)
        else:
            work.answer.set_result(outcome)


def _as_mm_error(error: BaseException) -> MMError:
    """Callers get the error's type; its text and stack, which may hold secrets, stay in the log."""
    if isinstance(error, MMError):
        return error
    _log.error("the forward failed", exc_info=error)
    return ProcessError(f"the forward failed with {type(error).__name__}")
