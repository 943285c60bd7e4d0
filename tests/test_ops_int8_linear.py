"""`ops.packed_linear` of int8 against its twin, and against float64."""

from __future__ import annotations

import pytest
import reference
import torch
from linear_layers import ACTIVATIONS, error, random_layer
from torch import Tensor

from rtp_mm import ops


def int8(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    return ops.packed_linear(x, ops.pack_int8_linear(weight, 2 if activation == "silu_gate" else 1), bias, activation)


@pytest.mark.parametrize(("m", "k", "n"), [(230, 300, 100), (7, 1281, 66), (40, 2050, 32), (3, 5, 6)])
def test_int8_equals_its_twin_bit_for_bit(m: int, k: int, n: int) -> None:
    """Whatever K is modulo 4 and 512; rows of very different size, each with a scale of its own."""
    x, weight, bias = random_layer(m, k, n)
    x *= torch.logspace(-6, 6, m)[:, None]
    weight *= torch.logspace(-3, 3, n)[:, None]
    assert torch.equal(int8(x, weight, bias), reference.int8_linear(x, weight, bias))


def test_packing_leaves_the_weight_as_it_was() -> None:
    _, weight, _ = random_layer(1, 40, 300)
    before = weight.clone()
    ops.pack_linear(weight)
    ops.pack_int8_linear(weight)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_int8_costs_about_a_hundredth(activation: str) -> None:
    x, weight, bias = random_layer(64, 1280, 100, torch.bfloat16)
    assert 1e-3 < error(int8(x, weight, bias, activation), reference.packed_linear(x, weight, bias, activation)) < 2e-2


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batching_is_invisible_in_int8(activation: str) -> None:
    x, weight, bias = random_layer(460, 1030, 70)
    together = int8(x, weight, bias, activation)
    for begin, m in ((0, 1), (1, 2), (13, 3), (222, 9), (5, 300)):
        assert torch.equal(int8(x[begin : begin + m], weight, bias, activation), together[begin : begin + m])


def test_int8_adds_and_cuts_as_floats_do() -> None:
    x, weight, bias = random_layer(50, 200, 72)
    packed_weight, whole = ops.pack_int8_linear(weight), int8(x, weight, bias)
    residual = torch.randn(50, 72)
    assert torch.equal(ops.packed_linear_add_(residual.clone(), x, packed_weight, bias), residual + whole)
    blocks = ops.packed_linear_blocks(x, packed_weight, bias, 3)
    assert torch.equal(blocks, whole.unflatten(1, (3, -1)).transpose(0, 1))


def test_int8_keeps_nan_and_infinity_in_their_rows_and_zeros_exact() -> None:
    x, weight, bias = random_layer(20, 40, 64)
    x[3, 7], x[5, 0], x[6], x[7] = torch.nan, -torch.inf, 0, 1e-42
    out = int8(x, weight, bias)
    assert [i for i, finite in enumerate(out.isfinite().all(1)) if not finite] == [3, 5]
    assert torch.equal(out[6], bias)
    torch.testing.assert_close(out[7], bias)


def test_int8_sums_do_not_overflow() -> None:
    """At the largest K, all of the largest magnitude."""
    ones = torch.ones(1, 2**16)
    torch.testing.assert_close(int8(ones, ones, torch.zeros(1)), torch.full((1, 1), 2.0**16))
    torch.testing.assert_close(int8(ones, -ones, torch.zeros(1)), torch.full((1, 1), -(2.0**16)))
    more = torch.ones(1, 2**16 + 1)
    with pytest.raises(RuntimeError, match="bytes are summed over K of 65536 at most, got 65537"):
        int8(more, more, torch.zeros(1))
