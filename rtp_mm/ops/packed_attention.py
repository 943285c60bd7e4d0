"""Attention over packed sequences on a CPU, rotary embedding included."""

from __future__ import annotations

import torch
from torch import Tensor

import rtp_mm.ops.library  # noqa: F401  # the schema must be there before its fake
from rtp_mm.ops.packed_linear import fake_rows


def packed_attention(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, *, for_linear: bool = False) -> Tensor:
    """`softmax(rotate(q) @ rotate(k).T / sqrt(D)) @ v` within each segment and head: [N, H, D] in qkv's dtype.

    qkv:        [N, 3, H, D] float32 or bfloat16, D even, at most 128 and contiguous. Best with each head's rows
                together in memory.
    cos, sin:   [N, D / 2] float32; dimension i of q and k is rotated together with i + D / 2.
    cu_seqlens: [S + 1] int32, ascending from 0: segment i is rows cu_seqlens[i] to cu_seqlens[i + 1]. Rows past the
                last one give zeros.
    for_linear: whether a linear layer reads the answer next: see `linear_row_stride`.

    Of bfloat16, what is multiplied (rotated q and k, v, and probabilities) is rounded to it; all else is float32.
    Online softmax (arXiv 1805.02867) over blocks of keys, as in FlashAttention (arXiv 2205.14135). A row's bits depend
    on its own segment alone. Other tensors must be contiguous; else `RuntimeError`.
    """
    out: Tensor = torch.ops.rtp_mm.packed_attention.default(qkv, cos, sin, cu_seqlens, for_linear)
    return out


@torch.library.register_fake("rtp_mm::packed_attention")  # type: ignore[untyped-decorator]
def _(qkv: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor, for_linear: bool = False) -> Tensor:
    rows, _, heads, dim = qkv.shape
    return fake_rows(qkv, rows, heads * dim, qkv.dtype, for_linear).view(rows, heads, dim)
