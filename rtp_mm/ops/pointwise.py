"""The tower's pointwise passes, each once over memory: Triton for CUDA tensors, C++ for those of a CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor

import rtp_mm.ops.library  # noqa: F401  # the schema must be there before its fake
from rtp_mm.ops.packed_linear import fake_rows

ACTIVATIONS = ("none", "gelu", "quick_gelu", "silu_gate")


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to Triton: those on CUDA, and all under its interpreter (`TRITON_INTERPRET=1`)."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def add_norm(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    *,
    for_linear: bool = False,
) -> Tensor:
    """x [N, D] float32 += delta [N, D], in place; returns its norm by row in `dtype`, with rows on a CPU as far apart
    as `linear_row_stride` says.

    Without `bias` [D] float32 RMSNorm (arXiv 1910.07467), with it LayerNorm (arXiv 1607.06450); weight is [D] float32.
    Computed in float32. A row's bits depend on that row alone. On a CPU `delta` and `dtype` are float32 or bfloat16,
    and tensors contiguous; else `RuntimeError`.
    """
    if uses_triton(x.device):
        from rtp_mm.ops import pointwise_triton

        return pointwise_triton.add_norm(x, delta, weight, bias, eps, dtype)
    out: Tensor = torch.ops.rtp_mm.add_norm_.default(x, delta, weight, bias, eps, dtype, for_linear)
    return out


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of q and k inside qkv [N, 3, heads, head_dim], in place, in float32.

    cos, sin: [N, head_dim / 2] float32; dimension i is turned together with i + head_dim / 2. On a CPU qkv is float32
    or bfloat16, and heads may lie in any order, each contiguous; else `RuntimeError`.
    """
    if uses_triton(qkv.device):
        from rtp_mm.ops import pointwise_triton

        return pointwise_triton.rotate_qk_(qkv, cos, sin)
    torch.ops.rtp_mm.rotate_qk_.default(qkv, cos, sin)
    return qkv


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation called so, one of `ACTIVATIONS`, of x [M, N], which may be overwritten; [M, N] in its dtype.

    "gelu" with erf; "quick_gelu": x * sigmoid(1.702 x), the GELU that CLIP was trained with; "silu_gate":
    silu(gate) * up of gates beside ups, [M, N / 2]. On a CPU x is float32 or bfloat16, and contiguous; else
    `RuntimeError`.
    """
    if activation == "none":
        return x
    if uses_triton(x.device):
        from rtp_mm.ops import pointwise_triton

        return pointwise_triton.activate(x, activation)
    if activation == "silu_gate":
        out: Tensor = torch.ops.rtp_mm.silu_gate.default(x)
        return out
    torch.ops.rtp_mm.activate_.default(x, activation)
    return x


@torch.library.register_fake("rtp_mm::add_norm_")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    out_dtype: torch.dtype,
    for_linear: bool = False,
) -> Tensor:
    return fake_rows(x, x.shape[0], x.shape[1], out_dtype, for_linear)


@torch.library.register_fake("rtp_mm::rotate_qk_")  # type: ignore[untyped-decorator]
def _(qkv: Tensor, cos: Tensor, sin: Tensor) -> None:
    return None


@torch.library.register_fake("rtp_mm::activate_")  # type: ignore[untyped-decorator]
def _(x: Tensor, activation: str) -> None:
    return None


@torch.library.register_fake("rtp_mm::silu_gate")  # type: ignore[untyped-decorator]
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
