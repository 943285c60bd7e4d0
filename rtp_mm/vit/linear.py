"""Linear layers, and the GEMMs that run them: one class per way, chosen once per tower (see `choose_gemm`).

By default a row's bits are the same whatever else is in the batch; that is a property of the GEMM.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtp_mm import _core, ops
from rtp_mm.errors import StartError


class Gemm(ABC):
    """One layer's activation(x @ weight.T + bias), made from weight [N, K] in the tower's dtype and bias [N] float32.
    On a CPU the weight may be the checkpoint's own file, mapped: it is read, and not kept.

    x is [M, K] in the compute dtype, contiguous, or with rows apart as an operator for the same device makes them
    `for_linear`. A layer with an activation may give more columns than N, zeros, and rows that lie apart, which the
    layer that it feeds takes.
    """

    is_reentrant: ClassVar[bool] = False  # whether several threads may use it, with any number of torch's each

    @abstractmethod
    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None: ...

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor: ...

    def in_blocks(self, x: Tensor, blocks: int) -> Tensor:
        """The product as [M, blocks, N / blocks], in the memory layout that the GEMM writes best; blocks contiguous."""
        return self(x).view(len(x), blocks, -1)

    @abstractmethod
    def add_to(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """residual [M, N] float32 += the product, in place; or the product, for the next norm to add in its pass."""


class PackedGemm(Gemm):
    """Our own, float32 on a CPU: 16-bit weights are widened in registers, and all else is fused."""

    is_reentrant: ClassVar[bool] = True
    _pack = staticmethod(ops.pack_linear)

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        self._weight = self._pack(weight, 2 if activation == "silu_gate" else 1)
        self._bias = bias
        self._activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        feeds_linear = self._activation != "none"
        return ops.packed_linear(x, self._weight, self._bias, self._activation, for_linear=feeds_linear)

    def in_blocks(self, x: Tensor, blocks: int) -> Tensor:
        return ops.packed_linear_blocks(x, self._weight, self._bias, blocks).transpose(0, 1)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        ops.packed_linear_add_(residual, x, self._weight, self._bias)


class Bf16Gemm(PackedGemm):
    """As `PackedGemm`, in bfloat16 but for the sums: by AMX or AVX-512 BF16 where the CPU has it."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        if activation != "none":
            weight, bias = self._padded(weight, bias, 2 if activation == "silu_gate" else 1)
        super().__init__(weight, bias, activation)

    @staticmethod
    def _pack(weight: Tensor, parts: int = 1) -> ops.PackedWeight:
        return ops.pack_bf16_linear(weight.bfloat16(), parts)

    @staticmethod
    def _padded(weight: Tensor, bias: Tensor, parts: int) -> tuple[Tensor, Tensor]:
        """With rows of zeros, so that the next layer's K is what `pack_bf16_linear` takes without copying its x."""
        missing = -(len(weight) // parts) % ops.BF16_MULTIPLE
        if not missing:
            return weight, bias
        rows = F.pad(weight.unflatten(0, (parts, -1)), (0, 0, 0, missing)).flatten(0, 1)
        return rows, F.pad(bias.unflatten(0, (parts, -1)), (0, missing)).flatten()


class Int8Gemm(PackedGemm):
    """As `PackedGemm`, with weights and activations in int8, a scale per row of either; sums are exact."""

    _pack = staticmethod(ops.pack_int8_linear)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x.float()).to(x.dtype)

    def in_blocks(self, x: Tensor, blocks: int) -> Tensor:
        return super().in_blocks(x.float(), blocks).to(x.dtype)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        super().add_to(residual, x.float())


class FixedGemm(Gemm):
    """Our own on CUDA, in Triton: one algorithm for every M, and all else is fused."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        self._weight, self._bias = ops.pack_fixed_linear(weight, bias, activation)
        self._activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return ops.fixed_linear(x, self._weight, self._bias, self._activation)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        ops.fixed_linear_add_(residual, x, self._weight, self._bias)


class Fp8Gemm(Gemm):
    """As `FixedGemm`, with weights and activations in e4m3, a scale per row of either."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        packed, self._bias = ops.pack_fixed_linear(weight, bias, activation)
        self._weight, self._scale = ops.quantize_rows(packed)
        self._dtype = weight.dtype
        self._activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        x, scale = ops.quantize_rows(x)
        scales = (scale, self._scale)
        return ops.fixed_linear(x, self._weight, self._bias, self._activation, scales=scales, dtype=self._dtype)

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        x, scale = ops.quantize_rows(x)
        ops.fixed_linear_add_(residual, x, self._weight, self._bias, scales=(scale, self._scale))


class CublasGemm(Gemm):
    """PyTorch's on CUDA, in the dtype of the weight, which is that of x; what it does not fuse follows it. It picks its
    algorithm by M, and with it the bits of a row.
    """

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        self._weight, self._bias = weight, bias.to(weight.dtype)
        self._activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return ops.activate(F.linear(x, self._weight, self._bias), self._activation)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


def choose_gemm(
    device: torch.device,
    compute_dtype: torch.dtype,
    *,
    is_invariant: bool = True,
    quantization: str = "none",
    is_delicate: bool = False,
) -> type[Gemm]:
    """The GEMM for a tower on `device` that computes in `compute_dtype`. Raises `StartError` if there is none.

    is_invariant: a row's bits may not depend on the batch; a CPU's never do.
    is_delicate:  the layer reads what an activation gave, whose few large values leave int8 little for the rest, or
                  its errors go straight into the answer. These have a quarter of the work, and left as they are the
                  error of int8 stays below that of bf16 throughout (benchmarks/results/int8_*).
    """
    if quantization == "int8":
        _check_int8(device)
        if not is_delicate:
            return Int8Gemm
    if quantization == "fp8":
        _check_fp8(device, compute_dtype)
        return Fp8Gemm
    if ops.uses_triton(device):
        return FixedGemm if is_invariant else CublasGemm
    return Bf16Gemm if compute_dtype == torch.bfloat16 else PackedGemm


def _check_int8(device: torch.device) -> None:
    """Raises `StartError` where int8 gains nothing: without products of bytes it runs at 0.4 of float32's speed."""
    if device.type != "cpu":
        raise StartError(f"MM_QUANTIZATION=int8 needs a CPU, and the tower is on {device}")
    if not _core.multiplies_bytes():
        raise StartError("MM_QUANTIZATION=int8 needs a CPU with AVX-512 VNNI or ARM's i8mm, and this one has neither")


def _check_fp8(device: torch.device, compute_dtype: torch.dtype) -> None:
    """Raises `StartError` where there are no e4m3 matrix instructions."""
    if device.type != "cuda":
        raise StartError(f"MM_QUANTIZATION=fp8 needs a GPU, and the tower is on {device}")
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 9):
        raise StartError(
            f"MM_QUANTIZATION=fp8 needs compute capability 8.9 or higher, and {torch.cuda.get_device_name(device)} "
            f"has {capability[0]}.{capability[1]}"
        )
    if compute_dtype == torch.float32:
        raise StartError("MM_QUANTIZATION=fp8 needs ACT_TYPE=bf16 or fp16")


def choose_compute_dtype(act_dtype: torch.dtype, device: torch.device, choice: str = "auto") -> torch.dtype:
    """The dtype that GEMMs and attention run in; `choice` is the setting `MM_COMPUTE_TYPE`.

    On a CPU whose bf16 instructions are slow or missing, float32 is several times faster and more exact. fp16 is used
    on none. Raises `StartError` for a choice that there is not.
    """
    if choice == "auto":
        if device.type == "cpu" and not (act_dtype == torch.bfloat16 and _core.bf16_instructions()):
            return torch.float32
        return act_dtype
    if device.type != "cpu":
        raise StartError(f"MM_COMPUTE_TYPE={choice} needs a CPU, and the tower is on {device}; there it is ACT_TYPE")
    if choice == "bf16" and act_dtype != torch.bfloat16:
        raise StartError("MM_COMPUTE_TYPE=bf16 needs ACT_TYPE=bf16")
    return torch.bfloat16 if choice == "bf16" else torch.float32


class Linear(nn.Module):
    """[M, in] -> [M, out], or half of it for a gated activation.

    Holds the published weight in `dtype` and the bias in float32, until `pack` gives both to the GEMM.
    """

    def __init__(
        self, in_features: int, out_features: int, dtype: torch.dtype, gemm: type[Gemm], activation: str = "none"
    ) -> None:
        super().__init__()
        if activation not in ops.ACTIVATIONS:
            raise StartError(f"this tower's activation {activation} is none of {', '.join(ops.ACTIVATIONS)}")
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=torch.float32), requires_grad=False)
        self._make_gemm: Callable[[Tensor, Tensor, str], Gemm] = gemm
        self._activation = activation
        self._lent: Sequence[Tensor] = ()

    def lend(self, parts: Sequence[Tensor]) -> None:
        """The published weight, for `pack` alone: contiguous tensors that stand above one another. They are joined
        there, one layer after another in the same memory.
        """
        self._lent = parts

    def pack(self) -> None:
        """Packs the weight; once, after loading. The original is freed."""
        self._gemm = self._make_gemm(self._published(), self.bias.data, self._activation)
        self._lent = ()
        del self.weight, self.bias

    def _published(self) -> Tensor:
        """The weight [out, in]."""
        if not self._lent:
            return self.weight.data
        return self._lent[0] if len(self._lent) == 1 else torch.cat(list(self._lent))

    def forward(self, x: Tensor) -> Tensor:
        return self._gemm(x)

    def in_blocks(self, x: Tensor, blocks: int) -> Tensor:
        """self(x), of a layer without activation, as [M, blocks, out / blocks]; see `Gemm`."""
        return self._gemm.in_blocks(x, blocks)

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor | None:
        """residual [M, out] float32 += self(x), in place; or self(x), if the next norm is to add it in its own pass."""
        return self._gemm.add_to(residual, x)
