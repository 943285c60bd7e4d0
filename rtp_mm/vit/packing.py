"""From host memory to the device, without waiting for what it has to do before; many items' rows into one tensor."""

from __future__ import annotations

import warnings
from bisect import bisect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

with warnings.catch_warnings(action="ignore"):
    # Of arrays that are not to be written torch warns once in a process: here, where no other thread sees the filters.
    torch.from_numpy(np.frombuffer(b" ", np.uint8))

STAGED_BYTES = 1 << 26  # of one copy; a GPU is busy with more rows than that for longer than it waits for them


def packed_rows(items: Sequence[NDArray[Any] | Tensor], device: torch.device) -> Tensor:
    """[sum of n, C] on `device` from arrays [n, C] of one dtype, one after another: a copy each, from where it lies.

    To a GPU the copies are asynchronous, and from where an array lies if that memory is registered with it: keep the
    arrays until its stream has come so far. What lies half in registered memory goes in two copies: CUDA refuses one
    over both. Tensors are on the device, complete, from whatever stream.
    """
    sources = as_tensors(items)
    packed = torch.empty((sum(map(len, items)), *items[0].shape[1:]), dtype=sources[0].dtype, device=device)
    for part, source in zip(packed.split([*map(len, items)]), sources, strict=True):
        _copy(source, part)
        if source.is_cuda:
            source.record_stream(
                torch.cuda.current_stream(device)
            )  # another's memory is not given away before the copy
    return packed


def as_tensors(items: Sequence[NDArray[Any] | Tensor]) -> list[Tensor]:
    """Arrays as tensors of the same memory, to be read and not written; tensors as they are."""
    return [item if isinstance(item, Tensor) else torch.from_numpy(item) for item in items]


def _copy(source: Tensor, target: Tensor) -> None:
    if not (cut := _cut(source)):
        target.copy_(_readable(source, target.device), non_blocking=True)
        return
    sizes = [cut, source.numel() - cut]
    for part, place in zip(source.reshape(-1).split(sizes), target.view(-1).split(sizes), strict=True):
        place.copy_(_readable(_alone(part), target.device), non_blocking=True)


def _cut(source: Tensor) -> int:
    """Elements before memory of another kind, registered or not, follows; 0 where all is of one. A pointer tells of its
    own byte alone, so this asks in halves.
    """
    if source.is_cuda or not source.numel():
        return 0
    flat, last = source.reshape(-1), source.numel() - 1

    def kind(i: int) -> bool:
        return _alone(flat[i : i + 1]).is_pinned()

    return bisect(range(last), False, key=lambda i: kind(i) != kind(0)) if kind(0) != kind(last) else 0


def _alone(part: Tensor) -> Tensor:
    """The same memory as the beginning of a storage, of which alone `is_pinned` tells."""
    return torch.from_numpy(part.view(torch.uint8).numpy()).view(part.dtype)


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """`host` on `device`; to a GPU asynchronous, so leave it as it is."""
    return _readable(host, device).to(device, non_blocking=True)


def _readable(source: Tensor, device: torch.device) -> Tensor:
    """The tensor, or a copy in pinned memory: to read from any other, the driver may wait for the stream first."""
    if device.type != "cuda" or source.is_cuda or source.is_pinned() or not 0 < source.nbytes <= STAGED_BYTES:
        return source
    return source.pin_memory()  # torch keeps it until what was enqueued from it is done
