"""The batcher with a device of our own: what goes together, what fails alone, who is dropped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch
from batching import Device, batching, outcomes, run
from waiting import until

from rtp_mm.engine.batcher import Batcher
from rtp_mm.engine.forward import NonFiniteError, Outcome
from rtp_mm.errors import ProcessError, WrongFormatError


@asynccontextmanager
async def busy(device: Device, max_patches: int = 100) -> AsyncIterator[tuple[Batcher, asyncio.Task[Any]]]:
    """A batcher whose device is held at its first item until `may_go_on` is set: what comes meanwhile goes together."""
    device.may_go_on.clear()
    async with batching(device, max_patches) as batcher:
        first = run(batcher, "first")
        await until(lambda: len(device.batches) == 1)
        yield batcher, first


async def released(device: Device, batcher: Batcher, tasks: Sequence[asyncio.Task[Any]]) -> list[Any]:
    """The outcomes of work that all waits."""
    await until(lambda: batcher.waiting == len(tasks))
    device.may_go_on.set()
    return await outcomes(tasks)


async def test_what_is_ready_when_the_device_is_free_goes_together() -> None:
    device = Device()
    async with busy(device) as (batcher, first):
        rest = [run(batcher, i, 30) for i in range(5)]
        await until(lambda: batcher.waiting == 5)
        assert batcher.waiting_patches == 150
        assert await released(device, batcher, rest) == [0, 1, 2, 3, 4]
        assert await first == "first"
    assert device.batches == [["first"], [0, 1, 2], [3, 4]]
    assert (batcher.forwards, batcher.items, batcher.patches) == (3, 6, 160)


@pytest.mark.parametrize("error", [ZeroDivisionError("/secret"), torch.OutOfMemoryError("/secret")])
async def test_a_forward_that_fails_is_halved_until_the_bad_stand_alone(error: Exception) -> None:
    def fails(values: list[Any]) -> None:
        if 3 in values or 8 in values:
            raise error

    device = Device(fails)
    async with busy(device) as (batcher, _):
        tasks = [run(batcher, i) for i in range(10)]
        bad = f"the forward failed with {type(error).__name__}"
        assert await released(device, batcher, tasks) == [0, 1, 2, bad, 4, 5, 6, 7, bad, 9]
    is_memory = isinstance(error, torch.OutOfMemoryError)
    failed = [batch for batch in device.batches if 3 in batch or 8 in batch]
    assert batcher.failures == len(failed)
    assert device.freed == (len(failed) if is_memory else 0)


async def test_one_bad_item_among_many_costs_a_logarithm_of_forwards() -> None:
    def fails(values: list[Any]) -> None:
        if 41 in values:
            raise ZeroDivisionError

    device = Device(fails)
    async with busy(device, 1000) as (batcher, _):
        found = await released(device, batcher, [run(batcher, i) for i in range(64)])
        assert found.count("the forward failed with ZeroDivisionError") == 1
    assert len(device.batches) == 1 + 1 + 2 * 6


async def test_nan_goes_again_in_smaller_company_and_the_rest_is_answered_at_once() -> None:
    device = Device()
    async with busy(device) as (batcher, _):
        tasks = [run(batcher, value) for value in ("a", "nan", "b", "nan")]
        assert await released(device, batcher, tasks) == ["a", "NaN", "b", "NaN"]
    assert device.batches[1:] == [["a", "nan", "b", "nan"], ["nan", "nan"], ["nan"], ["nan"]]


async def test_nan_that_a_neighbour_made_is_mended() -> None:
    """A model that mixes its batch: "bad" poisons whoever goes with it."""

    class Mixing(Device):
        def outcomes(self, values: list[Any]) -> list[Outcome]:
            return [NonFiniteError("NaN")] * len(values) if "bad" in values else super().outcomes(values)

    device = Mixing()
    async with busy(device) as (batcher, _):
        tasks = [run(batcher, value) for value in ("a", "b", "bad", "c")]
        assert await released(device, batcher, tasks) == ["a", "b", "NaN", "c"]


async def test_a_models_own_error_reaches_its_caller() -> None:
    def fails(values: list[Any]) -> None:
        raise WrongFormatError("a model's word")

    async with batching(Device(fails)) as batcher:
        with pytest.raises(WrongFormatError, match="a model's word"):
            await run(batcher, 1)


async def test_who_leaves_before_the_forward_costs_nothing_more() -> None:
    device = Device()
    async with busy(device) as (batcher, first):
        leaving, staying = run(batcher, "leaving"), run(batcher, "staying")
        await until(lambda: batcher.waiting == 2)
        leaving.cancel()
        await until(lambda: batcher.waiting == 1)
        assert batcher.waiting_patches == 10
        assert await released(device, batcher, [staying]) == ["staying"]
        assert await first == "first"
    assert device.batches == [["first"], ["staying"]]


async def test_a_device_that_is_gone_fails_all_that_waits_and_all_that_comes() -> None:
    def fails(values: list[Any]) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device = Device(fails)
    device.is_gone = True
    device.may_go_on.clear()
    async with batching(device) as batcher:
        tasks = [run(batcher, i) for i in range(3)]
        await until(lambda: len(device.batches) == 1 and batcher.waiting == 2)
        device.may_go_on.set()
        assert await outcomes(tasks) == ["the device is gone: restart the server"] * 3
        assert batcher.is_device_gone
        with pytest.raises(ProcessError, match="the device is gone"):
            await run(batcher, "late")
    assert device.batches == [[0]]


async def test_nobody_waits_for_a_batcher_that_is_closed() -> None:
    device = Device()
    device.may_go_on.clear()
    async with batching(device) as batcher:
        tasks = [run(batcher, i) for i in range(2)]
        await until(lambda: len(device.batches) == 1 and batcher.waiting == 1)
        batcher.close()
        device.may_go_on.set()
        assert await outcomes(tasks) == [0, "the engine stopped"]
        assert await outcomes([run(batcher, 3)]) == ["the engine stopped"]


async def test_prepared_memory_is_given_back_with_the_answer() -> None:
    """No list or future of the batcher's keeps an input whose forward is over, even while nothing else comes."""
    import weakref

    class Rows:
        pass

    device = Device()
    async with batching(device) as batcher:
        rows = Rows()
        alive = weakref.ref(rows)
        task = run(batcher, rows)
        del rows
        device.batches.clear()
        answer = await task
        assert isinstance(answer, Rows)
        del answer, task
        device.batches.clear()
        await until(lambda: alive() is None)


async def test_it_learns_how_fast_the_device_is() -> None:
    now = iter(range(1000))
    batcher = Batcher(Device(), 100, clock=lambda: next(now))  # type: ignore[arg-type]
    assert batcher.seconds_for(1000) == 0
    await run(batcher, 1, patches=50)
    assert 0 < batcher.seconds_for(1000) < 1000
    assert batcher.seconds_for(2000) == 2 * batcher.seconds_for(1000)
    batcher.close()
