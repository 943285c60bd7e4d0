"""Linear layers on a CPU: weights packed once; bias, activation and residual fused into products summed in float32."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import rtp_mm.ops.library  # noqa: F401  # the schema must be there before its fake
from rtp_mm import _core

CHUNK = 128  # rows that are rounded at a time: their temporaries stay in cache, 4 s less at the 3B tower's start
PANEL, UNIT = 64, 16  # columns of a panel at most, and what they are a multiple of; as in csrc/cpu
INT8_MULTIPLE, BF16_MULTIPLE = 64, 32  # of K, with zeros: what a row of AMX's tiles holds


class PackedWeight(NamedTuple):
    """A weight [N, K] as `packed_linear` reads it.

    panels: [panels, K, columns of a panel] in the weight's dtype; or, with zeros up to a K that is a multiple of 64,
            [panels, K / 4, columns] int32, each the int8 of four steps of k; or, of 32, [panels, K / 2, 2 * columns]
            bfloat16, two steps of k beside each other.
    k:      K, without these zeros.
    scales: [N] float32 and
    sums:   [N] int32, of int8 only: the weight is `scales * int8`, and row n of the int8 adds up to `sums[n]`.
    """

    panels: Tensor
    k: int
    scales: Tensor | None = None
    sums: Tensor | None = None


def pack_linear(weight: Tensor, parts: int = 1) -> PackedWeight:
    """[N, K] float32, bfloat16 or float16 -> its panels in the same dtype, for `packed_linear`.

    `parts` = 2 for a gated layer: the weight is gate above up, and every panel gets half of either.
    """
    return PackedWeight(torch.ops.rtp_mm.pack_linear.default(weight, parts), weight.shape[1])


def pack_int8_linear(weight: Tensor, parts: int = 1) -> PackedWeight:
    """As `pack_linear`, each row rounded to int8 by a scale of its own: its largest magnitude becomes 127.

    `packed_linear` then does the same with each row of x as it comes, and multiplies and adds in integers, exactly.
    """
    rows, k = weight.shape
    scales = weight.new_empty(rows, dtype=torch.float32)
    rounded = weight.new_zeros(rows, k + -k % INT8_MULTIPLE, dtype=torch.int8)
    for part in range(0, rows, CHUNK):
        chosen = slice(part, part + CHUNK)
        wide = weight[chosen].float()
        scales[chosen] = wide.abs().amax(1).clamp(min=1e-30) / 127
        rounded[chosen, :k] = (wide / scales[chosen, None]).round_()
    panels = torch.ops.rtp_mm.pack_linear.default(rounded.view(torch.int32), parts)
    return PackedWeight(panels, k, scales, rounded.sum(1, dtype=torch.int32))


def pack_bf16_linear(weight: Tensor, parts: int = 1) -> PackedWeight:
    """As `pack_linear`, of bfloat16 and for an x of bfloat16: two steps of k are multiplied at once.

    By AMX where the CPU has it, in an order of its own, or by AVX-512 BF16. Elsewhere sums have the bits of the latter,
    but for subnormal numbers, and it is slower than float32. AMX reads the rows of x without a copy where x has a
    multiple of `BF16_MULTIPLE` columns, K or zeros behind it, in rows as far apart as `linear_row_stride` says.
    """
    k = weight.shape[1]
    words = F.pad(weight, (0, -k % BF16_MULTIPLE)).view(torch.int32)
    return PackedWeight(torch.ops.rtp_mm.pack_linear.default(words, parts).view(torch.bfloat16), k)


def packed_linear(
    x: Tensor, packed: PackedWeight, bias: Tensor, activation: str = "none", *, for_linear: bool = False
) -> Tensor:
    """`activation(x @ weight.T + bias)`: [M, N] in x's dtype. `packed_linear_blocks` with one block."""
    return packed_linear_blocks(x, packed, bias, 1, activation, for_linear=for_linear)[0]


def packed_linear_blocks(
    x: Tensor, packed: PackedWeight, bias: Tensor, blocks: int, activation: str = "none", *, for_linear: bool = False
) -> Tensor:
    """`activation(x @ weight.T + bias)`, its columns in blocks of equal width: [blocks, M, N / blocks] in x's dtype.

    x:          [M, K] float32, or bfloat16; of the latter also [M, K up to a multiple of `BF16_MULTIPLE`], with zeros.
    packed:     of float32, what `pack_linear` made of the weight: its elements are widened exactly as they are used; or
                `pack_int8_linear`. Of bfloat16, `pack_bf16_linear`.
    bias:       [N] float32.
    activation: "none", "gelu" (with erf), "quick_gelu", or "silu_gate": `silu(gate) * up`, [M, N / 2], with a weight
                packed in two parts.
    blocks:     how many the columns are cut into; heads, say, that are then read one by one.
    for_linear: whether a layer of `pack_bf16_linear` reads the answer next: see `linear_row_stride`.

    A row's bits do not depend on its neighbours, its place or M. Tensors must be contiguous, but for an x of bfloat16,
    of which each row must be; else `RuntimeError`.
    """
    out: Tensor = torch.ops.rtp_mm.packed_linear.default(x, *packed, bias, activation, blocks, for_linear)
    return out


def linear_row_stride(columns: int, dtype: torch.dtype, *, for_linear: bool) -> int:
    """How many elements apart rows are that an operator makes, `for_linear` or not.

    Rows of bfloat16 lie apart by an odd number of cache lines then, where the CPU has AMX: its tiles load them from
    where they are, and rows of an even number would meet in few of the first cache's sets.
    """
    if not (for_linear and dtype == torch.bfloat16 and _core.bf16_instructions() == "amx"):
        return columns
    lines = -(-columns // BF16_MULTIPLE)
    return (lines + 1 - lines % 2) * BF16_MULTIPLE


def packed_linear_add_(out: Tensor, x: Tensor, packed: PackedWeight, bias: Tensor) -> Tensor:
    """`out += x @ weight.T + bias` in place, with `out` [M, N] float32; the rest as for `packed_linear`."""
    torch.ops.rtp_mm.packed_linear_add_.default(out, x, *packed, bias)
    return out


@torch.library.register_fake("rtp_mm::pack_linear")  # type: ignore[untyped-decorator]
def _(weight: Tensor, parts: int) -> Tensor:
    rows, k = weight.shape
    panels = -(-rows // PANEL)
    columns = -(-(rows // parts) // max(panels * UNIT, 1)) * UNIT
    return weight.new_empty(panels, k, parts * columns)


@torch.library.register_fake("rtp_mm::packed_linear")  # type: ignore[untyped-decorator]
def _(
    x: Tensor,
    packed: Tensor,
    k: int,
    scales: Tensor | None,
    sums: Tensor | None,
    bias: Tensor,
    activation: str,
    blocks: int,
    for_linear: bool = False,
) -> Tensor:
    _check_columns(x, k)
    width = bias.shape[0] // (2 if activation == "silu_gate" else 1) // blocks
    return fake_rows(x, blocks * x.shape[0], width, x.dtype, for_linear).view(blocks, x.shape[0], width)


@torch.library.register_fake("rtp_mm::packed_linear_add_")  # type: ignore[untyped-decorator]
def _(out: Tensor, x: Tensor, packed: Tensor, k: int, scales: Tensor | None, sums: Tensor | None, bias: Tensor) -> None:
    _check_columns(x, k)


def fake_rows(x: Tensor, rows: int, columns: int, dtype: torch.dtype, for_linear: bool) -> Tensor:
    """As an operator makes them: [`rows`, `columns`] on x's device."""
    stride = linear_row_stride(columns, dtype, for_linear=for_linear)
    return x.new_empty(rows, stride, dtype=dtype)[:, :columns]


def _check_columns(x: Tensor, k: int) -> None:
    """As the kernel's door does."""
    is_pairs = x.dtype == torch.bfloat16
    zeros = f", with or without zeros up to a multiple of {BF16_MULTIPLE}" if is_pairs else ""
    torch._check(
        x.shape[1] in (k, k + -k % BF16_MULTIPLE if is_pairs else k),
        lambda: f"packed_linear: x must be [M, K] with K = {k}{zeros}, got {list(x.shape)} {x.dtype}",
    )
