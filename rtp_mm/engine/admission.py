"""What the server takes on: limits on all requests in progress together, and on each item before it is decoded."""

from __future__ import annotations

import sys
import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from rtp_mm.engine.response import Stages
from rtp_mm.errors import QueueFullError, ReplyTooLargeError, WrongFormatError
from rtp_mm.types import Blob, RowsShape

FIRST_GUESS_SHARE = 1 / 32  # of the patches that may wait: what a download comes to, before any has shown it
AVERAGED_ITEMS = 16  # that this is learnt from, about: an exponential average
DOWNLOADS_SHARE = 1 / 2  # of the patches that may wait, at most, for what downloads come to: slow ones idle no device
MIN_RETRY_AFTER_MS = 100  # before any forward has shown how long one takes


class Cost(NamedTuple):
    """Of one item: patches for the device, and host bytes while it is under way."""

    patches: int
    nbytes: int
    file_bytes: int = 0  # of these

    @classmethod
    def of(cls, blob: Blob, rows: RowsShape | None) -> Cost:
        """`rows`, where they are predicted."""
        patches, row_bytes = (0, 0) if rows is None else (rows[0], prod(rows))
        return cls(patches, blob.nbytes + row_bytes, blob.nbytes)


@dataclass(slots=True, eq=False)
class Visit:
    """One request in the server. `nbytes` are held for it until it leaves: its message, its answers."""

    nbytes: int
    ends_at: float  # its deadline, by the loop's clock
    downloads: int = 0  # that it was granted
    items: int = 0  # that are under way
    file_bytes: int = 0  # of these, as far as they are here
    answer_bytes: int = 0
    stages: list[Stages] = field(default_factory=list)  # of what was begun for it


class Held:
    """What an item under way costs in all, as far as is known; nothing once it is over."""

    def __init__(self, admission: Admission, visit: Visit) -> None:
        self._admission, self._visit = admission, visit
        self._is_over = False
        self.cost = Cost(0, 0)

    def expect(self, cost: Cost, visit: Visit) -> None:
        """Before it is spent, for `visit`. Raises `QueueFullError` and `WrongFormatError`."""
        self._admission._learn(cost)
        more = Cost(*(new - old for new, old in zip(cost, self.cost, strict=True)))
        self._admission._check(visit, more)
        self._count(cost)

    def settle(self, cost: Cost) -> None:
        """Once it is spent: it counts, and refuses nothing any more."""
        self._admission._learn(cost)
        self._count(cost)

    def end(self) -> None:
        self._count(Cost(0, 0))
        self._is_over = True

    def _count(self, cost: Cost) -> None:
        if self._is_over:
            return
        self._admission.patches += cost.patches - self.cost.patches
        self._admission._add(cost.nbytes - self.cost.nbytes)
        self._admission._add_file(self._visit, cost.file_bytes - self.cost.file_bytes)
        self.cost = cost


class Admission:
    """Counts what requests in progress hold and refuses what would be too much, at once. For one event loop, save that
    a download may tell its size from any thread.

    The oldest request is never refused for what others hold: of several that together are too large for the server one
    always goes on. An idle server takes any item, however large; but the files of many at once may not be more bytes
    than all may be, nor may a request's answers.
    """

    def __init__(
        self, max_requests: int, max_patches: int, max_bytes: int, seconds_for: Callable[[int], float]
    ) -> None:
        """seconds_for: how long the device takes for a number of patches."""
        self._max_requests, self._max_patches, self._max_bytes = max_requests, max_patches, max_bytes
        self._seconds_for = seconds_for
        self._visits: dict[Visit, None] = {}  # the oldest first
        self.patches = 0
        self._usual_patches = FIRST_GUESS_SHARE * max_patches  # of an item
        self._nbytes = 0
        self._lock = threading.RLock()  # over `_visits`, `file_bytes` of each, `_nbytes` and `rejections`
        self._returned: deque[int] = deque()  # bytes that are held no more
        self.rejections: Counter[str] = Counter()

    @property
    def requests(self) -> int:
        return len(self._visits)

    @property
    def nbytes(self) -> int:
        """Held for all requests in progress."""
        self._add(0)
        return self._nbytes

    def _add(self, nbytes: int) -> None:
        with self._lock:
            while self._returned:
                nbytes -= self._returned.popleft()
            self._nbytes += nbytes

    def _add_file(self, visit: Visit, nbytes: int) -> None:
        with self._lock:
            visit.file_bytes += nbytes

    @contextmanager
    def visiting(self, nbytes: int, ends_at: float) -> Iterator[Visit]:
        """A request whose message takes `nbytes`, from here to its end. Raises `QueueFullError`."""
        if self.requests >= self._max_requests:
            raise self._refusal("requests", f"{self.requests} requests are in the server (MM_MAX_QUEUE_SIZE)")
        visit = Visit(0, ends_at)
        with self._lock:
            self._visits[visit] = None
        try:
            self._check(visit, Cost(0, nbytes))
            self.keep(visit, nbytes)
            yield visit
        finally:
            with self._lock:
                del self._visits[visit]
            self._add(-visit.nbytes)

    @contextmanager
    def holding(self, visit: Visit, cost: Cost) -> Iterator[Held]:
        """Work for `visit` that costs so much while it is under way. Raises `QueueFullError` and `WrongFormatError`."""
        held = Held(self, visit)
        visit.items += 1
        try:
            held.expect(cost, visit)
            yield held
        finally:
            held.end()
            visit.items -= 1

    def _learn(self, cost: Cost) -> None:
        if cost.patches:  # else they are not known
            self._usual_patches += (cost.patches - self._usual_patches) / AVERAGED_ITEMS

    def check_room(self, visit: Visit, downloads: int) -> None:
        """Before a download for `visit`, beside the `downloads` under way for anyone. Raises `QueueFullError` where
        there is no room for what all of them usually come to: it would be thrown away, and the work with it.
        """
        downloads += visit.downloads
        coming = min((downloads + 1) * self._usual_patches, DOWNLOADS_SHARE * self._max_patches)
        if self.patches + coming > self._max_patches and not self._is_oldest(visit):
            raise self._patches_refusal(f", downloads under way: {downloads}")
        visit.downloads += 1

    @contextmanager
    def metering(self, visits: Collection[Visit]) -> Iterator[Callable[[int], None]]:
        """Something that grows, as a download does, for all who wait for it, one at least: to be told its size so far.
        That raises `QueueFullError` and `WrongFormatError`.
        """
        held, owner = 0, self.foremost(visits)
        owner.items += 1

        def grow(nbytes: int) -> None:
            nonlocal held
            with self._lock:
                if nbytes > held:
                    more = nbytes - held
                    self._check(self.foremost(visits), Cost(0, more, more))
                    self._add(more)
                    self._add_file(owner, more)
                    held = nbytes

        try:
            yield grow
        finally:
            owner.items -= 1
            with self._lock:
                self._add(-held)
                self._add_file(owner, -held)
                held = sys.maxsize  # a thread whose download was given up may still tell: of no interest any more

    def follow(self, answer: object, nbytes: int) -> None:
        """Counts `nbytes` for as long as somebody holds `answer`: on its way to a caller who may read slowly."""
        self._add(nbytes)
        weakref.finalize(answer, self._returned.append, nbytes)  # on any thread, amid anything: so no more than that

    def keep(self, visit: Visit, nbytes: int) -> None:
        """Bytes that are there already, held until `visit` ends."""
        visit.nbytes += nbytes
        self._add(nbytes)

    def keep_answer(self, visit: Visit, nbytes: int) -> None:
        """The same for one of its answers. Raises `ReplyTooLargeError` where all of them are too many bytes."""
        if visit.answer_bytes and visit.answer_bytes + nbytes > self._max_bytes:
            raise ReplyTooLargeError(f"the answers take more than {self._limit}: send fewer or smaller items")
        visit.answer_bytes += nbytes
        self.keep(visit, nbytes)

    def check_in_time(self, visit: Visit, wait_s: float, now: float) -> None:
        """Refuses what would wait past its deadline: who is told now can still ask another server."""
        if now + wait_s > visit.ends_at and not self._is_oldest(visit):
            raise self._refusal("deadline", f"{wait_s:.1f} s of work is waiting, more than the deadline leaves")

    def foremost(self, visits: Collection[Visit]) -> Visit:
        """Of several that wait for the same, the one that is refused last."""
        with self._lock:
            oldest = next(iter(self._visits), None)
        return oldest if oldest is not None and oldest in visits else max(visits, key=lambda visit: visit.ends_at)

    def _check(self, visit: Visit, cost: Cost) -> None:
        """Raises `QueueFullError`, and `WrongFormatError` for more files of one request than may be at once."""
        if self._is_oldest(visit):
            if cost.file_bytes and visit.items > 1 and visit.file_bytes + cost.file_bytes > self._max_bytes:
                raise WrongFormatError(f"the request's files take more than {self._limit}: send fewer at once")
            return
        if cost.patches and self.patches + cost.patches > self._max_patches:
            raise self._patches_refusal()
        if cost.nbytes and self.nbytes + cost.nbytes > self._max_bytes:
            raise self._refusal("bytes", f"{self.nbytes >> 20} MiB are in flight (MM_MAX_BYTES_IN_FLIGHT_MB)")

    def _is_oldest(self, visit: Visit) -> bool:
        with self._lock:
            return next(iter(self._visits), visit) is visit

    def _patches_refusal(self, more: str = "") -> QueueFullError:
        return self._refusal("patches", f"{self.patches} patches are waiting or running{more} (MM_MAX_QUEUE_PATCHES)")

    @property
    def _limit(self) -> str:
        return f"{self._max_bytes >> 20} MiB (MM_MAX_BYTES_IN_FLIGHT_MB)"

    def _refusal(self, reason: str, text: str) -> QueueFullError:
        with self._lock:
            self.rejections[reason] += 1
        return QueueFullError(text, max(MIN_RETRY_AFTER_MS, round(self._seconds_for(self.patches) * 1e3)))
