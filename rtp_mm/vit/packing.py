"""From host memory to the device, never waiting for what it has to do before; many items' rows into one tensor."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

STAGED_BYTES = 1 << 26  # of one copy; a GPU is busy with more rows than that for longer than it waits for them


def packed_rows(items: Sequence[NDArray[Any] | Tensor], device: torch.device) -> Tensor:
    """[sum of n, C] on `device` from arrays [n, C] of one dtype, one after another: a copy each, from where it lies.

    To a GPU the copies are asynchronous, and from where an array lies if that memory is registered with it: keep the
    arrays until its stream has come so far. Tensors are on the device, complete, from whatever stream.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a worker's rows: only read here
        sources = [item if isinstance(item, Tensor) else torch.from_numpy(item) for item in items]
    packed = torch.empty((sum(map(len, items)), *items[0].shape[1:]), dtype=sources[0].dtype, device=device)
    for part, source in zip(packed.split([*map(len, items)]), sources, strict=True):
        part.copy_(_readable(source, device), non_blocking=True)
        if source.is_cuda:
            source.record_stream(
                torch.cuda.current_stream(device)
            )  # another's memory is not given away before the copy
    return packed


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`; to a GPU asynchronous, so leave it as it is."""
    return _readable(host, device).to(device, non_blocking=True)


def _readable(source: Tensor, device: torch.device) -> Tensor:
    """The tensor, or a copy in pinned memory: to read from any other, the driver may wait for the stream first."""
    if device.type != "cuda" or source.is_cuda or source.is_pinned() or not 0 < source.nbytes <= STAGED_BYTES:
        return source
    return source.pin_memory()  # torch keeps it until what was enqueued from it is done
