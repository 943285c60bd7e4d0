"""Axial rotary embedding of a vision tower: half of a head's pairs turn by the row, half by the column.

Source: Qwen2-VL (arXiv 2409.12191) and its published code; base 10000, never in a config file.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BASE = 10000.0


class RotaryTable(NamedTuple):
    """cos and sin of every row's angles, [N, 1, head_dim / 2] float32: the row's angles, then the column's."""

    cos: Tensor
    sin: Tensor


def rotary_table(rope_hw: Tensor, head_dim: int) -> RotaryTable:
    """`rope_hw`: [N, 2] int32 (row, column) of each patch, in the tower's row order."""
    quarter = head_dim // 4
    frequencies = 1.0 / BASE ** (torch.arange(quarter, dtype=torch.float32, device=rope_hw.device) / quarter)
    angles = (rope_hw[:, :, None] * frequencies).view(-1, 1, 2 * quarter)
    return RotaryTable(angles.cos(), angles.sin())


def rotate(x: Tensor, table: RotaryTable) -> Tensor:
    """[N, heads, head_dim] -> the same, contiguous: dimension i is paired with i + head_dim / 2. In float32."""
    first, second = x.float().chunk(2, dim=-1)
    cos, sin = table
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
