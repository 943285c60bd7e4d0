"""RMSNorm on a CPU in one pass over memory; PyTorch's takes several."""

from __future__ import annotations

import torch
from torch import Tensor

import rtp_mm.ops.library  # noqa: F401  # the schema must be there before its fake


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype = torch.float32) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` by row (arXiv 1910.07467): [N, D] in `dtype`, float32 or bfloat16.

    x: [N, D] float32. weight: [D] float32. A row's bits depend on that row alone. Tensors must be contiguous; else
    `RuntimeError`.
    """
    out: Tensor = torch.ops.rtp_mm.rms_norm.default(x, weight, eps, dtype)
    return out


@torch.library.register_fake("rtp_mm::rms_norm")  # type: ignore[untyped-decorator]
def _(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=out_dtype)
