"""Linear layers whose rows do not know each other: a row's bits are the same whatever else is in the batch.

That is a property of the GEMM that is called, so the GEMM is chosen here, once per tower (see `choose_gemm`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtp_mm import ops
from rtp_mm.errors import StartError


def quick_gelu(x: Tensor) -> Tensor:
    """x * sigmoid(1.702 x): the GELU that CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


def silu_gate(gate_up: Tensor) -> Tensor:
    """[M, 2 N], gate beside up -> silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "quick_gelu": quick_gelu,
    "silu_gate": silu_gate,
}


class Gemm(Protocol):
    """x [M, K] in the compute dtype, weight [N, K] as `pack` returned it, bias [N] float32."""

    @property
    def row_multiple(self) -> int:
        """What M must be a multiple of, or rows would know each other."""

    def pack(self, weight: Tensor, activation: str) -> Tensor:
        """The weight as the GEMM wants it; once, after loading."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        """activation(x @ weight.T + bias)."""

    def add(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """residual + x @ weight.T + bias, with [M, N] float32 as the residual, which may be overwritten."""


class PackedGemm:
    """Our own, float32 on a CPU: 16-bit weights are widened in registers, and all else is fused."""

    row_multiple = 1

    def pack(self, weight: Tensor, activation: str) -> Tensor:
        return ops.pack_linear(weight, 2 if activation == "silu_gate" else 1)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        return ops.packed_linear(x, weight, bias, activation)

    def add(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.packed_linear_add_(residual, x, weight, bias)


@dataclass(frozen=True, slots=True)
class PlainGemm:
    """A library's, in the dtype of `x`, which is the weight's."""

    product: Callable[[Tensor, Tensor, Tensor], Tensor]
    # They keep a row's bits from a few rows up, but not at 1, nor, threaded, at small odd counts.
    row_multiple: int = 16

    def pack(self, weight: Tensor, activation: str) -> Tensor:
        return weight

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
        return ACTIVATIONS[activation](self.product(x, weight, bias.to(x.dtype)))

    def add(self, residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return residual + self.product(x, weight, bias.to(x.dtype))


def onednn_product(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x @ weight.T + bias by oneDNN: `F.linear` may pick its algorithm, and with it the bits, by the batch's size."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def choose_gemm(device: torch.device, compute_dtype: torch.dtype) -> Gemm:
    """The GEMM for a tower on `device` that computes in `compute_dtype`."""
    if device.type != "cpu":
        return PlainGemm(F.linear)
    return PackedGemm() if compute_dtype == torch.float32 else PlainGemm(onednn_product)


def compute_dtype(act_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that GEMMs and attention run in.

    A CPU without bf16 instructions emulates them: float32 is several times faster there and more exact. fp16 has no
    instructions on any CPU that we know.
    """
    if device.type == "cpu" and not (act_dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    return act_dtype


class Linear(nn.Module):
    """[M, in] -> [M, out], or half of it for a gated activation; M a multiple of the GEMM's `row_multiple`.

    The weight is kept in `dtype`, the bias in float32.
    """

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, gemm: Gemm, activation: str = "none"
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise StartError(f"this tower's activation {activation} is none of {', '.join(ACTIVATIONS)}")
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self._gemm = gemm
        self._activation = activation

    def prepare(self) -> None:
        """Packs the weight; once, after loading. The original is freed."""
        self.weight = nn.Parameter(self._gemm.pack(self.weight, self._activation), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._gemm.linear(x, self.weight, self.bias, self._activation)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + self(x), in float32; `residual` may be overwritten."""
        return self._gemm.add(residual, x, self.weight, self.bias)
