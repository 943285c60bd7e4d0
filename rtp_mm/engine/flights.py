"""Single-flight: who asks for what is already under way waits for that instead of starting it again."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from rtp_mm.engine.admission import Visit
from rtp_mm.engine.response import Stages

Result = TypeVar("Result")


@dataclass(slots=True, eq=False)
class Flight(Generic[Result]):
    """Work under way: for whom, and how far it is."""

    # Who waits, with how many items; the last that leaves stays until the work has ended.
    visits: Counter[Visit] = field(default_factory=Counter)
    stages: Stages = field(default_factory=Stages)
    task: asyncio.Task[Result] = field(init=False)


class Flights(Generic[Result]):
    """Work under way by key, for one event loop.

    A waiter that is cancelled leaves the others alone; when the last one leaves, the work is cancelled. Results and
    errors go to all who wait, and are not remembered: that is a cache's business.
    """

    def __init__(self) -> None:
        self._flights: dict[Hashable, Flight[Result]] = {}
        self._tasks: set[asyncio.Task[Result]] = set()  # those whose waiters left, too, until they have ended

    def __contains__(self, key: Hashable) -> bool:
        return key in self._flights

    def __len__(self) -> int:
        return len(self._flights)

    async def join(
        self,
        key: Hashable,
        visit: Visit,
        stages: Stages,
        work: Callable[[Flight[Result]], Coroutine[Any, Any, Result]],
    ) -> Result:
        """The result of the work under way for `key`, which `work` starts where there is none. `visit` waits for it,
        and the item's `stages` go on in the work's.
        """
        flight = self._flights.get(key) or self._start(key, work)
        flight.visits[visit] += 1
        stages.go_on_in(flight.stages)
        try:
            return await asyncio.shield(flight.task)  # who is cancelled here leaves the others alone
        finally:
            if flight.visits[visit] > 1:
                flight.visits[visit] -= 1
            elif len(flight.visits) > 1:
                del flight.visits[visit]
            elif self._flights.get(key) is flight:
                del self._flights[key]  # who comes now starts anew, and does not join what is being cancelled
                flight.task.cancel()

    async def settle(self) -> None:
        """Waits for the end of work that nobody waits for any more."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _start(self, key: Hashable, work: Callable[[Flight[Result]], Coroutine[Any, Any, Result]]) -> Flight[Result]:
        flight = self._flights[key] = Flight[Result]()
        flight.task = asyncio.create_task(work(flight))

        def ended(task: asyncio.Task[Result]) -> None:
            self._tasks.discard(task)
            if self._flights.get(key) is flight:
                del self._flights[key]
            if not task.cancelled():
                task.exception()  # seen, even where nobody waited for it to the end

        self._tasks.add(flight.task)
        flight.task.add_done_callback(ended)
        return flight
