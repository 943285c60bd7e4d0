"""The tower's pointwise passes on CUDA, in Triton: each reads its inputs once and writes its output once.

`rtp_mm.ops.pointwise` says what they compute. `TRITON_INTERPRET=1` runs them on the CPU. A row's bits depend on that
row alone: one program per row, or per piece of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # 2 KB of 16-bit values: enough loads in flight, and little waste at widths like 3420


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
def _rotate_qk(
    qkv_ptr, cos_ptr, sin_ptr, heads: tl.constexpr, half: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):
    # One program per row: the q and k heads are the first 2 * heads of its 3 * heads. Compiled for their number and
    # half of their size, 40 say: known to be a multiple of 8, it lets 16 bytes be moved at a time.
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
def _silu_gate(gate_up_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    gate = tl.load(gate_up_ptr + row * 2 * width + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * width + width + columns, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * width + columns, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """float32, but for "silu_gate"; also the epilogue of linear layers."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    return x


@triton.jit
def _activate_(x_ptr, count, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + places, mask=places < count, other=0.0).to(tl.float32)
    tl.store(x_ptr + places, activated(x, ACTIVATION).to(x_ptr.dtype.element_ty), mask=places < count)


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """`ops.add_norm`."""
    rows, dim = x.shape
    out = torch.empty(rows, dim, dtype=dtype, device=x.device)
    grid, block, has_delta = (rows,), triton.next_power_of_2(dim), delta is not None
    if bias is None:
        _rms_norm[grid](x, delta, weight, out, dim, eps, HAS_DELTA=has_delta, BLOCK=block)
    else:
        _layer_norm[grid](x, delta, weight, bias, out, dim, eps, HAS_DELTA=has_delta, BLOCK=block)
    return out


def rotate_qk_(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`ops.rotate_qk_`."""
    rows, _, heads, head_dim = qkv.shape
    half = head_dim // 2
    blocks = {"HEADS": triton.next_power_of_2(2 * heads), "HALF": triton.next_power_of_2(half)}
    _rotate_qk[(rows,)](qkv, cos, sin, heads, half, **blocks)
    return qkv


def activate(x: Tensor, activation: str) -> Tensor:
    """`ops.activate`, but for "none"."""
    rows, columns = x.shape
    if activation == "silu_gate":
        width = columns // 2
        out = x.new_empty(rows, width)
        _silu_gate[(rows, triton.cdiv(width, BLOCK))](x, out, width, BLOCK=BLOCK)
        return out
    _activate_[(triton.cdiv(x.numel(), BLOCK),)](x, x.numel(), ACTIVATION=activation, BLOCK=BLOCK)
    return x
