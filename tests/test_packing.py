"""Rows of many items in one tensor."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from conftest import require
from torch import Tensor

from rtp_mm.vit import packing
from rtp_mm.vit.packing import packed_rows


@pytest.mark.parametrize("name", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rows_stand_one_after_another_with_their_dtype(name: str, dtype: type) -> None:
    if name == "cuda":
        require("cuda")
    device = torch.device(name)
    items = [np.random.default_rng(n).integers(0, 255, (n, 12)).astype(dtype) for n in (3, 1, 0, 40)]
    packed = packed_rows(items, device)
    assert packed.device.type == device.type
    np.testing.assert_array_equal(packed.cpu().numpy(), np.concatenate(items))


def test_read_only_rows_are_taken_without_a_warning_and_not_written() -> None:
    rows = np.arange(24, dtype=np.uint8).reshape(2, 12)
    rows.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed = packed_rows([rows], torch.device("cpu"))
    packed.zero_()
    assert rows.max() == 23


@pytest.mark.parametrize("count", [100, 1 << 20])
def test_a_gpu_that_is_busy_is_not_waited_for(count: int) -> None:
    """Though what it reads lies in memory that is not pinned, where the driver may wait before it copies."""
    require("cuda")
    device = torch.device("cuda")
    rows = np.random.default_rng(0).integers(0, 255, (count, 12)).astype(np.uint8)
    for _ in range(2):  # behind a second's work; once to have the memory, which may take a wait
        torch.cuda._sleep(1 << 31)
        moved = packed_rows([rows, rows], device), packing.to_device(torch.from_numpy(rows), device)
        is_busy = not torch.cuda.current_stream().query()
        torch.cuda.synchronize()
        np.testing.assert_array_equal(moved[0].cpu().numpy(), np.concatenate([rows, rows]))
        np.testing.assert_array_equal(moved[1].cpu().numpy(), rows)
        del moved
    assert is_busy


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("registered", [0, 1, 11, 12, 13, 30, 35, 36])
def test_a_copy_reads_one_kind_of_memory(
    registered: int, dtype: torch.dtype, is_first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA refuses others. As in a slab, the registered part ends somewhere, maybe within a row; torch tells how the
    storage of a tensor begins.
    """
    rows = torch.arange(36, dtype=dtype).reshape(3, 12)
    end = rows.data_ptr() + registered * rows.itemsize
    read: list[Tensor] = []
    monkeypatch.setattr(Tensor, "is_pinned", lambda tensor: (tensor.untyped_storage().data_ptr() < end) == is_first)
    monkeypatch.setattr(packing, "_readable", lambda source, device: read.append(source) or source)
    assert torch.equal(packed_rows([rows.numpy(), rows.numpy()], torch.device("cpu")), torch.cat([rows, rows]))
    sizes = [registered, 36 - registered] if 0 < registered < 36 else [36]
    assert [part.numel() for part in read] == 2 * sizes


def test_on_a_cpu_nothing_is_copied_twice() -> None:
    rows = torch.arange(6)
    assert packing.to_device(rows, torch.device("cpu")) is rows
