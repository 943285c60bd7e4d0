"""Linear layers on CUDA, in Triton: one algorithm for every number of rows, so that a row's bits do not depend on it.

Tiles walk the whole depth (no split-K), their shape is fixed by the layer and the GPU's generation, and the number of
rows is no part of what is compiled. Bias, activation and residual are fused: products stay float32 until the one
rounding at the end, but for those of e4m3 on Hopper, whose tensor cores keep fewer bits of a sum. `TRITON_INTERPRET=1`
runs the kernels on the CPU.
"""

from __future__ import annotations

import os
from functools import cache, partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from rtp_mm.ops.pointwise_triton import activated

ALIGNMENT = 16  # elements; what 16-byte loads, tensor memory access and Triton's own analysis want of a row's length
WIDE = 2048  # columns from which there are enough tiles for a large one
LARGEST_E4M3 = 448.0
GROUP = 8  # rows of tiles that share what they read in L2
INTERPRETED_PROGRAMS = 3  # so that some take several tiles, and not all equally many


class Tile(NamedTuple):
    """What one program makes at a time: [m, n] of the output in steps of k; of a gated layer, n of gate and n of up."""

    m: int
    n: int
    k: int
    stages: int
    warps: int
    programs: int = 1  # on a multiprocessor


class Tiles(NamedTuple):
    """The tiles of one generation of GPUs: `wide` where nothing is fused but the bias, `e4m3` for all of that type."""

    narrow: Tile
    wide: Tile
    gated: Tile
    e4m3: Tile
    has_tma: bool  # operands are fetched by the tensor memory access unit


# By compute capability; a GPU takes the last entry that it reaches. A program has 163 KB of shared memory on 8.0, 99 KB
# on 8.6, 8.9 and 12.0, 227 KB on 9.0 and 10.0. The largest tiles whose registers do not spill.
SMALL_MEMORY = Tiles(
    narrow=Tile(128, 128, 32, 4, 8),
    wide=Tile(128, 128, 32, 4, 8),
    gated=Tile(128, 64, 32, 4, 8),
    e4m3=Tile(128, 64, 64, 3, 8),
    has_tma=False,
)
HOPPER = Tiles(
    narrow=Tile(128, 128, 64, 4, 8),
    wide=Tile(128, 256, 64, 3, 8),
    gated=Tile(128, 128, 64, 3, 8),
    e4m3=Tile(128, 64, 128, 4, 8),
    has_tma=True,
)
TILES: dict[tuple[int, int], Tiles] = {
    (8, 0): HOPPER._replace(narrow=Tile(128, 128, 64, 3, 8), gated=Tile(128, 64, 32, 4, 8), has_tma=False),
    (8, 6): SMALL_MEMORY,
    (9, 0): HOPPER,
    (10, 0): HOPPER._replace(gated=Tile(128, 64, 64, 3, 8)),
    (12, 0): SMALL_MEMORY,
}
FLOAT32 = Tile(64, 64, 32, 3, 8, programs=2)  # no tensor cores: they would round to 10 bits


@triton.jit
def _load(matrix, first, k, rows, depth, ROWS: tl.constexpr, DEPTH: tl.constexpr, HAS_TMA: tl.constexpr):
    """[ROWS, DEPTH] of a row-major [rows, depth], zeros past its ends; `matrix` is its descriptor or its pointer."""
    if HAS_TMA:
        tile = matrix.load([first, k])
    else:
        row = first + tl.arange(0, ROWS)
        column = k + tl.arange(0, DEPTH)
        inside = (row < rows)[:, None] & (column < depth)[None, :]
        tile = tl.load(matrix + row.to(tl.int64)[:, None] * depth + column[None, :], mask=inside, other=0.0)
    return tile


# The number of rows is no part of what is compiled: were 1, or multiples of 16, compiled apart, bits could differ.
@triton.jit(do_not_specialize=["rows"])
def _linear(
    x_ptr, weight_ptr, bias_ptr, x_scale_ptr, weight_scale_ptr, out_ptr,
    rows, width, depth,
    ACTIVATION: tl.constexpr, ADDS: tl.constexpr, IS_SCALED: tl.constexpr, HAS_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out [rows, width] = activation(x [rows, depth] @ weight.T + bias), or += with ADDS.

    The weight is [width, depth], or [2 * width, depth], gates above ups. Programs stay and take tile after tile.
    """
    IS_GATED: tl.constexpr = ACTIVATION == "silu_gate"
    weight_rows = 2 * width if IS_GATED else width
    if HAS_TMA:
        x = tl.make_tensor_descriptor(x_ptr, [rows, depth], [depth, 1], [BLOCK_M, BLOCK_K])
        weight = tl.make_tensor_descriptor(weight_ptr, [weight_rows, depth], [depth, 1], [BLOCK_N, BLOCK_K])
    else:
        x = x_ptr
        weight = weight_ptr
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(width, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=True):
        # GROUP rows of tiles at a time, column by column: what runs together shares its operands in L2.
        first_m = tile // (GROUP * tiles_n) * GROUP
        group = min(tiles_m - first_m, GROUP)
        within = tile % (GROUP * tiles_n)
        m = (first_m + within % group) * BLOCK_M
        n = within // group * BLOCK_N

        out = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        up = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, depth, BLOCK_K):
            a = _load(x, m, k, rows, depth, BLOCK_M, BLOCK_K, HAS_TMA)
            b = _load(weight, n, k, weight_rows, depth, BLOCK_N, BLOCK_K, HAS_TMA)
            out = tl.dot(a, b.T, out, input_precision="ieee")
            if IS_GATED:
                c = _load(weight, width + n, k, weight_rows, depth, BLOCK_N, BLOCK_K, HAS_TMA)
                up = tl.dot(a, c.T, up, input_precision="ieee")

        row = m + tl.arange(0, BLOCK_M)
        column = n + tl.arange(0, BLOCK_N)
        is_row, is_column = row < rows, column < width
        if IS_SCALED:
            x_scale = tl.load(x_scale_ptr + row, mask=is_row, other=0.0)[:, None]
            out *= x_scale * tl.load(weight_scale_ptr + column, mask=is_column, other=0.0)[None, :]
            if IS_GATED:
                up *= x_scale * tl.load(weight_scale_ptr + width + column, mask=is_column, other=0.0)[None, :]
        out += tl.load(bias_ptr + column, mask=is_column, other=0.0)[None, :]
        if IS_GATED:
            up += tl.load(bias_ptr + width + column, mask=is_column, other=0.0)[None, :]
            out = out * tl.sigmoid(out) * up
        else:
            out = activated(out, ACTIVATION)
        target = out_ptr + row.to(tl.int64)[:, None] * width + column[None, :]
        inside = is_row[:, None] & is_column[None, :]
        if ADDS:
            out += tl.load(target, mask=inside, other=0.0)
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=inside)


def _scratch(device: torch.device, size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device=device)


@cache
def _device(device: torch.device) -> tuple[tuple[int, int], int]:
    """Compute capability, and how many multiprocessors there are."""
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def choose_tile(
    capability: tuple[int, int], dtype: torch.dtype, width: int, activation: str, adds: bool
) -> tuple[Tile, bool]:
    """The tile, and whether it is fetched by TMA, of a layer with `width` columns. The number of rows has no say."""
    if dtype == torch.float32:
        return FLOAT32, False
    tiles = TILES[max(known for known in TILES if known <= capability)]
    if dtype == torch.float8_e4m3fn:
        return tiles.e4m3, tiles.has_tma
    if activation == "silu_gate":
        return tiles.gated, tiles.has_tma
    return tiles.wide if width >= WIDE and activation == "none" and not adds else tiles.narrow, tiles.has_tma


def pack_linear(weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """`ops.pack_fixed_linear`."""
    weight = F.pad(weight, (0, -weight.shape[1] % ALIGNMENT))
    if activation == "none":
        return weight.contiguous(), bias
    parts = 2 if activation == "silu_gate" else 1
    rows = -(weight.shape[0] // parts) % ALIGNMENT
    weight = F.pad(weight.unflatten(0, (parts, -1)), (0, 0, 0, rows)).flatten(0, 1)
    return weight, F.pad(bias.unflatten(0, (parts, -1)), (0, rows)).flatten()


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    *,
    out: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """`ops.fixed_linear`, or with `out` [M, N] float32 `ops.fixed_linear_add_`."""
    rows, depth = x.shape[0], weight.shape[1]
    torch._check(x.is_contiguous(), lambda: f"fixed_linear: x must be contiguous, got strides {x.stride()}")
    if x.shape[1] != depth:
        x = F.pad(x, (0, depth - x.shape[1]))
    width = weight.shape[0] // (2 if activation == "silu_gate" else 1)
    adds = out is not None
    if out is None:
        out = torch.empty(rows, width, dtype=dtype or x.dtype, device=x.device)
    x_scale, weight_scale = scales or (None, None)
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    capability, multiprocessors = ((8, 0), INTERPRETED_PROGRAMS) if is_interpreted else _device(x.device)
    tile, has_tma = choose_tile(capability, x.dtype, width, activation, adds)
    if has_tma:  # its descriptors are made on the device, in memory that Triton asks for at the launch
        triton.set_allocator(partial(_scratch, x.device))
    tiles = triton.cdiv(rows, tile.m) * triton.cdiv(width, tile.n)
    _linear[(min(tile.programs * multiprocessors, tiles),)](
        *(x, weight, bias, x_scale, weight_scale, out, rows, width, depth),
        ACTIVATION=activation, ADDS=adds, IS_SCALED=scales is not None, HAS_TMA=has_tma,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


@triton.jit
def _quantize_rows(x_ptr, out_ptr, scale_ptr, depth, width, LARGEST: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * depth + columns, mask=columns < depth, other=0.0).to(tl.float32)
    scale = tl.max(tl.abs(x), axis=0) / LARGEST
    scale = tl.where(scale == 0, 1.0, scale)  # a row of zeros
    tl.store(scale_ptr + row, scale)
    tl.store(out_ptr + row * width + columns, (x / scale).to(out_ptr.dtype.element_ty), mask=columns < width)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.quantize_rows`."""
    torch._check(x.is_contiguous(), lambda: f"quantize_rows: x must be contiguous, got strides {x.stride()}")
    rows, depth = x.shape
    width = triton.cdiv(depth, ALIGNMENT) * ALIGNMENT
    out = torch.empty(rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(width)
    _quantize_rows[(rows,)](x, out, scale, depth, width, LARGEST=LARGEST_E4M3, BLOCK=block)
    return out, scale
