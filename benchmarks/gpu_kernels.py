"""Steps of `gpu_session` that measure kernels one by one, against what the device can do at best."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from benchmarks.gpu_common import (
    Figures,
    Options,
    Unavailable,
    attempt,
    dtype_of,
    failure,
    is_gpu,
    kernel_seconds,
)

# name, K, N, activation; of Qwen2.5-VL
LAYERS = (
    ("qkv", 1280, 3840, "none"),
    ("proj", 1280, 1280, "add"),
    ("gate/up", 1280, 6840, "silu_gate"),
    ("down", 3420, 1280, "add"),
    ("merger 1", 5120, 5120, "gelu"),
)
ROWS = (256, 1024, 4096, 16384)


def peaks(options: Options) -> Figures:
    """What this device does at best: a large copy, and a large bf16 matrix product on random data."""
    import torch

    size, side = (1 << 30, 8192) if is_gpu(options) else (1 << 20, 64)
    block = torch.randint(0, 256, (size,), dtype=torch.uint8, device=options.device)
    target = torch.empty_like(block)
    copy = kernel_seconds(lambda: target.copy_(block), options)
    yield "copy_gb_s", 2 * block.nbytes / copy / 1e9
    a, b = (torch.randn(side, side, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    yield "bf16_tflop_s", 2 * side**3 / kernel_seconds(lambda: a @ b, options) / 1e12


def attention(options: Options) -> Figures:
    """Every backend that can run here: milliseconds of the trial that MM_ATTENTION=fastest makes."""
    import torch

    from rtp_mm.vit import attention as backends
    from rtp_mm.vit.attention import VARLEN_ATTENTION, is_usable, time_attention

    if not is_gpu(options):  # Triton's interpreter turns a row in a millisecond
        backends.TRIAL_FRAMES, backends.TRIAL_FRAME, backends.TRIAL_WINDOW, backends.TRIAL_ROUNDS = 1, 16, 4, 1
    device, dtype = torch.device(options.device), dtype_of(options)

    def milliseconds(name: str) -> float:
        return 1e3 * time_attention({name: VARLEN_ATTENTION[name]}, dtype, device, time.perf_counter)[name]

    for name in VARLEN_ATTENTION:
        if is_usable(name, dtype, device):
            yield f"{name}_ms", attempt(partial(milliseconds, name))


def pointwise(options: Options) -> Figures:
    """The pointwise kernels at 65536 rows of Qwen2.5-VL: microseconds and GB/s moved."""
    import torch

    from rtp_mm import ops

    rows, dim, heads, hidden = (65536, 1280, 16, 3424) if is_gpu(options) else (8, 64, 4, 176)
    dtype, width = dtype_of(options), dtype_of(options).itemsize
    with torch.device(options.device):
        x, delta, weight, bias = torch.randn(rows, dim), torch.randn(rows, dim, dtype=dtype), *torch.randn(2, dim)
        qkv, angle = torch.randn(rows, 3, heads, dim // heads, dtype=dtype), torch.randn(rows, dim // heads // 2)
        gate_up = torch.randn(rows, 2 * hidden, dtype=dtype)
        cos, sin = angle.cos(), angle.sin()
    element = rows * dim
    cases: dict[str, tuple[Callable[[], object], float]] = {
        "rms_norm": (lambda: ops.add_norm(x, None, weight, None, 1e-6, dtype), element * (4 + width)),
        "add, rms_norm": (lambda: ops.add_norm(x, delta, weight, None, 1e-6, dtype), element * (8 + 2 * width)),
        "layer_norm": (lambda: ops.add_norm(x, None, weight, bias, 1e-6, dtype), element * (4 + width)),
        "rotate": (lambda: ops.rotate_qk_(qkv, cos, sin), element * 4 * width + rows * dim // heads * 4),
        "silu_gate": (lambda: ops.activate(gate_up, "silu_gate"), rows * hidden * 3 * width),
        "gelu": (lambda: ops.activate(gate_up, "gelu"), rows * hidden * 4 * width),
    }

    def figures(call: Callable[[], object], moved: float) -> dict[str, float]:
        seconds = kernel_seconds(call, options)
        return {"us": 1e6 * seconds, "gb_s": moved / seconds / 1e9}

    for name, case in cases.items():
        yield name, attempt(partial(figures, *case))


def linears(options: Options) -> Figures:
    """Our linear layers against cuBLAS with the same epilogue behind it: microseconds, and TFLOP/s of either."""
    for name, k, n, activation in layers(options):
        for rows in ROWS if is_gpu(options) else (70,):
            yield f"{name}, {rows} rows", attempt(partial(linear_figures, rows, k, n, activation, options))


def linear_figures(rows: int, k: int, n: int, activation: str, options: Options) -> dict[str, Any]:
    def figures(call: Callable[[], Any]) -> dict[str, float]:
        seconds = kernel_seconds(call, options)
        return {"us": 1e6 * seconds, "tflop_s": 2.0 * rows * k * n / seconds / 1e12}

    contenders = linear_contenders(rows, k, n, activation, options)
    return {side: attempt(partial(figures, call)) for side, call in contenders.items()}


def tiles(options: Options) -> Figures:
    """Other tiles for each layer: microseconds, and whether a row has the bits that it has in the layer's own tile."""
    for name, k, n, activation in layers(options):
        for rows in (256, 16384) if is_gpu(options) else (70,):
            yield f"{name}, {rows} rows", attempt(partial(tile_figures, rows, k, n, activation, options))


def tile_figures(rows: int, k: int, n: int, activation: str, options: Options) -> dict[str, Any]:
    """A layer's; that a tile is too large for this GPU is a finding, no failure."""
    import torch
    from triton.runtime.errors import OutOfResources

    from rtp_mm.ops import linear_triton
    from rtp_mm.ops.linear_triton import Tile

    candidates = [
        Tile(m, n, 64, stages, warps)
        for m, n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8), (64, 256, 8))
        for stages in (3, 4)
    ]
    chosen = linear_triton.choose_tile
    figures: dict[str, Any] = {}
    torch.manual_seed(0)
    expected = linear_contenders(rows, k, n, activation, options)["ours"]().clone()
    for tma in (True, False) if is_gpu(options) else (False,):
        for tile in candidates if is_gpu(options) else candidates[:1]:
            label = f"{tile.m}x{tile.n}, {tile.stages} stages{', TMA' if tma else ''}"
            linear_triton.choose_tile = lambda *_, tile=tile, tma=tma: (tile, tma)  # type: ignore[assignment]
            try:
                torch.manual_seed(0)
                call = linear_contenders(rows, k, n, activation, options)["ours"]
                same = torch.equal(call(), expected)
                figures[label] = {"us": 1e6 * kernel_seconds(call, options), "same_bits": same}
            except OutOfResources as error:
                figures[label] = str(error)
            except Exception as error:  # noqa: BLE001 - is the figure
                figures[label] = failure(error)
            finally:
                linear_triton.choose_tile = chosen
    return figures


def layers(options: Options) -> Sequence[tuple[str, int, int, str]]:
    from rtp_mm import ops

    if is_gpu(options):
        return LAYERS
    import torch

    if not ops.uses_triton(torch.device("cpu")):
        raise Unavailable("needs TRITON_INTERPRET=1 on a CPU")
    return [(name, 64, 96, activation) for name, _, _, activation in LAYERS]


def linear_contenders(rows: int, k: int, n: int, activation: str, options: Options) -> dict[str, Callable[[], Any]]:
    """Calls of a layer by ours and by cuBLAS; "add": to a float32 residual, which cuBLAS leaves to the next norm."""
    import torch

    from rtp_mm.vit.linear import CublasGemm, FixedGemm

    with torch.device(options.device):
        x = torch.randn(rows, k).to(dtype_of(options))
        weight, bias = (torch.randn(n, k) * k**-0.5).to(dtype_of(options)), torch.randn(n)
        residual = torch.zeros(rows, n)
    if activation == "add":
        fixed, library = FixedGemm(weight, bias, "none"), CublasGemm(weight, bias, "none")
        x = torch.nn.functional.pad(x, (0, -k % 16))
        library_x = x[:, :k].contiguous()
        return {
            "ours": lambda: (fixed.add_to(residual, x), residual)[1],
            "cublas": lambda: library.add_to(residual, library_x),
        }
    fixed, library = FixedGemm(weight, bias, activation), CublasGemm(weight, bias, activation)
    return {"ours": lambda: fixed(x), "cublas": lambda: library(x)}
