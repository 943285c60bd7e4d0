"""The tower's pointwise passes on CUDA, in Triton: each reads its inputs once and writes its output once.

The only file that imports triton. `TRITON_INTERPRET=1` runs the kernels on the CPU. A row's bits depend on that row
alone: one program per row, or per piece of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x_ptr, delta_ptr, weight_ptr, out_ptr, dim, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * dim
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + row + columns, x, mask=inside)
    scale = 1 / tl.sqrt(tl.sum(x * x, axis=0) / dim + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row + columns, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _layer_norm(
    x_ptr, delta_ptr, weight_ptr, bias_ptr, out_ptr, dim, eps, HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * dim
    columns = tl.arange(0, BLOCK)
    inside = columns < dim
    x = tl.load(x_ptr + row + columns, mask=inside, other=0.0)
    if HAS_DELTA:
        x += tl.load(delta_ptr + row + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x_ptr + row + columns, x, mask=inside)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / dim, 0.0)
    scale = 1 / tl.sqrt(tl.sum(centred * centred, axis=0) / dim + eps)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0)
    tl.store(out_ptr + row + columns, (centred * scale * weight + bias).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_qk(qkv_ptr, cos_ptr, sin_ptr, heads, half, HEADS: tl.constexpr, HALF: tl.constexpr):
    # One program per row: the q and k heads are the first 2 * heads of its 3 * heads.
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    column = tl.arange(0, HALF)[None, :]
    inside = (head < 2 * heads) & (column < half)
    first = qkv_ptr + row * 6 * heads * half + head * 2 * half + column
    a = tl.load(first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(first + half, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row * half + column, mask=column < half, other=0.0)
    sin = tl.load(sin_ptr + row * half + column, mask=column < half, other=0.0)
    tl.store(first, (a * cos - b * sin).to(qkv_ptr.dtype.element_ty), mask=inside)
    tl.store(first + half, (b * cos + a * sin).to(qkv_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _silu_mul(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """x [N, dim] float32 += delta [N, dim], in place; returns its norm in `dtype`: RMSNorm without `bias`, else
    LayerNorm. Weights are float32. One pass for both.
    """
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=dtype, device=x.device)
    grid, block, has_delta = (rows,), triton.next_power_of_2(dim), delta is not None
    if bias is None:
        _rms_norm[grid](x, delta, weight, out, dim, eps, HAS_DELTA=has_delta, BLOCK=block)
    else:
        _layer_norm[grid](x, delta, weight, bias, out, dim, eps, HAS_DELTA=has_delta, BLOCK=block)
    return out


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of q and k inside the packed [N, 3, heads, head_dim], in place, computed in float32.

    cos, sin: [N, head_dim / 2] float32; dimension i is paired with i + head_dim / 2.
    """
    rows, _, heads, head_dim = qkv.shape
    half = head_dim // 2
    blocks = {"HEADS": triton.next_power_of_2(2 * heads), "HALF": triton.next_power_of_2(half)}
    _rotate_qk[(rows,)](qkv, cos, sin, heads, half, **blocks)
    return qkv


def silu_mul(gate_up: Tensor) -> Tensor:
    """[N, 2 * width], gates before ups -> silu(gate) * up, [N, width], computed in float32."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = 1024  # 2 KB of 16-bit values: enough loads in flight, and little waste at widths like 3420
    _silu_mul[(rows, triton.cdiv(width, block))](gate_up, out, width, BLOCK=block)
    return out
