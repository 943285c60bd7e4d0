"""Rows of many items in one tensor."""

from __future__ import annotations

import warnings
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from rtp_mm.vit import packing
from rtp_mm.vit.packing import packed_rows

DEVICES = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_rows_stand_one_after_another_with_their_dtype(device: torch.device, dtype: type) -> None:
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


@pytest.mark.parametrize(
    ("nbytes", "is_pinned", "is_staged"),
    [
        (100, True, False),  # a worker's rows: read from where they lie
        (100, False, True),
        (packing.STAGED_BYTES, False, True),
        (packing.STAGED_BYTES + 1, False, False),  # would keep much memory pinned
        (0, False, False),
    ],
)
def test_a_gpu_reads_from_pinned_memory(nbytes: int, is_pinned: bool, is_staged: bool) -> None:
    source = Mock(is_cuda=False, nbytes=nbytes)
    source.is_pinned.return_value = is_pinned
    read = packing._readable(source, torch.device("cuda"))
    assert read is (source.pin_memory.return_value if is_staged else source)


def test_on_a_cpu_nothing_is_copied_twice() -> None:
    rows = torch.arange(6)
    assert packing.to_device(rows, torch.device("cpu")) is rows
