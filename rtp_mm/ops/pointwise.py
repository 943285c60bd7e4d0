"""The tower's pointwise passes, each once over memory: Triton for CUDA tensors, C++ or PyTorch for those of a CPU."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional as F

from rtp_mm.ops.rms_norm import rms_norm

ACTIVATIONS = ("none", "gelu", "quick_gelu", "silu_gate")


def uses_triton(device: torch.device) -> bool:
    """Whether tensors on `device` go to Triton: those on CUDA, and all under its interpreter (`TRITON_INTERPRET=1`)."""
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


def uses_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype on `device` go to oneDNN: those of bf16 on a CPU with AMX, which ours know nothing
    of, and which has eight times AVX-512 BF16's rate."""
    return device.type == "cpu" and dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """x [N, D] float32 += delta [N, D], in place; returns its norm by row in `dtype`.

    Without `bias` [D] float32 RMSNorm (arXiv 1910.07467), with it LayerNorm (arXiv 1607.06450); weight is [D] float32.
    Computed in float32. A row's bits depend on that row alone.
    """
    if uses_triton(x.device):
        from rtp_mm.ops import pointwise_triton

        return pointwise_triton.add_norm(x, delta, weight, bias, eps, dtype)
    if delta is not None:
        x += delta
    if bias is None:
        return rms_norm(x, weight, eps, dtype)
    return F.layer_norm(x, weight.shape, weight, bias, eps).to(dtype)


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of q and k inside qkv [N, 3, heads, head_dim], in place, in float32.

    cos, sin: [N, head_dim / 2] float32; dimension i is turned together with i + head_dim / 2.
    """
    if uses_triton(qkv.device):
        from rtp_mm.ops import pointwise_triton

        return pointwise_triton.rotate_qk_(qkv, cos, sin)
    first, second = qkv[:, :2].float().chunk(2, dim=-1)
    cos, sin = cos[:, None, None], sin[:, None, None]
    qkv[:, :2] = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return qkv


def activate(x: Tensor, activation: str) -> Tensor:
    """The activation called so, one of `ACTIVATIONS`, of x [M, N], which may be overwritten; [M, N] in its dtype.

    "gelu" with erf; "quick_gelu": x * sigmoid(1.702 x), the GELU that CLIP was trained with; "silu_gate":
    silu(gate) * up of gates beside ups, [M, N / 2].
    """
    if activation == "none":
        return x
    if uses_triton(x.device):
        from rtp_mm.ops import pointwise_triton

        return pointwise_triton.activate(x, activation)
    if activation == "silu_gate":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(x) if activation == "gelu" else x * torch.sigmoid(1.702 * x)
