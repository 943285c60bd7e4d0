"""From patch bytes to the tower's first activations in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import rtp_mm.ops.library  # noqa: F401  # the schema must be there before its fake
from rtp_mm.ops.packed_linear import PackedWeight


def packed_patch_embed(
    rows: Sequence[Tensor],
    packed: PackedWeight,
    bias: Tensor,
    *,
    order: Tensor | None = None,
    pos: Tensor | None = None,
) -> Tensor:
    """`patch_embed` on a CPU, of many items' rows where they lie: [N, D] float32.

    rows:   [n, K] uint8 each; N is the sum of n, and their rows are counted one item after another.
    packed: what `pack_linear` made of the weight [D, K] float32, normalisation folded in.
    bias:   [D] float32.
    order:  [N / G] int32 or None: rows come in groups of G, and output group g is input group order[g].
    pos:    [N, D] float32 or None: position embedding of the output's rows.

    A row's bits do not depend on its neighbours, its place or N. Tensors must be contiguous; else, and for an order out
    of range, `RuntimeError`.
    """
    out: Tensor = torch.ops.rtp_mm.packed_patch_embed.default(list(rows), packed.panels, bias, order, pos)
    return out


def patch_embed(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    scale: float = 1.0,
    order: Tensor | None = None,
    pos: Tensor | None = None,
    dtype: torch.dtype,
) -> Tensor:
    """`out[i] = scale * sum_k (rows[r(i), k] - 128) * weight[:, k] + bias + pos[i]` on CUDA: [N, D] in `dtype`.

    rows:   [N, K] uint8.
    weight: [terms, D, K] float32, bfloat16 or float16, normalisation folded in; its one or two terms are summed in
            float32 (high and low part of a weight that 16 bits cannot hold). May be a view of something longer in K:
            columns that start at multiples of 16 bytes are read fastest.
    bias:   [D] float32.
    scale:  undoes a power of two in the weight, which keeps float16 terms in range.
    order:  [N / G] int32 or None: rows come in groups of G, and output group g is input group order[g].
    pos:    [N, D] float32 or None: position embedding of the output's rows.
    dtype:  float32, bfloat16 or float16.

    Accumulated in float32 and rounded once. A row's bits do not depend on its neighbours, its place or N. Tensors must
    be contiguous but for the weight, and on one device; else, and for an order out of range, `RuntimeError`. On CUDA
    the kernel finds such an order, which ends the process's use of the device.
    """
    out: Tensor = torch.ops.rtp_mm.patch_embed.default(rows, weight, bias, scale, order, pos, dtype)
    return out


@torch.library.register_fake("rtp_mm::packed_patch_embed")  # type: ignore[untyped-decorator]
def _(rows: Sequence[Tensor], packed: Tensor, bias: Tensor, order: Tensor | None, pos: Tensor | None) -> Tensor:
    return packed.new_empty(sum(item.shape[0] for item in rows), bias.shape[0])


@torch.library.register_fake("rtp_mm::patch_embed")  # type: ignore[untyped-decorator]
def _(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float,
    order: Tensor | None,
    pos: Tensor | None,
    out_dtype: torch.dtype,
) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[1], dtype=out_dtype)
