"""The blocks of a vision tower. The residual stream is float32; GEMMs and attention run in the compute dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtp_mm.vit.attention import Attention, Segments
from rtp_mm.vit.linear import Linear
from rtp_mm.vit.rope import RotaryTable, rotate

NORM_EPS = 1e-6  # in the code of every family so far, never in a config file


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "quick_gelu": quick_gelu}


class LayerNorm(nn.Module):
    """Rows of float32 to mean 0 and variance 1, scaled and shifted."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, NORM_EPS)


class RMSNorm(nn.Module):
    """Rows of float32 to mean square 1, scaled."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=torch.float32), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, NORM_EPS)


class SelfAttention(nn.Module):
    """Rows attend within their segment; q, k and v come from one GEMM."""

    def __init__(self, linear: Callable[[int, int], Linear], dim: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.qkv = linear(dim, 3 * dim)
        self.proj = linear(dim, dim)
        self._heads = heads
        self._attention = attention

    def forward(self, x: Tensor, segments: Segments, rotary: RotaryTable) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self._heads, -1)).unbind(1)
        attended = self._attention(rotate(q, rotary), rotate(k, rotary), v, segments)
        out: Tensor = self.proj(attended.flatten(1))
        return out


class Mlp(nn.Module):
    """down(act(up(x)))."""

    def __init__(self, linear: Callable[[int, int], Linear], dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden)
        self.fc2 = linear(hidden, dim)
        self._activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self._activation(self.fc1(x)))
        return out


class GatedMlp(nn.Module):
    """down(act(gate(x)) * up(x)); gate and up are one GEMM."""

    def __init__(self, linear: Callable[[int, int], Linear], dim: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.gate_up_proj = linear(dim, 2 * hidden)
        self.down_proj = linear(hidden, dim)
        self._activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        out: Tensor = self.down_proj(self._activation(gate) * up)
        return out


class Block(nn.Module):
    """A pre-norm transformer block over the float32 residual stream [N, dim]."""

    def __init__(
        self, norm: Callable[[int], nn.Module], attn: SelfAttention, mlp: nn.Module, dim: int, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attn = attn
        self.norm2 = norm(dim)
        self.mlp = mlp
        self._dtype = dtype

    def forward(self, x: Tensor, segments: Segments, rotary: RotaryTable) -> Tensor:
        attended: Tensor = self.attn(self.norm1(x).to(self._dtype), segments, rotary)
        x = x + attended
        transformed: Tensor = self.mlp(self.norm2(x).to(self._dtype))
        return x + transformed


class PatchMerger(nn.Module):
    """Norm per patch, then `merge`^2 patches of a cell to one token: [N, dim] -> [N / merge^2, out]."""

    def __init__(
        self,
        linear: Callable[[int, int], Linear],
        norm: Callable[[int], nn.Module],
        dim: int,
        merge: int,
        out: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        cell = dim * merge**2
        self.ln_q = norm(dim)
        self.mlp = nn.Sequential(linear(cell, cell), nn.GELU(), linear(cell, out))
        self._cell = cell
        self._dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        tokens: Tensor = self.mlp(self.ln_q(x).to(self._dtype).view(-1, self._cell))
        return tokens
