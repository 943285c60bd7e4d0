"""Who goes to the device next: small work before large, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left, insort
from dataclasses import dataclass, field
from typing import Any

from rtp_mm.engine.caches import Embedded
from rtp_mm.types import MMPreprocessConfig, MMUrlType

PATIENCE_S = 1e-4  # per patch: a photo of 1000 patches yields for 0.1 s, the largest image (65536) for 6.6 s


@dataclass(slots=True, eq=False)
class Work:
    """A prepared input on its way through the device."""

    value: Any
    patches: int | None  # `None`: goes alone
    mm_type: MMUrlType
    config: MMPreprocessConfig
    answer: asyncio.Future[Embedded]
    queued_at: float = field(default_factory=time.perf_counter)
    timings_ms: dict[str, float] = field(default_factory=dict)


class ForwardQueue:
    """Work in the order of `queued_at + patches * patience_s`, fixed when it comes. No locks: the batcher's hold.

    Smaller work that comes a little later goes first: work yields for `patience_s` a patch. And nothing starves: all
    that ever goes before work W has come before W's place in that order, a moment that stands still; what comes after
    it stands behind W whatever its size. So W waits at most for the work that came until then, which the limits of the
    queue bound.
    """

    def __init__(self, max_patches: int, patience_s: float = PATIENCE_S, takers: int = 1) -> None:
        """`takers` share what waits: none takes so much that another finds nothing."""
        self._max_patches = max_patches
        self._takers = takers
        self._patience_s = patience_s
        self._works: list[tuple[float, int, Work]] = []
        self._arrivals = 0
        self.patches = 0

    def __len__(self) -> int:
        return len(self._works)

    def cost(self, work: Work) -> int:
        """In patches; what goes alone costs a whole batch."""
        return self._max_patches if work.patches is None else max(1, work.patches)

    def add(self, work: Work) -> None:
        self._arrivals += 1
        insort(self._works, (self._place(work.queued_at, self.cost(work)), self._arrivals, work))
        self.patches += self.cost(work)

    def remove(self, work: Work) -> None:
        """Takes out work that nobody waits for any more; nothing happens where it has gone already."""
        start = bisect_left(self._works, (self._place(work.queued_at, self.cost(work)),))
        for i in range(start, len(self._works)):
            if self._works[i][2] is work:
                del self._works[i]
                self.patches -= self.cost(work)
                return

    def take(self) -> list[Work]:
        """The next batch: in order, as far as `max_patches` or a taker's share go; at least one, where there is any."""
        most = min(self._max_patches, -(-self.patches // self._takers))
        patches = count = 0
        for _, _, work in self._works:
            if count and patches + self.cost(work) > most:
                break
            patches += self.cost(work)
            count += 1
        batch = [work for _, _, work in self._works[:count]]
        del self._works[:count]
        self.patches -= patches
        return batch

    def patches_before(self, patches: int, now: float) -> int:
        """Waiting patches that would go before work of `patches` that comes now."""
        ahead = bisect_left(self._works, (self._place(now, patches),))
        return sum(self.cost(work) for _, _, work in self._works[:ahead])

    def _place(self, queued_at: float, cost: int) -> float:
        return queued_at + cost * self._patience_s
