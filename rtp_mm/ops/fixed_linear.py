"""Linear layers whose bits do not depend on the number of rows, on CUDA. In Triton, imported when first called."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_fixed_linear(weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """[N, K] and [N] -> the same with K, and under an activation N, up to a multiple of 16 with zeros.

    A layer with an activation feeds another one, whose K is padded as well: it multiplies these columns by zeros.
    """
    from rtp_mm.ops import linear_triton

    return linear_triton.pack_linear(weight, bias, activation)


def fixed_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str = "none",
    *,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`activation(x @ weight.T + bias)`: [M, N], or [M, N / 2] for "silu_gate", in `dtype`, by default that of x.

    x:            [M, K] in the weight's dtype, or narrower, down to the width that `pack_fixed_linear` was given.
    weight, bias: as `pack_fixed_linear` made them; the bias is float32.
    activation:   "none", "gelu" (with erf), "quick_gelu", or "silu_gate": `silu(gate) * up`, gates above ups.
    scales:       for e4m3 operands, [M] and [N] float32: what each row of x and of the weight was divided by.

    Accumulated in float32, e4m3 on Hopper in fewer bits, and rounded once. A row's bits do not depend on its
    neighbours, its place or M.
    """
    from rtp_mm.ops import linear_triton

    return linear_triton.linear(x, weight, bias, activation, scales=scales, dtype=dtype)


def fixed_linear_add_(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor, *, scales: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """`out += x @ weight.T + bias` in place, with `out` [M, N] float32; the rest as for `fixed_linear`."""
    from rtp_mm.ops import linear_triton

    return linear_triton.linear(x, weight, bias, "none", out=out, scales=scales)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """[M, K] -> [M, K] float8_e4m3fn, K up to a multiple of 16 with zeros, and what brought each row's largest value to
    448 when the row was divided by it: [M] float32."""
    from rtp_mm.ops import linear_triton

    return linear_triton.quantize_rows(x)
