"""Linear layers on a CPU: weights packed once, bias, activation and residual fused into the product. In float32."""

from __future__ import annotations

import torch
from torch import Tensor

import rtp_mm.ops.library  # noqa: F401  # the schema must be there before its fake

PANEL = 64  # columns; as in csrc/cpu/packed_linear.h


def pack_linear(weight: Tensor, parts: int = 1) -> Tensor:
    """[N, K] float32, bfloat16 or float16 -> its panels in the same dtype, for `packed_linear`.

    `parts` = 2 for a gated layer: the weight is gate above up, and every panel gets half of either.
    """
    packed: Tensor = torch.ops.rtp_mm.pack_linear.default(weight, parts)
    return packed


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    """`activation(x @ weight.T + bias)`: [M, N] float32. `packed_linear_blocks` with one block."""
    return packed_linear_blocks(x, packed, bias, 1, activation)[0]


def packed_linear_blocks(x: Tensor, packed: Tensor, bias: Tensor, blocks: int, activation: str = "none") -> Tensor:
    """`activation(x @ weight.T + bias)`, its columns in blocks of equal width: [blocks, M, N / blocks] float32.

    x:          [M, K] float32.
    packed:     what `pack_linear` made of the weight; its elements are widened exactly as they are used.
    bias:       [N] float32.
    activation: "none", "gelu" (with erf), "quick_gelu", or "silu_gate": `silu(gate) * up`, [M, N / 2], with a weight
                packed in two parts.
    blocks:     how many the columns are cut into; heads, say, that are then read one by one.

    A row's bits do not depend on its neighbours, its place or M. Tensors must be contiguous; else `RuntimeError`.
    """
    out: Tensor = torch.ops.rtp_mm.packed_linear.default(x, packed, bias, activation, blocks)
    return out


def packed_linear_add_(out: Tensor, x: Tensor, packed: Tensor, bias: Tensor) -> Tensor:
    """`out += x @ weight.T + bias` in place, with `out` [M, N] float32; the rest as for `packed_linear`."""
    torch.ops.rtp_mm.packed_linear_add_.default(out, x, packed, bias)
    return out


@torch.library.register_fake("rtp_mm::pack_linear")  # type: ignore[untyped-decorator]
def _(weight: Tensor, parts: int) -> Tensor:
    rows, k = weight.shape
    return weight.new_empty(-(-(rows // parts) // (PANEL // parts)), k, PANEL)


@torch.library.register_fake("rtp_mm::packed_linear")  # type: ignore[untyped-decorator]
def _(x: Tensor, packed: Tensor, bias: Tensor, activation: str, blocks: int) -> Tensor:
    return x.new_empty(blocks, x.shape[0], bias.shape[0] // (2 if activation == "silu_gate" else 1) // blocks)


@torch.library.register_fake("rtp_mm::packed_linear_add_")  # type: ignore[untyped-decorator]
def _(out: Tensor, x: Tensor, packed: Tensor, bias: Tensor) -> None:
    return None
