"""The batcher with a GPU of our own, whose forwards end when the test says so: two in flight, never three."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from batching import (
    FAILED,
    Answers,
    Device,
    Gpu,
    batching,
    check_answers_are_their_own,
    fails_on_bad,
    outcomes,
    run,
)
from waiting import until

from rtp_mm.engine.batcher import Batcher
from rtp_mm.errors import WrongFormatError
from rtp_mm.types import MMPreprocessConfig, MMUrlType

GONE = "the device is gone: restart the server"


class Rows:
    """Memory that the device reads or writes."""


@asynccontextmanager
async def two_in_flight(gpu: Gpu) -> AsyncIterator[tuple[Batcher, list[asyncio.Task[Any]]]]:
    """What comes now waits. Tasks of "first" and "second"."""
    async with batching(gpu) as batcher:
        tasks = [run(batcher, "first")]
        await until(lambda: gpu.batches == [["first"]])
        tasks.append(run(batcher, "second"))
        await until(lambda: gpu.batches == [["first"], ["second"]])
        yield batcher, tasks


async def test_what_comes_while_a_batch_runs_is_launched_at_once_behind_it() -> None:
    gpu = Gpu()
    async with two_in_flight(gpu) as (_, tasks):
        assert gpu.collected == 0
        gpu.end(2)
        assert await outcomes(tasks) == ["first", "second"]


async def test_there_are_never_three_and_what_waits_goes_together_when_one_ends() -> None:
    gpu = Gpu()
    async with two_in_flight(gpu) as (batcher, tasks):
        tasks += [run(batcher, i) for i in range(3)]
        await until(lambda: batcher.waiting == 3)
        assert gpu.batches == [["first"], ["second"]]
        gpu.end()
        assert await tasks[0] == "first"
        await until(lambda: len(gpu.batches) == 3)
        assert gpu.collected == 1
        gpu.end(2)
        assert await outcomes(tasks) == ["first", "second", 0, 1, 2]
    assert gpu.batches == [["first"], ["second"], [0, 1, 2]]
    assert (batcher.forwards, batcher.items, batcher.patches) == (3, 5, 50)


@pytest.mark.parametrize("device", [Device, Gpu])
async def test_what_comes_during_a_launch_goes_together_behind_it(device: type[Device]) -> None:
    """On a CPU that is during a forward: batches are as full as with one in flight. And who leaves costs nothing."""
    held = device()
    held.may_go_on.clear()
    async with batching(held) as batcher:
        tasks = [run(batcher, "first")]
        await until(lambda: held.batches == [["first"]])
        tasks += [run(batcher, i) for i in range(3)]
        leaving = run(batcher, "leaving")
        await until(lambda: batcher.waiting == 4)
        leaving.cancel()
        await until(lambda: batcher.waiting == 3)
        held.may_go_on.set()
        await until(lambda: len(held.batches) == 2)
        if isinstance(held, Gpu):
            assert held.collected == 0
            held.end(2)
        assert await outcomes(tasks) == ["first", 0, 1, 2]
    assert held.batches == [["first"], [0, 1, 2]]


async def test_answers_come_in_the_order_of_the_batches() -> None:
    gpu = Gpu()
    came: list[str] = []
    async with two_in_flight(gpu) as (_, tasks):
        for task in tasks:
            task.add_done_callback(lambda task: came.append(task.result()))
        gpu.end(2)
        await asyncio.gather(*tasks)
    assert came == ["first", "second"]


async def test_a_launch_that_fails_while_a_batch_runs_fails_alone() -> None:
    gpu = Gpu(fails_on_bad)
    async with batching(gpu) as batcher:
        tasks = [run(batcher, "first")]
        await until(lambda: gpu.batches == [["first"]])
        tasks.append(run(batcher, "bad"))
        await until(lambda: gpu.batches == [["first"], ["bad"]])
        tasks.append(run(batcher, "third"))
        await until(lambda: batcher.waiting == 1)
        gpu.end(2)
        assert await outcomes(tasks) == ["first", FAILED, "third"]
    assert (gpu.batches, gpu.collected) == ([["first"], ["bad"], ["third"]], 2)


async def test_a_launch_that_fails_is_halved_behind_what_runs() -> None:
    gpu = Gpu(fails_on_bad)
    async with two_in_flight(gpu) as (batcher, tasks):
        tasks += [run(batcher, value) for value in ("a", "bad", "b", "c")]
        await until(lambda: batcher.waiting == 4)
        gpu.end(5)
        assert await outcomes(tasks) == ["first", "second", "a", FAILED, "b", "c"]
    assert batcher.failures == 3
    assert [batch for batch in gpu.batches if "bad" in batch] == [["a", "bad", "b", "c"], ["a", "bad"], ["bad"]]


async def test_what_a_launch_that_ran_out_of_memory_held_is_free_before_the_next() -> None:
    held: list[object] = []

    class Small(Gpu):
        def launch(self, batch: Any) -> Answers:
            activations = Rows()
            self.activations = weakref.ref(activations)
            return super().launch(batch)

        def free_memory(self) -> None:
            held.append(self.activations())

    def fails(values: list[Any]) -> None:
        raise torch.OutOfMemoryError

    async with batching(Small(fails)) as batcher:
        assert await outcomes([run(batcher, "first")]) == ["the forward failed with OutOfMemoryError"]
    assert held == [None]


async def test_nan_goes_again_behind_what_runs_meanwhile() -> None:
    gpu = Gpu()
    async with two_in_flight(gpu) as (batcher, tasks):
        tasks += [run(batcher, value) for value in ("a", "nan")]
        await until(lambda: batcher.waiting == 2)
        gpu.end()
        await until(lambda: len(gpu.batches) == 3)
        tasks.append(run(batcher, "b"))
        await until(lambda: batcher.waiting == 1)
        gpu.end()
        await until(lambda: len(gpu.batches) == 4)
        gpu.end()
        assert await tasks[2] == "a"
        await until(lambda: len(gpu.batches) == 5)
        assert not tasks[4].done()
        gpu.end(2)
        assert await outcomes(tasks) == ["first", "second", "a", "NaN", "b"]
    assert gpu.batches[2:] == [["a", "nan"], ["b"], ["nan"]]


async def test_a_device_that_is_gone_fails_both_in_flight_and_all_that_waits() -> None:
    gpu = Gpu()
    async with two_in_flight(gpu) as (batcher, tasks):
        tasks.append(run(batcher, "waiting"))
        await until(lambda: batcher.waiting == 1)
        gpu.is_gone = True
        gpu.end(2)
        assert await outcomes(tasks) == [GONE] * 3
        assert batcher.is_device_gone
        assert await outcomes([run(batcher, "late")]) == [GONE]
    assert gpu.batches == [["first"], ["second"]]


async def test_a_forward_that_does_not_end_is_noticed_until_it_ends() -> None:
    gpu, now = Gpu(), [0.0]
    batcher = Batcher(gpu, 100, clock=lambda: now[0])  # type: ignore[arg-type]
    assert not batcher.is_hung
    first = run(batcher, "first")
    await until(lambda: len(gpu.batches) == 1)
    now[0] = gpu.longest_s
    second = run(batcher, "second")
    await until(lambda: len(gpu.batches) == 2)
    assert not batcher.is_hung
    now[0] += 1
    assert batcher.is_hung
    gpu.end(1)
    assert await outcomes([first]) == ["first"]
    assert not batcher.is_hung
    gpu.end(1)
    assert await outcomes([second]) == ["second"]
    now[0] *= 3
    assert not batcher.is_hung
    batcher.close()


async def test_nobody_waits_for_a_batcher_that_is_closed_with_two_in_flight() -> None:
    gpu = Gpu()
    async with two_in_flight(gpu) as (batcher, tasks):
        tasks.append(run(batcher, "waiting"))
        await until(lambda: batcher.waiting == 1)
        last_read = batcher.close()
        assert await outcomes(tasks[2:]) == ["the engine stopped"]
        assert not last_read.done()
        gpu.end(2)
        assert await outcomes(tasks) == ["first", "second", "the engine stopped"]
        assert last_read.exception(30) is None
        assert batcher.close() is last_read
    await until(lambda: not any(thread.is_alive() for thread in gpu.threads))
    assert len(gpu.threads) == 2


async def test_nobody_waits_for_what_fails_after_the_close() -> None:
    """It would go again alone; it is told what was wrong instead."""
    gpu = Gpu()
    async with two_in_flight(gpu) as (batcher, tasks):
        tasks += [run(batcher, value) for value in ("a", "nan")]
        await until(lambda: batcher.waiting == 2)
        gpu.end()
        await until(lambda: gpu.batches[2:] == [["a", "nan"]])
        batcher.close()
        gpu.end(2)
        assert await outcomes(tasks) == ["first", "second", "a", "NaN"]


async def test_a_forward_begins_when_the_one_before_it_has_ended() -> None:
    """Else two in flight would count the same seconds twice."""
    now = [0.0]
    gpu = Gpu()
    batcher = Batcher(gpu, 100, clock=lambda: now[0])  # type: ignore[arg-type]

    async def timings(patches: int) -> dict[str, float]:
        return (await batcher.run("x", patches, MMUrlType.IMAGE, MMPreprocessConfig()))[1]

    first = asyncio.create_task(timings(50))
    await until(lambda: len(gpu.batches) == 1)
    second = asyncio.create_task(timings(100))
    await until(lambda: len(gpu.batches) == 2)
    now[0] = 1.0
    gpu.end()
    assert await first == {"queue": 0, "forward": 1000}
    assert (batcher.seconds_for(50), batcher.step_latency_ms) == (1, 1000)
    assert batcher.seconds_before(1) == 2  # the second one's 100 patches at 50 a second
    now[0] = 3.0
    gpu.end()
    assert await second == {"queue": 1000, "forward": 2000}
    assert (batcher.seconds_for(50), batcher.step_latency_ms) == (1, 2000)
    assert batcher.seconds_before(1) == 0
    now[0] = 10.0  # nobody's
    third = asyncio.create_task(timings(50))
    await until(lambda: len(gpu.batches) == 3)
    now[0] = 11.0
    gpu.end()
    assert await third == {"queue": 0, "forward": 1000}
    batcher.close()


@pytest.mark.parametrize("error", [None, WrongFormatError])
async def test_inputs_are_kept_until_their_forward_ends_and_no_longer(error: type[Exception] | None) -> None:
    """Even where their caller left; and it takes no garbage collector."""

    def fails(values: list[Any]) -> None:
        if error is not None and isinstance(values[0], Rows):
            raise error

    gpu = Gpu(fails)
    gc.disable()
    try:
        async with batching(gpu) as batcher:
            first = run(batcher, "first")
            await until(lambda: len(gpu.batches) == 1)
            rows = Rows()
            alive = weakref.ref(rows)
            task = run(batcher, rows)
            del rows
            await until(lambda: len(gpu.batches) == 2)
            task.cancel()
            await asyncio.wait([task])
            del task
            gpu.batches.clear()
            last = run(batcher, "last")
            await until(lambda: batcher.waiting == 1)
            assert alive() is not None
            gpu.end(2 if error is None else 1)
            assert await first == "first"
            await until(lambda: alive() is None)
            gpu.end()
            assert await last == "last"
    finally:
        gc.enable()


async def test_everybody_gets_his_own_answer_however_launches_and_ends_fall() -> None:
    in_flight = most = 0
    lock = threading.Lock()

    class Busy(Gpu):
        """Forwards that end by themselves."""

        def launch(self, batch: Any) -> Answers:
            nonlocal in_flight, most
            answers = super().launch(batch)
            with lock:
                in_flight += 1
                most = max(most, in_flight)
            self.end()
            return answers

        def outcomes(self, values: list[Any]) -> Any:
            nonlocal in_flight
            with lock:
                in_flight -= 1
            return super().outcomes(values)

    await check_answers_are_their_own(Busy(fails_on_bad))
    assert most == 2
