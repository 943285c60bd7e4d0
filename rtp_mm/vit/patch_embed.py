"""Patch embedding of raw bytes: normalisation, centring and the still image's second frame folded into the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rtp_mm import ops
from rtp_mm.errors import ProcessError
from rtp_mm.vit.packing import as_tensors, packed_rows

Rows = Sequence[NDArray[np.uint8] | Tensor]  # [n, K] each, on the host, or tensors on the tower's device

# The op multiplies x - 128, which is exact in every dtype; uncentred, the rounding would be twice as bad.
CENTRE = 128.0
ALIGNMENT = 8  # elements: 16 bytes, which the CUDA kernel copies at once


class Projection(nn.Module):
    """The published weight [dim, C, T, P, P] of a convolution whose kernel is its stride."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


class PackedProjection:
    """(x - 128) W'.T + b on a CPU, in float32: the weight is packed once, rows are read where they lie."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self._weight = ops.pack_linear(weight.float())
        self._bias = bias

    def __call__(self, rows: Rows, order: Tensor | None) -> Tensor:
        return ops.packed_patch_embed(as_tensors(rows), self._weight, self._bias, order=order)


class TermsProjection:
    """The same on CUDA: the weight in two 16-bit terms, high + low, or one of float32; rows are brought together on the
    device."""

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        # fp16 has few exponent bits: a power of two brings the largest weight near 1 and is undone after the sum.
        self._scale = 2.0 ** int(torch.frexp(weight.abs().max()).exponent) if dtype == torch.float16 else 1.0
        self._weight = _terms(weight / self._scale, dtype)
        self._bias = bias

    def __call__(self, rows: Rows, order: Tensor | None) -> Tensor:
        packed = packed_rows(rows, self._bias.device)
        return ops.patch_embed(packed, self._weight, self._bias, scale=self._scale, order=order, dtype=torch.float32)


class PatchEmbed(nn.Module):
    """uint8 patch rows [N, C * T * P * P] -> [N, dim] float32, T = 1 (still) or `temporal` (clip).

    With x a byte, W((x / 255 - mean) / std) = W'(x - 128) + b, where W' = W / (255 std) and
    b = sum W ((128 / 255 - mean) / std), both folded in float64 and kept as exactly as the device multiplies. A still
    image stands for `temporal` equal frames, so its W' is the sum over frames.
    """

    def __init__(self, dim: int, channels: int, temporal: int, patch: int) -> None:
        super().__init__()
        self.proj = Projection(dim, channels, temporal, patch, patch)

    def fold(self, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> None:
        """Replaces the published weight by the folded ones, for towers of this dtype; once, after loading."""
        weight = self.proj.weight.double()  # [dim, C, T, P, P]
        device = weight.device
        per_channel = (1, -1, 1, 1, 1)
        mean_ = torch.tensor(mean, dtype=torch.float64, device=device).view(per_channel)
        std_ = torch.tensor(std, dtype=torch.float64, device=device).view(per_channel)
        bias = (weight * ((CENTRE / 255 - mean_) / std_)).flatten(1).sum(1).float()
        scaled = weight / (255 * std_)
        self._by_columns: dict[int, Callable[[Rows, Tensor | None], Tensor]] = {
            w.shape[1]: PackedProjection(w, bias) if device.type == "cpu" else TermsProjection(w, bias, dtype)
            for w in (scaled.flatten(1), scaled.sum(2).flatten(1))
        }
        del self.proj

    def forward(self, rows: Rows, order: Tensor | None) -> Tensor:
        """`rows` of one kind, counted one item after another; `order` [N / G] int32: output group g of G rows is input
        group order[g]."""
        columns = rows[0].shape[1]
        if columns not in self._by_columns:
            raise ProcessError(f"patch rows must have {' or '.join(map(str, self._by_columns))} columns, got {columns}")
        return self._by_columns[columns](rows, order)


def _terms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[dim, K] float64 -> [terms, dim, K] whose sum is the weight as closely as the dtype allows."""
    if dtype == torch.float32:
        return weight.float()[None].contiguous()
    k = weight.shape[1]
    terms = weight.new_empty(2, weight.shape[0], k + -k % ALIGNMENT, dtype=dtype)[..., :k]
    terms[0] = weight
    terms[1] = weight - terms[0].double()
    return terms
