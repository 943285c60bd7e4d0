"""From the rows of many items, each in memory of its own, to one tensor on the device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def packed_rows(items: Sequence[NDArray[Any] | Tensor], device: torch.device) -> Tensor:
    """[sum of n, C] on `device` from arrays [n, C] of one dtype, one after another: a copy each, from where it lies.

    To a GPU the copies are asynchronous where an array's memory is registered with it, so keep the arrays until its
    stream is synchronised. Tensors are on the device, complete, from whatever stream.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # a worker's rows: only read here
        sources = [item if isinstance(item, Tensor) else torch.from_numpy(item) for item in items]
    packed = torch.empty((sum(map(len, items)), *items[0].shape[1:]), dtype=sources[0].dtype, device=device)
    for part, source in zip(packed.split([*map(len, items)]), sources, strict=True):
        part.copy_(source, non_blocking=True)
        if source.is_cuda:
            source.record_stream(
                torch.cuda.current_stream(device)
            )  # another's memory is not given away before the copy
    return packed
