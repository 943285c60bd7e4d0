"""Layers at random, and how far answers are off: what the tests of `ops.packed_linear` share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = {
    "none": lambda y: y,
    "gelu": F.gelu,
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "silu_gate": lambda y: F.silu(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1],
}


def random_layer(m: int, k: int, n: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x [m, k], weight [n, k], bias [n]; products of size 1."""
    generator = torch.Generator().manual_seed(m * k + n)
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in ((m, k), (n, k), (n,)))
    return x, (weight * k**-0.5).to(dtype), bias


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())
