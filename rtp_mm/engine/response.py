"""The outcomes of a request's items as one answer, or as one error that names every bad item."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rtp_mm.engine.caches import Embedded
from rtp_mm.errors import BadItemsError, ItemFailure, MMError, ProcessError, QueueFullError
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


class Stopwatch:
    """Writes the milliseconds spent inside it to `timings[stage]`."""

    def __init__(self, timings: Timings, stage: str) -> None:
        self._timings, self._stage = timings, stage

    def __enter__(self) -> None:
        self._started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._timings[self._stage] = (time.perf_counter() - self._started) * 1e3


def as_response(
    inputs: Sequence[MultimodalInput], outcomes: Sequence[Answer | BaseException | None], *, is_own: bool
) -> MMEmbeddingRes:
    """All items' answers, or `BadItemsError` that names every bad one; a bug is raised as it is. An outcome is `None`
    where the item was given up because another one's error refuses the request.

    `is_own`: the answer is ours to read; a library's caller, who may write into it, gets copies of what is cached.
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
    timings: Timings = {}
    for answer in answers:
        for stage, milliseconds in answer.timings_ms.items():
            timings[stage] = max(milliseconds, timings.get(stage, 0.0))
    items = [answer.embedded if is_own else answer.embedded.copy() for answer in answers]
    position_ids = [item.position_ids for item in items if item.position_ids is not None]
    if position_ids and len(position_ids) < len(items):
        raise ProcessError("the model gave position ids for some items and none for others")
    messages = [item.message for item in items if item.message is not None]
    cached_items = sum("forward" not in answer.timings_ms for answer in answers)
    return MMEmbeddingRes(
        [item.embedding for item in items],
        position_ids or None,
        timings_ms=timings,
        cached_items=cached_items,
        seconds_per_grid=[item.seconds_per_grid for item in items],
        cut_s=[item.cut_s for item in items],
        messages=messages if len(messages) == len(items) else None,
    )


def _as_one_error(inputs: Sequence[MultimodalInput], failed: Mapping[int, MMError]) -> MMError:
    """A full queue refuses the request as a whole, with its `retry_after_ms`, unless some item must fail again."""
    full = [error for error in failed.values() if isinstance(error, QueueFullError)]
    if full and not any(error.status == "INVALID_ARGUMENT" for error in failed.values()):
        return max(full, key=lambda refusal: refusal.retry_after_ms)
    return BadItemsError([ItemFailure(index, redact(inputs[index].url), error) for index, error in failed.items()])
