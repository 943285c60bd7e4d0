"""The protocol with a preprocess worker: what it is told, and what of its replies is believed: only what was checked.

Functions that read a reply raise `WorkerDiedError` for one that makes no sense: a worker that says such things is
treated as dead.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtp_mm.engine.worker_process import WorkerDiedError
from rtp_mm.errors import NotSupportedError, ProcessError, WrongFormatError
from rtp_mm.logs import log_event
from rtp_mm.preprocess.worker import Place, Task
from rtp_mm.types import Blob, Layout, LogMel, MMUrlType, Patches, Prepared, PreprocessOptions, RowsShape

Reply = Mapping[str, Any]

_log = logging.getLogger(__name__)

_MOST = 1 << 62  # JSON's integers have thousands of digits, which no error can print and no counter hold
_ERRORS = {cls.__name__: cls for cls in (WrongFormatError, NotSupportedError, ProcessError)}  # what a worker may raise


class OutOfMemoryError(WrongFormatError):
    """The item needs more memory than its worker may hold. What the worker still holds nobody knows."""


def content(blob: Blob) -> NDArray[np.uint8]:
    """[blob.nbytes], a view of its bytes."""
    if isinstance(blob.data, bytes):
        return np.frombuffer(blob.data, np.uint8)
    return blob.data.reshape(-1).view(np.uint8)


def task(blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, place: Place | None, threads: int) -> Task:
    """All that a worker hears of an item, but for its bytes. `place` for its rows, where they are predicted."""
    dtype, shape = (None, ()) if isinstance(blob.data, bytes) else (blob.data.dtype.str, blob.data.shape)
    return Task(mm_type, options, blob.content_hash, blob.source, blob.nbytes, dtype, shape, place, threads)


def checked(reply: Reply, source: str) -> Reply:
    """The reply about the item from `source`; raises the `MMError` that it may be instead."""
    match reply:
        case {"bug": str(bug), "stack": str(stack)}:
            log_event(_log, "preprocessing failed", logging.ERROR, source=source, stack=stack)
            raise ProcessError(f"preprocessing failed with {bug}")
        case {"error": str(name), "text": str(text)}:
            raise _ERRORS.get(name, ProcessError)(text)
        case {"out_of_memory": str(text)}:
            raise OutOfMemoryError(text)
        case {"bug": _} | {"error": _} | {"out_of_memory": _}:
            raise WorkerDiedError
    return reply


def rows_shape(reply: Reply) -> RowsShape:
    """Of the rows that the worker asks room for."""
    match reply.get("shape"):
        case [int(count), int(columns)] if count > 0 and columns > 0 and count * columns < _MOST:
            return count, columns
    raise WorkerDiedError


def layout(reply: Reply, shape: RowsShape) -> Layout:
    """Of the rows of that shape that the worker made."""
    return Layout(shape, None if "cut_s" in reply else _grid(reply, shape))


def prepared_by(reply: Reply, layout: Layout) -> Callable[[NDArray[np.uint8]], Prepared]:
    """What to make of the rows that lie so."""
    if (grid := layout.grid_thw) is not None:
        seconds, decoded = _seconds(reply), _count(reply, "decoded_frames")
        return lambda rows: Patches(rows, grid, seconds, decoded)
    cut_s = reply["cut_s"]
    if layout.shape[1] % 4 or not (cut_s is None or (isinstance(cut_s, float) and 0 < cut_s < math.inf)):
        raise WorkerDiedError
    return lambda rows: LogMel(rows.view(np.float32), cut_s)


def _grid(reply: Reply, shape: RowsShape) -> tuple[int, int, int]:
    match reply.get("grid"):
        case [int(t), int(h), int(w)] if min(t, h, w) > 0 and t * h * w == shape[0]:
            return t, h, w
    raise WorkerDiedError


def _seconds(reply: Reply) -> float | None:
    match reply.get("seconds_per_grid"):
        case None:
            return None
        case float(seconds) if 0 < seconds < math.inf:
            return seconds
    raise WorkerDiedError


def _count(reply: Reply, name: str) -> int:
    match reply.get(name):
        case int(count) if 0 <= count < _MOST:
            return count
    raise WorkerDiedError
