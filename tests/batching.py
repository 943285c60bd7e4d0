"""Stand-in devices for the batcher, and how to give them work."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch

from rtp_mm.engine.batcher import Batcher
from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.forward import NonFiniteError, Outcome
from rtp_mm.engine.forward_queue import Work
from rtp_mm.errors import ProcessError
from rtp_mm.types import MMPreprocessConfig, MMUrlType

FAILED = "the forward failed with ZeroDivisionError"


def fails_on_bad(values: list[Any]) -> None:
    if "bad" in values:
        raise ZeroDivisionError


class Answers:
    """What a launch comes back with."""

    def __init__(self, collect: Callable[[], list[Outcome]]) -> None:
        self.collect = collect


class Device:
    """A CPU: its launch ends with the forward, held until `may_go_on`. Answers an item with its own value; `fails` says
    what is wrong with a batch.
    """

    lanes = 1
    longest_s = 300.0

    def __init__(self, fails: Callable[[list[Any]], None] = lambda _: None) -> None:
        self.fails = fails
        self.batches: list[list[Any]] = []
        self.freed = 0
        self.is_gone = False
        self.threads: list[threading.Thread] = []
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def launch(self, batch: Sequence[Work]) -> Answers:
        values = [work.value for work in batch]
        self.batches.append(values)
        assert self.may_go_on.wait(30)
        self.fails(values)
        return Answers(lambda: self.outcomes(values))

    def outcomes(self, values: list[Any]) -> list[Outcome]:
        return [NonFiniteError("NaN") if v == "nan" else Embedded(torch.tensor([[0.0]]), v) for v in values]

    def enter_thread(self) -> None:
        self.threads.append(threading.current_thread())

    def free_memory(self) -> None:
        self.freed += 1

    def is_device_gone(self) -> bool:
        return self.is_gone


class Gpu(Device):
    """Its launch returns at once, or when it `may_go_on`; the forward ends with a call of `end`, one after another."""

    def __init__(self, fails: Callable[[list[Any]], None] = lambda _: None) -> None:
        super().__init__(fails)
        self._ends = threading.Semaphore(0)
        self.collected = 0

    def launch(self, batch: Sequence[Work]) -> Answers:
        answers = super().launch(batch)
        return Answers(lambda: self._wait(answers))

    def _wait(self, answers: Answers) -> list[Outcome]:
        assert self._ends.acquire(timeout=30)
        if self.is_gone:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        self.collected += 1
        return answers.collect()

    def end(self, forwards: int = 1) -> None:
        self._ends.release(forwards)


@asynccontextmanager
async def batching(device: Device, max_patches: int = 100) -> AsyncIterator[Batcher]:
    batcher = Batcher(device, max_patches)  # type: ignore[arg-type]
    yield batcher
    batcher.close()


def run(batcher: Batcher, value: Any, patches: int | None = 10) -> asyncio.Task[Any]:
    async def answer() -> Any:
        embedded, _ = await batcher.run(value, patches, MMUrlType.IMAGE, MMPreprocessConfig())
        return embedded.position_ids

    return asyncio.create_task(answer())


async def check_answers_are_their_own(device: Device) -> None:
    """Of many works of all sizes, some of them bad, that come faster than the device takes them; nothing is left."""
    chance = random.Random(0)
    async with batching(device, max_patches=60) as batcher:
        values = [chance.choice(["bad", "nan", i, i, i, i]) for i in range(400)]
        tasks = []
        for value in values:
            tasks.append(run(batcher, value, chance.choice([1, 10, 100, None])))
            if chance.random() < 0.3:
                await asyncio.sleep(0)
        named = {"bad": FAILED, "nan": "NaN"}
        assert await outcomes(tasks) == [named.get(value, value) for value in values]
        assert {(lane.in_flight, lane.patches) for lane in batcher._lanes} == {(0, 0)}
        assert batcher.waiting == 0


async def outcomes(tasks: Sequence[asyncio.Task[Any]]) -> list[Any]:
    async with asyncio.timeout(30):
        found = await asyncio.gather(*tasks, return_exceptions=True)
    return [str(outcome) if isinstance(outcome, ProcessError) else outcome for outcome in found]
