"""`ops.rms_norm` against float64, plain PyTorch and itself."""

from __future__ import annotations

import pytest
import reference
import torch
from torch import Tensor
from torch.nn import functional as F

from rtp_mm import ops

EPS = 1e-6


def random_rows(n: int, dim: int) -> tuple[Tensor, Tensor]:
    """Rows of very different size, and weights."""
    generator = torch.Generator().manual_seed(n + dim)
    rows, weight = torch.randn(n, dim, generator=generator), torch.randn(dim, generator=generator)
    return rows * torch.logspace(-4, 6, n)[:, None], weight


@pytest.mark.parametrize(("n", "dim"), [(40, 1280), (7, 83), (3, 16), (1, 1), (0, 8)])
def test_error_of_every_row_is_at_most_twice_that_of_plain_pytorch(n: int, dim: int) -> None:
    x, weight = random_rows(n, dim)
    exact = reference.rms_norm(x, weight, EPS)
    ours, plain = ops.rms_norm(x, weight, EPS), F.rms_norm(x, (dim,), weight, EPS)
    floor = exact.norm(dim=1) * 2**-23  # a single number may be lucky
    assert ((ours - exact).norm(dim=1) <= 2 * (plain - exact).norm(dim=1) + floor).all()


def test_eps_and_weight_count() -> None:
    x, weight = random_rows(4, 64)
    exact = reference.rms_norm(x, weight, EPS)
    without_eps, without_weight = (reference.rms_norm(x, w, e) for w, e in ((weight, 0.0), (weight.sign(), EPS)))
    ours = ops.rms_norm(x, weight, EPS).double()
    assert ((ours - exact).abs() <= 1e-6 * exact.abs()).all()
    assert all(float((wrong - exact)[0].norm() / exact[0].norm()) > 0.1 for wrong in (without_eps, without_weight))


def test_batching_is_invisible() -> None:
    x, weight = random_rows(70, 83)
    together = ops.rms_norm(x, weight, EPS)
    for begin, n in ((0, 1), (15, 3), (69, 1), (5, 60)):
        assert torch.equal(ops.rms_norm(x[begin : begin + n], weight, EPS), together[begin : begin + n])


def test_bf16_is_float32_rounded() -> None:
    x, weight = random_rows(40, 83)
    assert torch.equal(ops.rms_norm(x, weight, EPS, torch.bfloat16), ops.rms_norm(x, weight, EPS).bfloat16())
    with pytest.raises(RuntimeError, match=r"^rms_norm: out_dtype must be float32 or bfloat16, got float16"):
        ops.rms_norm(x, weight, EPS, torch.float16)


def test_a_bad_argument_is_refused_with_what_came() -> None:
    with pytest.raises(RuntimeError, match=r"^rms_norm: x must be contiguous \[N, D\] float32, got \[4\] float32"):
        ops.rms_norm(torch.ones(4), torch.ones(4), EPS)
    with pytest.raises(RuntimeError, match=r"^rms_norm: weight must be contiguous \[4\] float32, got \[3\] float32"):
        ops.rms_norm(torch.ones(2, 4), torch.ones(3), EPS)


def test_schema_and_fake_agree_with_the_kernel() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(torch.ops.rtp_mm.rms_norm.default, (*random_rows(5, 20), EPS, dtype))
