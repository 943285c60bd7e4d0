"""`ops.packed_linear` of bfloat16: pairs, columns of zeros, and rows that lie apart."""

from __future__ import annotations

import pytest
import reference
import torch
from linear_layers import ACTIVATIONS, error, random_layer
from torch import Tensor
from torch.nn import functional as F

from rtp_mm import ops


def bf16(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    return ops.packed_linear(x, ops.pack_bf16_linear(weight, 2 if activation == "silu_gate" else 1), bias, activation)


def random_bf16_layer(m: int, k: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    x, weight, bias = random_layer(m, k, n, torch.bfloat16)
    return x.bfloat16(), weight, bias


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "k", "n"), [(230, 301, 100), (7, 1280, 66), (40, 129, 32), (3, 5, 6), (30, 16, 330)])
def test_bf16_rounds_the_answer_and_nothing_else(m: int, k: int, n: int, activation: str) -> None:
    """Whatever K is modulo 2 and 256; nearly all bits are those of the exact answer, rounded."""
    x, weight, bias = random_bf16_layer(m, k, n)
    exact = reference.packed_linear(x, weight, bias, activation)
    ours = bf16(x, weight, bias, activation)
    assert ours.dtype == torch.bfloat16
    assert error(ours, exact) <= 1.001 * error(exact.bfloat16(), exact)
    assert float((ours != exact.bfloat16()).double().mean()) < 2e-3
    added = ops.packed_linear_add_(torch.zeros(m, n), x, ops.pack_bf16_linear(weight), bias)
    assert error(added, reference.packed_linear(x, weight, bias, "none")) < 1e-6


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batching_is_invisible_in_bf16(activation: str) -> None:
    x, weight, bias = random_bf16_layer(460, 1030, 70)
    together = bf16(x, weight, bias, activation)
    for begin, m in ((0, 1), (1, 2), (13, 3), (222, 9), (5, 300)):
        assert torch.equal(bf16(x[begin : begin + m], weight, bias, activation), together[begin : begin + m])


def test_bf16_cuts_as_floats_do() -> None:
    x, weight, bias = random_bf16_layer(50, 200, 72)
    blocks = ops.packed_linear_blocks(x, ops.pack_bf16_linear(weight), bias, 3)
    assert torch.equal(blocks, bf16(x, weight, bias).unflatten(1, (3, -1)).transpose(0, 1))


def test_bf16_keeps_nan_and_infinity_in_their_rows() -> None:
    x, weight, bias = random_bf16_layer(20, 40, 64)
    x[3, 7], x[5, 0] = torch.nan, -torch.inf
    for activation in ACTIVATIONS:
        is_finite = bf16(x, weight, bias, activation).isfinite().all(1)
        assert [i for i, finite in enumerate(is_finite) if not finite] == [3, 5], activation


def test_bf16_rounds_to_nearest_ties_to_even_up_to_infinity() -> None:
    """Of every float32 with a bit or two below a bfloat16's last, as of NaN with any payload."""
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | lower).view(torch.float32)
        ours = bf16(torch.zeros(1, 1).bfloat16(), torch.zeros(2**16, 1).bfloat16(), values)[0]
        assert torch.equal(ours.isnan(), values.isnan())
        assert torch.equal(ours[~ours.isnan()], values.bfloat16()[~ours.isnan()])


@pytest.mark.parametrize("k", [5, 40, 129])
def test_bf16_takes_columns_of_zeros_up_to_its_multiple(k: int) -> None:
    x, weight, bias = random_bf16_layer(50, k, 70)
    wide = F.pad(x, (0, -k % ops.BF16_MULTIPLE))
    assert torch.equal(bf16(wide, weight, bias), bf16(x, weight, bias))


@pytest.mark.parametrize("k", [40, 128])
@pytest.mark.parametrize("m", [1, 31, 100])
def test_bf16_takes_rows_that_lie_apart_and_nothing_between_them(m: int, k: int) -> None:
    x, weight, bias = random_bf16_layer(m, k, 70)
    for stride in (k + 1, ops.linear_row_stride(k, x.dtype, for_linear=True), k + 64):
        apart = torch.full((m, stride), torch.nan, dtype=x.dtype)[:, :k].copy_(x)
        assert torch.equal(bf16(apart, weight, bias), bf16(x, weight, bias))
