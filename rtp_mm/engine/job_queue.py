"""What preprocess workers do, and in which order: short jobs before long ones, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import math
import time
from bisect import insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from rtp_mm.engine.slab import Slot
from rtp_mm.errors import MMError
from rtp_mm.types import Blob, Layout, MMUrlType, Prepared, PreprocessOptions, RowsShape

Check = Callable[[RowsShape], None]  # raises `MMError` for rows that must not be made

# What a worker reads and writes in a second, about: enough to tell a photograph (5 ms) from a film (seconds). Videos as
# in benchmarks/results/media_videos.json, 1.5 to 13 MB a second.
_FILE_BYTES_PER_S = {MMUrlType.VIDEO: 5e6, MMUrlType.AUDIO: 2e7}
_IMAGE_BYTES_PER_S = 5e7
_ROW_BYTES_PER_S = 5e8
LONG_S = 0.25


@runtime_checkable
class PredictsLayout(Protocol):
    """A preprocessor that tells how an item's rows will lie before it is decoded, `None` where it cannot."""

    def predict(self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions) -> Layout | None: ...


@runtime_checkable
class ChecksLayout(Protocol):
    """A preprocessor that tells how an item's rows can lie at all, so that no worker's word is taken for it."""

    def is_possible(self, layout: Layout, blob: Blob, mm_type: MMUrlType) -> bool: ...


def no_check(shape: RowsShape) -> None:
    """For rows that were judged before."""


@dataclass(slots=True, eq=False)
class Job:
    """An item for a worker.

    layout: predicted, of its rows.
    check:  told what its rows will be, where that was not predicted, before they are made.
    """

    blob: Blob
    mm_type: MMUrlType
    options: PreprocessOptions
    answer: asyncio.Future[Prepared]
    layout: Layout | None = None
    check: Check = no_check
    queued_at: float = field(default_factory=time.perf_counter)
    is_begun: bool = False  # a worker has heard of it
    slots: list[Slot] = field(default_factory=list)  # where a worker may write, the last where it was told to

    @property
    def expected_s(self) -> float:
        """How long it keeps a worker, about."""
        rate = _FILE_BYTES_PER_S.get(self.mm_type, _IMAGE_BYTES_PER_S)
        row_bytes = 0 if self.layout is None else math.prod(self.layout.shape)
        return self.blob.nbytes / rate + row_bytes / _ROW_BYTES_PER_S

    @property
    def is_long(self) -> bool:
        return self.expected_s > LONG_S

    def succeed(self, prepared: Prepared) -> None:
        if not self.answer.done():
            self.answer.set_result(prepared)

    def fail(self, error: MMError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


class JobQueue:
    """Jobs that wait, in the order of `queued_at + expected_s`: one yields for as long as it will take itself, and what
    comes after that stands behind it. Where there are several workers, one is left to short jobs.
    """

    def __init__(self, workers: int) -> None:
        self._waiting: list[Job] = []
        self._most_long = max(1, workers - 1)
        self._long = 0  # jobs taken and not ended

    def __iter__(self) -> Iterator[Job]:
        return iter(self._waiting)

    def add(self, job: Job) -> None:
        insort(self._waiting, job, key=lambda each: each.queued_at + each.expected_s)

    def take(self) -> Job | None:
        """The next job that may begin, if there is one; it counts until `end`."""
        for i, job in enumerate(self._waiting):
            if not job.is_long or self._long < self._most_long:
                self._long += job.is_long
                return self._waiting.pop(i)
        return None

    def end(self, job: Job) -> None:
        """No worker has it any more."""
        self._long -= job.is_long

    def remove(self, job: Job) -> None:
        """Takes out a job that nobody waits for any more. Raises `ValueError` where it does not wait."""
        self._waiting.remove(job)
