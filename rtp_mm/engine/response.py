"""The outcomes of a request's items as one answer, or as one error that names every bad item."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from rtp_mm.engine.caches import Embedded
from rtp_mm.errors import BadItemsError, DeadlineError, ItemFailure, MMError, ProcessError, QueueFullError
from rtp_mm.media.redact import redact
from rtp_mm.types import Blob, MMEmbeddingRes, MultimodalInput, PreprocessOptions

Timings = dict[str, float]  # milliseconds by stage


class Answer(NamedTuple):
    """An item's answer and what it took, each stage as long as for whoever it was done for."""

    embedded: Embedded
    timings_ms: Timings


class Begun(NamedTuple):
    """How far an item came without waiting: to its outcome, or else to its bytes, or else to what it asks for."""

    outcome: Answer | MMError | None = None
    options: PreprocessOptions = PreprocessOptions()
    blob: Blob | None = None


class Stages:
    """The milliseconds that an item has spent in each stage so far."""

    def __init__(self) -> None:
        self._left: Timings = {}
        self._entered: tuple[str, float] | None = None  # the one that it is in, and since when
        self._rest: Stages | None = None

    @contextmanager
    def inside(self, stage: str) -> Iterator[None]:
        self._entered = stage, time.perf_counter()
        try:
            yield
        finally:
            self._left, self._entered = self._own(), None

    def go_on_in(self, rest: Stages) -> None:
        """What comes next is done for several, and `rest` tells of it."""
        self._rest = rest

    def so_far(self) -> Timings:
        return self._own() | (self._rest.so_far() if self._rest else {})

    def _own(self) -> Timings:
        if self._entered is None:
            return self._left
        stage, since = self._entered
        return self._left | {stage: (time.perf_counter() - since) * 1e3}


def slowest(items: Iterable[Timings]) -> Timings:
    """Of several items, the slowest in each stage."""
    timings: Timings = {}
    for item in items:
        for stage, milliseconds in item.items():
            timings[stage] = max(milliseconds, timings.get(stage, 0.0))
    return timings


def as_response(
    inputs: Sequence[MultimodalInput], outcomes: Sequence[Answer | BaseException | None], *, may_share: bool
) -> MMEmbeddingRes:
    """All items' answers, or `BadItemsError` that names every bad one; a bug is raised as it is. An outcome is `None`
    where the item was given up because another one's error refuses the request.

    `may_share`: the answer will only be read; a library's caller, who may write to it, gets copies of what is cached.
    """
    failed: dict[int, MMError] = {}
    answers: list[Answer] = []
    for index, outcome in enumerate(outcomes):
        if isinstance(outcome, MMError):
            failed[index] = outcome
        elif isinstance(outcome, BaseException):
            raise outcome
        elif outcome is not None:
            answers.append(outcome)
    if failed:
        raise _as_one_error(inputs, failed)
    items = [answer.embedded if may_share else answer.embedded.copy() for answer in answers]
    position_ids = [item.position_ids for item in items if item.position_ids is not None]
    if position_ids and len(position_ids) < len(items):
        raise ProcessError("the model gave position ids for some items and none for others")
    messages = [item.message for item in items if item.message is not None]
    cached_items = sum("forward" not in answer.timings_ms for answer in answers)
    return MMEmbeddingRes(
        [item.embedding for item in items],
        position_ids or None,
        timings_ms=slowest(answer.timings_ms for answer in answers),
        cached_items=cached_items,
        seconds_per_grid=[item.seconds_per_grid for item in items],
        cut_s=[item.cut_s for item in items],
        messages=messages if len(messages) == len(items) else None,
    )


def _as_one_error(inputs: Sequence[MultimodalInput], failed: Mapping[int, MMError]) -> MMError:
    """A full queue refuses the request as a whole, with its `retry_after_ms`, unless some item must fail again. Where
    time alone was short, a `DeadlineError` names the items.
    """
    full = [error for error in failed.values() if isinstance(error, QueueFullError)]
    if full and not any(error.status == "INVALID_ARGUMENT" for error in failed.values()):
        worst = max(full, key=lambda refusal: refusal.retry_after_ms)
        return QueueFullError(str(worst), worst.retry_after_ms)  # others may have been given the same one
    bad_items = BadItemsError([ItemFailure(i, redact(inputs[i].url), error) for i, error in failed.items()])
    return DeadlineError(str(bad_items)) if isinstance(bad_items.verdict, DeadlineError) else bad_items
