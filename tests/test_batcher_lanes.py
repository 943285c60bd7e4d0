"""The batcher with a CPU of our own that takes two forwards at a time: each waits for its own work alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
from batching import FAILED, Answers, Device, batching, check_answers_are_their_own, fails_on_bad, outcomes, run
from waiting import until

from rtp_mm.engine.batcher import Batcher
from rtp_mm.engine.forward_queue import Work
from rtp_mm.types import MMPreprocessConfig, MMUrlType


class Cpu(Device):
    """Two lanes, each held at its batch until that may end."""

    lanes = 2

    def __init__(self, fails: Callable[[list[Any]], None] = lambda _: None) -> None:
        super().__init__(fails)
        self._changed = threading.Condition()
        self._ended: set[Any] = set()
        self.running: list[list[Any]] = []

    def launch(self, batch: Sequence[Work]) -> Answers:
        values = [work.value for work in batch]
        with self._changed:
            self.running.append(values)
            assert self._changed.wait_for(lambda: self._ended.issuperset(values), 30)
            self.running.remove(values)
        return super().launch(batch)

    def end(self, *values: Any) -> None:
        with self._changed:
            self._ended.update(values)
            self._changed.notify_all()


@asynccontextmanager
async def both_lanes(cpu: Cpu) -> AsyncIterator[tuple[Batcher, list[asyncio.Task[Any]]]]:
    """Two forwards side by side: what comes now waits. Tasks of "first" and "second"."""
    async with batching(cpu) as batcher:
        tasks = [run(batcher, "first"), run(batcher, "second")]
        await until(lambda: len(cpu.running) == 2)
        yield batcher, tasks


async def test_two_forwards_run_side_by_side_and_the_rest_waits() -> None:
    cpu = Cpu()
    async with both_lanes(cpu) as (batcher, tasks):
        tasks.append(run(batcher, "third"))
        await until(lambda: batcher.waiting == 1)
        assert sorted(cpu.running) == [["first"], ["second"]]
        cpu.end("first", "second", "third")
        assert await outcomes(tasks) == ["first", "second", "third"]


async def test_what_ends_first_is_answered_first() -> None:
    """A small image in one lane does not wait for the video in the other, nor does what comes after it."""
    cpu = Cpu()
    async with both_lanes(cpu) as (batcher, tasks):
        cpu.end("second", "third")
        assert await tasks[1] == "second"
        assert await run(batcher, "third") == "third"
        assert not tasks[0].done()
        cpu.end("first")
        assert await tasks[0] == "first"


async def test_a_lane_leaves_the_other_its_share_of_what_waits() -> None:
    cpu = Cpu()
    async with both_lanes(cpu) as (batcher, tasks):
        tasks += [run(batcher, value) for value in range(4)]
        await until(lambda: batcher.waiting == 4)
        cpu.end("first")
        await until(lambda: [0, 1] in cpu.running)
        assert batcher.waiting == 2
        cpu.end("second")
        await until(lambda: [2] in cpu.running)
        cpu.end(*range(4))
        assert await outcomes(tasks) == ["first", "second", *range(4)]


async def test_what_fails_in_one_lane_is_halved_while_the_other_goes_on() -> None:
    cpu = Cpu(fails_on_bad)
    async with both_lanes(cpu) as (batcher, tasks):
        tasks += [run(batcher, value) for value in ("a", "bad", "b", "c")]
        await until(lambda: batcher.waiting == 4)
        cpu.end("first", "a", "bad", "b", "c")
        assert await outcomes(tasks[2:]) == ["a", FAILED, "b", "c"]
        assert not tasks[1].done()
        cpu.end("second")
        assert await outcomes(tasks[:2]) == ["first", "second"]


async def test_its_close_is_over_when_both_lanes_have_read_their_last_input() -> None:
    for last in ("first", "second"):
        cpu = Cpu()
        async with both_lanes(cpu) as (batcher, tasks):
            last_read = batcher.close()
            tasks.append(run(batcher, "late"))
            cpu.end(*{"first", "second"} - {last})
            await until(lambda: len(cpu.running) == 1)  # noqa: B023  # this round's
            await until(lambda: sum(task.done() for task in tasks) == 2)
            assert not last_read.done()
            cpu.end(last)
            assert await outcomes(tasks) == ["first", "second", "the engine stopped"]
            assert last_read.exception(30) is None
        await until(lambda: not any(thread.is_alive() for thread in cpu.threads))  # noqa: B023
        assert len(cpu.threads) == 4


async def test_a_second_beside_another_forward_is_half_a_second_of_the_device() -> None:
    """However unequal they are: a clip of 900 patches beside images of 50, all at 100 patches a second."""
    now = [0.0]
    cpu = Cpu()
    batcher = Batcher(cpu, 1000, clock=lambda: now[0])  # type: ignore[arg-type]

    def timings(value: str, patches: int) -> asyncio.Task[dict[str, float]]:
        async def run() -> dict[str, float]:
            return (await batcher.run(value, patches, MMUrlType.IMAGE, MMPreprocessConfig()))[1]

        return asyncio.create_task(run())

    clip = timings("clip", 900)
    await until(lambda: cpu.running == [["clip"]])
    now[0] += 1  # alone: 100 patches
    for i in range(16):
        image = timings(f"image {i}", 50)
        await until(lambda: len(cpu.running) == 2)
        now[0] += 1
        cpu.end(f"image {i}")
        assert (await image)["forward"] == pytest.approx(1000)
        assert batcher.seconds_for(100) == pytest.approx(1)
    cpu.end("clip")
    assert (await clip)["forward"] == pytest.approx(17_000)
    assert batcher.seconds_for(100) == pytest.approx(1)
    batcher.close()


async def test_nobody_is_told_to_wait_for_a_lane_while_the_other_is_free() -> None:
    now = [0.0]
    cpu = Cpu()
    batcher = Batcher(cpu, 100, clock=lambda: now[0])  # type: ignore[arg-type]
    tasks = [run(batcher, "first", 10)]
    await until(lambda: len(cpu.running) == 1)
    now[0] = 1.0
    cpu.end("first")
    assert await tasks[0] == "first"
    tasks.append(run(batcher, "clip", 1000))
    await until(lambda: len(cpu.running) == 1)
    assert batcher.seconds_before(10) == 0
    tasks.append(run(batcher, "image", 20))
    await until(lambda: len(cpu.running) == 2)
    assert batcher.seconds_before(10) == 4  # 20 patches at half of 10 a second
    cpu.end("clip", "image")
    assert await outcomes(tasks) == ["first", "clip", "image"]
    batcher.close()


async def test_everybody_gets_his_own_answer_from_either_lane() -> None:
    class Free(Device):
        lanes = 2

    await check_answers_are_their_own(Free(fails_on_bad))
