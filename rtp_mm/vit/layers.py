"""The blocks of a vision tower. The residual stream is float32; GEMMs and attention run in the compute dtype.

A branch adds its result to the stream, or returns it as `delta`, which the next norm adds in its own pass over the
stream: whichever its GEMM can fuse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rtp_mm import ops
from rtp_mm.vit.attention import Attention, Segments
from rtp_mm.vit.linear import Linear
from rtp_mm.vit.rope import RotaryTable

NORM_EPS = 1e-6  # in the code of every vision family so far, never in a config file


class LayerNorm(nn.Module):
    """Rows of float32 to mean 0 and variance 1, scaled and shifted, in `dtype`."""

    def __init__(self, dim: int, dtype: torch.dtype, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)
        self._dtype = dtype
        self._eps = eps

    def forward(self, x: Tensor, delta: Tensor | None, *, for_linear: bool = False) -> Tensor:
        """The norm of `x += delta`."""
        return ops.add_norm(x, delta, self.weight, self.bias, self._eps, self._dtype, for_linear=for_linear)


class RMSNorm(nn.Module):
    """Rows of float32 to mean square 1, scaled, in `dtype`."""

    def __init__(self, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)
        self._dtype = dtype

    def forward(self, x: Tensor, delta: Tensor | None, *, for_linear: bool = False) -> Tensor:
        """The norm of `x += delta`."""
        return ops.add_norm(x, delta, self.weight, None, NORM_EPS, self._dtype, for_linear=for_linear)


class SelfAttention(nn.Module):
    """Rows attend within their segment; q, k and v come from one GEMM."""

    def __init__(
        self,
        linear: Callable[..., Linear],
        dim: int,
        heads: int,
        attention: Attention,
        qkv_linear: Callable[..., Linear] | None = None,
    ) -> None:
        super().__init__()
        self.qkv = (qkv_linear or linear)(dim, 3 * dim)
        self.proj = linear(dim, dim)
        self._heads = heads
        self._attention = attention

    def forward(self, residual: Tensor, x: Tensor, segments: Segments, rotary: RotaryTable) -> Tensor | None:
        """residual += proj(attention(x)), or the delta."""
        qkv = self.qkv.in_blocks(x, 3 * self._heads).unflatten(1, (3, self._heads))
        return self.proj.add_to(residual, self._attention(qkv, rotary, segments).flatten(1))


class Mlp(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(
        self, linear: Callable[..., Linear], delicate: Callable[..., Linear], dim: int, hidden: int, activation: str
    ) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden, activation=activation)
        self.fc2 = delicate(hidden, dim)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """residual += mlp(x), or the delta."""
        return self.fc2.add_to(residual, self.fc1(x))


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)); gate and up are one GEMM."""

    def __init__(
        self, linear: Callable[..., Linear], delicate: Callable[..., Linear], dim: int, hidden: int, activation: str
    ) -> None:
        super().__init__()
        self.gate_up_proj = linear(dim, 2 * hidden, activation=f"{activation}_gate")
        self.down_proj = delicate(hidden, dim)

    def forward(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """residual += mlp(x), or the delta."""
        return self.down_proj.add_to(residual, self.gate_up_proj(x))


class Block(nn.Module):
    """A pre-norm transformer block over the float32 residual stream [N, dim], which it overwrites."""

    def __init__(self, norm: Callable[[int], nn.Module], attn: SelfAttention, mlp: Mlp | GatedMlp, dim: int) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attn
        self.norm2 = norm(dim)
        self.mlp = mlp

    def forward(self, x: Tensor, delta: Tensor | None, segments: Segments, rotary: RotaryTable) -> Tensor | None:
        """x += delta and both branches, or all but the last, which is the next delta."""
        delta = self.attn(x, self.norm1(x, delta, for_linear=True), segments, rotary)
        out: Tensor | None = self.mlp(x, self.norm2(x, delta, for_linear=True))
        return out


class PatchMerger(nn.Module):
    """Norm per patch, then `merge`^2 patches of a cell to one token: [N, dim] -> [N / merge^2, out]."""

    def __init__(
        self,
        linear: Callable[..., Linear],
        norm: Callable[[int], nn.Module],
        dim: int,
        merge: int,
        out: int,
    ) -> None:
        super().__init__()
        cell = dim * merge**2
        self.ln_q = norm(dim)
        # In the checkpoint's numbering the GELU, which is fused, stands between.
        self.mlp = nn.Sequential(linear(cell, cell, activation="gelu"), nn.Identity(), linear(cell, out))
        self._cell = cell

    def forward(self, x: Tensor, delta: Tensor | None) -> Tensor:
        tokens: Tensor = self.mlp(self.ln_q(x, delta).view(-1, self._cell))
        return tokens
