"""Rows of many items in one tensor."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

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
