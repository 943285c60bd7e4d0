"""Single-flight: one piece of work for all who want it now, ended when the last of them leaves."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

import pytest

from rtp_mm.engine.admission import Visit
from rtp_mm.engine.flights import Flight, Flights
from rtp_mm.engine.response import Stages
from rtp_mm.errors import WrongFormatError


class Source:
    """Work that ends when it is told to, and counts."""

    def __init__(self) -> None:
        self.started = self.cancelled = 0
        self.go_on = asyncio.Event()

    async def work(self, _: Flight[int]) -> int:
        self.started += 1
        number = self.started
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return number

    async def broken(self, flight: Flight[int]) -> int:
        await self.work(flight)
        raise WrongFormatError("no image")


async def joined(flights: Flights[int], key: str, work: Callable[[Flight[int]], Coroutine[Any, Any, int]]) -> int:
    return await flights.join(key, Visit(0, 0), Stages(), work)


async def settled(rounds: int = 5) -> None:
    for _ in range(rounds):
        await asyncio.sleep(0)


async def test_a_hundred_callers_share_one_run() -> None:
    source, flights = Source(), Flights[int]()
    callers = [asyncio.create_task(joined(flights, "a", source.work)) for _ in range(100)]
    other = asyncio.create_task(joined(flights, "b", source.work))
    await settled()
    source.go_on.set()
    assert await asyncio.gather(*callers) == [1] * 100
    assert await other == 2


async def test_a_result_is_not_remembered() -> None:
    source, flights = Source(), Flights[int]()
    source.go_on.set()
    assert [await joined(flights, "a", source.work) for _ in range(2)] == [1, 2]


async def test_an_error_goes_to_all_and_is_not_remembered() -> None:
    source, flights = Source(), Flights[int]()
    callers = [asyncio.create_task(joined(flights, "a", source.broken)) for _ in range(3)]
    await settled()
    source.go_on.set()
    assert [type(e) for e in await asyncio.gather(*callers, return_exceptions=True)] == [WrongFormatError] * 3
    assert await joined(flights, "a", source.work) == 2


@pytest.mark.parametrize("leaver", [0, 1])
async def test_who_leaves_does_not_take_the_work_from_the_others(leaver: int) -> None:
    """Neither the first, for whom the work was begun, nor another."""
    source, flights = Source(), Flights[int]()
    callers = [asyncio.create_task(joined(flights, "a", source.work)) for _ in range(2)]
    await settled()
    callers[leaver].cancel()
    await settled()
    assert callers[leaver].cancelled()
    source.go_on.set()
    assert await callers[1 - leaver] == 1
    assert source.cancelled == 0


async def test_when_the_last_leaves_the_work_is_cancelled() -> None:
    source, flights = Source(), Flights[int]()
    callers = [asyncio.create_task(joined(flights, "a", source.work)) for _ in range(2)]
    await settled()
    for caller in callers:
        caller.cancel()
    await asyncio.wait(callers)
    await flights.settle()
    assert source.cancelled == 1
    assert "a" not in flights


async def test_who_comes_after_the_last_left_starts_anew() -> None:
    """Even while the cancelled work is still ending."""
    source, flights = Source(), Flights[int]()
    is_ending, may_end = asyncio.Event(), asyncio.Event()

    async def ends_slowly(flight: Flight[int]) -> int:
        try:
            return await source.work(flight)
        finally:
            is_ending.set()
            await may_end.wait()

    first = asyncio.create_task(joined(flights, "a", ends_slowly))
    await settled()
    first.cancel()
    await is_ending.wait()
    second = asyncio.create_task(joined(flights, "a", source.work))
    await settled()
    may_end.set()
    await settled()
    assert "a" in flights  # the end of the first takes nothing from the second
    source.go_on.set()
    assert await second == 2
    with suppress(asyncio.CancelledError):
        await first


async def test_a_flight_knows_who_waits_for_it_and_tells_each_how_far_it_is() -> None:
    """To its end: somebody is named even while it is being cancelled."""
    source, flights, begun = Source(), Flights[int](), []
    visits, stages = [Visit(0, n) for n in range(2)], [Stages() for _ in range(2)]

    async def work(flight: Flight[int]) -> int:
        begun.append(flight)
        with flight.stages.inside("preprocess"):
            return await source.work(flight)

    callers = [
        asyncio.create_task(flights.join("a", visit, own, work)) for visit, own in zip(visits, stages, strict=True)
    ]
    await settled()
    (flight,) = begun
    assert [*flight.visits] == visits
    assert [set(own.so_far()) for own in stages] == [{"preprocess"}] * 2
    callers[0].cancel()
    await settled()
    assert [*flight.visits] == [visits[1]]
    callers[1].cancel()
    await settled()
    assert source.cancelled == 1
    assert [*flight.visits] == [visits[1]]


async def test_a_visit_with_many_items_leaves_with_the_last_of_them() -> None:
    flights, source, visit = Flights[int](), Source(), Visit(0, 0.0)
    flight: list[Flight[int]] = []

    async def work(begun: Flight[int]) -> int:
        flight.append(begun)
        return await source.work(begun)

    items = [asyncio.create_task(flights.join("a", visit, Stages(), work)) for _ in range(3)]
    other = asyncio.create_task(flights.join("a", Visit(0, 0.0), Stages(), work))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert sorted(flight[0].visits.values()) == [1, 3]
    for item in items:
        item.cancel()
    await asyncio.gather(*items, return_exceptions=True)
    assert [*flight[0].visits.values()] == [1]
    source.go_on.set()
    assert await other == 1
    assert source.cancelled == 0
