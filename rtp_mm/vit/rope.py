"""Axial rotary embedding of a vision tower: half of a head's pairs turn by the row, half by the column.

Source: Qwen2-VL (arXiv 2409.12191) and its published code; base 10000, never in a config file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rtp_mm.vit.packing import to_device

BASE = 10000.0
FIRST_POSITIONS = 512  # 7168 pixels a side at 14 a patch; more are made when they come


class RotaryTable(NamedTuple):
    """cos and sin of every row's angles, [N, head_dim / 2] float32: the row's angles, then the column's."""

    cos: Tensor
    sin: Tensor


class RotaryAngles:
    """cos and sin of a coordinate's angles, for as many coordinates as were ever asked for."""

    def __init__(self, head_dim: int, device: torch.device) -> None:
        self._quarter = head_dim // 4
        self._device = device
        self._angles = self._of(FIRST_POSITIONS)

    def up_to(self, positions: int) -> Tensor:
        """[2, at least `positions`, head_dim / 4] float32 on the device, for `ops.vision_positions`."""
        angles = self._angles
        if positions > angles.shape[1]:
            angles = self._angles = self._of(1 << (positions - 1).bit_length())  # another thread may set its own
        return angles

    def _of(self, positions: int) -> Tensor:
        # On the CPU whatever the device is: both use the same bits.
        coordinates, pairs = (torch.arange(n, dtype=torch.float32, device="cpu") for n in (positions, self._quarter))
        angles = coordinates[:, None] * (1.0 / BASE ** (pairs / self._quarter))
        return to_device(torch.stack((angles.cos(), angles.sin())), self._device)
