"""Linear layers whose rows do not know each other: a row's bits are the same whatever else is in the batch.

That is a property of the GEMM that is called, so the call is chosen here, once per device (see `choose_gemm`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# oneDNN's kernels keep a row's bits from a few rows up, but not at 1, nor, threaded, at small odd counts.
ROW_MULTIPLE = 16

Gemm = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # x [M, K], weight [N, K], bias [N] -> [M, N]


def onednn_gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias by oneDNN, in the dtype of `x`, for M a multiple of `ROW_MULTIPLE`.

    `F.linear` in float32 goes to MKL instead, which picks its algorithm, and with it the bits, by the batch's size.
    """
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


# In order of preference on a CPU; on CUDA it is F.linear.
CPU_GEMMS: dict[str, Gemm] = {"onednn": onednn_gemm, "torch": F.linear}


def choose_gemm(device: torch.device) -> Gemm:
    """The GEMM for `device`."""
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        return CPU_GEMMS["onednn"]
    return CPU_GEMMS["torch"]


def compute_dtype(act_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that GEMMs and attention run in.

    A CPU without bf16 instructions emulates them: float32 is 3x faster there and more exact (16-bit weights are
    widened as they are used). fp16 has no instructions on any CPU that we know.
    """
    if device.type == "cpu" and not (act_dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()):
        return torch.float32
    return act_dtype


class Scratch:
    """One buffer that all layers of a tower widen their weights into, so that weights stay 16 bits wide in memory.

    For one thread at a time, as the tower is: an allocation per call would cost more in page faults than the copy.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def widened(self, weight: Tensor) -> Tensor:
        """`weight` as float32, valid until the next call."""
        if self._buffer.numel() < weight.numel():
            self._buffer = torch.empty(weight.numel(), dtype=torch.float32, device=weight.device)
        return self._buffer[: weight.numel()].view(weight.shape).copy_(weight)


class Linear(nn.Module):
    """[M, in] -> [M, out], M a multiple of `ROW_MULTIPLE`; computes in the dtype of its input.

    The weight is kept in `dtype`; the bias in float32, rounded as the GEMM needs it.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, gemm: Gemm, scratch: Scratch) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self._gemm = gemm
        self._scratch = scratch

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.weight.dtype == x.dtype else self._scratch.widened(self.weight)
        return self._gemm(x, weight, self.bias.to(x.dtype))
