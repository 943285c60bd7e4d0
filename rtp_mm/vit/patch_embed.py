"""Patch embedding of raw bytes: normalisation, centring and the still image's second frame folded into the weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rtp_mm import ops

# The op multiplies x - 128, which is exact in every dtype; uncentred, the rounding would be twice as bad.
CENTRE = 128.0
ALIGNMENT = 8  # elements: 16 bytes, which the CUDA kernel copies at once


class Projection(nn.Module):
    """The published weight [dim, C, T, P, P] of a convolution whose kernel is its stride."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


class PatchEmbed(nn.Module):
    """uint8 patch rows [N, C * T * P * P] -> [N, dim] float32, T = 1 (still) or `temporal` (clip).

    With x a byte, W((x / 255 - mean) / std) = W'(x - 128) + b, where W' = W / (255 std) and
    b = sum W ((128 / 255 - mean) / std), both folded in float64 and kept as exactly as the device multiplies: float32
    on a CPU, two 16-bit terms (high + low) on CUDA. A still image stands for `temporal` equal frames, so its W' is the
    sum over frames.
    """

    bias: Tensor  # [dim] float32
    still_weight: Tensor  # [terms, dim, C * P * P]
    clip_weight: Tensor  # [terms, dim, C * T * P * P]

    def __init__(self, dim: int, channels: int, temporal: int, patch: int) -> None:
        super().__init__()
        self.proj = Projection(dim, channels, temporal, patch, patch)

    def fold(self, mean: Sequence[float], std: Sequence[float], term_dtype: torch.dtype) -> None:
        """Replaces the published weight by the folded ones; once, after loading.

        `term_dtype`: float32 for one term, bfloat16 or float16 for two.
        """
        weight = self.proj.weight.double()  # [dim, C, T, P, P]
        device = weight.device
        per_channel = (1, -1, 1, 1, 1)
        mean_ = torch.tensor(mean, dtype=torch.float64, device=device).view(per_channel)
        std_ = torch.tensor(std, dtype=torch.float64, device=device).view(per_channel)
        offset = (weight * ((CENTRE / 255 - mean_) / std_)).flatten(1).sum(1)
        scaled = weight / (255 * std_)
        # fp16 has few exponent bits: a power of two brings the largest weight near 1 and is undone after the sum.
        self._scale = 2.0 ** int(torch.frexp(scaled.abs().max()).exponent) if term_dtype == torch.float16 else 1.0
        self.register_buffer("bias", offset.float(), persistent=False)
        self.register_buffer("clip_weight", _terms(scaled / self._scale, term_dtype), persistent=False)
        self.register_buffer("still_weight", _terms(scaled.sum(2) / self._scale, term_dtype), persistent=False)
        del self.proj

    def forward(self, rows: Tensor, order: Tensor | None) -> Tensor:
        """`rows` on the device; `order` [N / G] int32: output group g of G rows is input group order[g]."""
        is_still = rows.shape[1] == self.still_weight.shape[2]
        weight = self.still_weight if is_still else self.clip_weight
        return ops.patch_embed(rows, weight, self.bias, scale=self._scale, order=order, dtype=torch.float32)


def _terms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """[dim, ...] float64 -> [terms, dim, K] whose sum is the weight as closely as the dtype allows."""
    flat = weight.flatten(1)
    if dtype == torch.float32:
        return flat.float()[None].contiguous()
    k = flat.shape[1]
    terms = flat.new_empty(2, flat.shape[0], k + -k % ALIGNMENT, dtype=dtype)[..., :k]
    terms[0] = flat
    terms[1] = flat - terms[0].double()
    return terms
