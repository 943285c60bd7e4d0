"""The tower's CPU kernels against PyTorch's, at the shapes of Qwen2.5-VL 3B.

Those that multiply in GFLOP/s and parts of the machine's peak of float32, those that move memory in GB/s and parts of a
copy's. On CPUs with AMX, or AMD's with AVX-512 BF16, our products of bf16 are measured too.

    python -m benchmarks.bench_kernels [--threads 1]

On one thread the clock is that thread's own, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from transformers import vision_utils
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding

from benchmarks.harness import interleave
from benchmarks.peak import product_peak
from benchmarks.report import write_result
from rtp_mm import ops
from rtp_mm._core import bf16_instructions
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.vit.attention import Segments, sdpa
from rtp_mm.vit.linear import Bf16Gemm
from rtp_mm.vit.patch_embed import PatchEmbed
from rtp_mm.vit.rope import RotaryAngles, RotaryTable

Contenders = dict[str, Callable[[], object]]
Cases = dict[str, Callable[[], tuple[Contenders, float]]]  # and a run's operations, or bytes

# name, K, N, activation
LAYERS = [
    ("qkv", 1280, 3840, "none"),
    ("proj", 1280, 1280, "none"),
    ("gate/up", 1280, 6840, "silu_gate"),
    ("down", 3420, 1280, "none"),
    ("merger 1", 5120, 5120, "gelu"),
    ("merger 2", 5120, 2048, "none"),
]
ROWS = (1768, 257, 64, 16, 1)
POINTWISE_ROWS = 1768
SEGMENTS = {"windows": [64] * 27, "256": [256], "1768": [1768]}
WIDTH, HEADS, HEAD_DIM, PATCH, MERGE, WINDOW = 1280, 16, 80, 14, 2, 4
# Images of about 64, 256 and 1768 patches.
GRIDS = {"64": (1, 8, 8), "256": (1, 16, 16), "1768": (1, 34, 52)}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {  # PyTorch's
    "none": lambda x: x,
    "gelu": F.gelu,
    "silu_gate": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}
DTYPES = {torch.float32: "float32", torch.bfloat16: "bf16"}
BF16, ONEDNN_BF16 = "ours bf16", "onednn bf16, packed"
PEERS = ("onednn, widened", "torch float32", "torch bf16", ONEDNN_BF16)


def linear_contenders(rows: int, k: int, n: int, activation: str) -> tuple[Contenders, float]:
    """Ours, and what runs in a tower otherwise: the same bf16 weights widened at each call, widened for good, or
    bf16 throughout, packed for oneDNN or not. And the floating-point operations."""
    x, weight, bias = torch.randn(rows, k), (torch.randn(n, k) * k**-0.5).bfloat16(), torch.randn(n)
    packed = ops.pack_linear(weight, 2 if activation == "silu_gate" else 1)
    wide, scratch, half_x, half_bias = weight.float(), torch.empty(n, k), x.bfloat16(), bias.bfloat16()
    act = ACTIVATIONS[activation]
    onednn = torch.ops.mkldnn._linear_pointwise
    padded_x, gemm = F.pad(half_x, (0, -k % ops.BF16_MULTIPLE)), Bf16Gemm(weight, bias, activation)  # as a tower does
    return {
        "ours": lambda: ops.packed_linear(x, packed, bias, activation),
        **in_bf16(lambda: gemm(padded_x)),
        "onednn, widened": lambda: act(onednn(x, scratch.copy_(weight), bias, "none", [], "")),
        "torch float32": lambda: act(F.linear(x, wide, bias)),
        "torch bf16": lambda: act(F.linear(half_x, weight, half_bias)),
        **onednn_in_bf16(half_x, weight, half_bias, act),
    }, 2.0 * rows * k * n


def onednn_in_bf16(x: Tensor, weight: Tensor, bias: Tensor, act: Callable[[Tensor], Tensor]) -> Contenders:
    if not bf16_instructions():
        return {}
    reordered = torch.ops.mkldnn._reorder_linear_weight(weight, max(ROWS))
    return {ONEDNN_BF16: lambda: act(torch.ops.mkldnn._linear_pointwise(x, reordered, bias, "none", [], ""))}


def in_bf16(run: Callable[[], object]) -> Contenders:
    """Ours by instructions that not every CPU has; without them speed does not matter."""
    return {BF16: run} if bf16_instructions() else {}


def attention_contenders(lengths: list[int]) -> tuple[Contenders, float]:
    """From qkv as our GEMM leaves it, a head's rows together, rotary embedding included."""
    rows = sum(lengths)
    qkv, angles = torch.randn(3, HEADS, rows, HEAD_DIM).permute(2, 0, 1, 3), torch.randn(rows, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    segments, rotary, half = Segments.from_lengths(cu, lengths), RotaryTable(cos, sin), qkv.bfloat16()
    return {
        "ours": lambda: ops.packed_attention(qkv, cos, sin, cu),
        **in_bf16(lambda: ops.packed_attention(half, cos, sin, cu)),
        "torch float32": lambda: sdpa(qkv, rotary, segments),
        "torch bf16": lambda: sdpa(half, rotary, segments),
    }, 4.0 * sum(length**2 for length in lengths) * HEADS * HEAD_DIM


def patch_embed_contenders(rows: int, frames: int, width: int) -> tuple[Contenders, float]:
    """From bytes, in window order; the peers get what Hugging Face's processor gives, normalised floats in which a
    still image stands twice, and count only what ours multiplies."""
    processor = PUBLISHED_PROCESSOR
    module = PatchEmbed(width, 3, 2, PATCH)
    published = module.proj.weight.data.normal_(std=1176**-0.5).flatten(1)
    module.fold(processor.image_mean, processor.image_std, torch.bfloat16)
    patches = torch.randint(0, 256, (rows, 3 * frames * PATCH**2), dtype=torch.uint8)
    groups = torch.randperm(rows // MERGE**2)
    order = groups.int()
    pixels, half_weight = torch.randn(rows, 1176), published.bfloat16()
    half_pixels = pixels.bfloat16()
    return {
        "ours": lambda: module([patches], order),
        "torch float32": lambda: in_windows(F.linear(pixels, published), groups),
        "torch bf16": lambda: in_windows(F.linear(half_pixels, half_weight), groups),
    }, 2.0 * patches.numel() * width


def in_windows(rows: Tensor, order: Tensor) -> Tensor:
    """[N, D], its groups of N / len(order) rows in `order`."""
    return rows.reshape(len(order), -1)[order].view(rows.shape)


def add_norm_contenders(has_bias: bool, has_delta: bool, dtype: torch.dtype) -> tuple[Contenders, float]:
    """Of a float32 stream, the norm in `dtype`, as the delta is: so small that it can be added again and again."""
    x, weight = torch.randn(POINTWISE_ROWS, WIDTH), torch.rand(WIDTH)
    bias = torch.rand(WIDTH) if has_bias else None
    delta = torch.full_like(x, 1e-20, dtype=dtype) if has_delta else None

    def plain() -> Tensor:
        if delta is not None:
            x.add_(delta)
        if bias is None:
            return F.rms_norm(x, [WIDTH], weight, 1e-6).to(dtype)
        return F.layer_norm(x, [WIDTH], weight, bias, 1e-6).to(dtype)

    return {
        "ours": lambda: ops.add_norm(x, delta, weight, bias, 1e-6, dtype),
        f"torch {DTYPES[dtype]}": plain,
    }, float(x.numel() * (4 + dtype.itemsize) * (1 if delta is None else 2))


def rotary_contenders(dtype: torch.dtype) -> tuple[Contenders, float]:
    qkv, angles = torch.randn(POINTWISE_ROWS, 3, HEADS, HEAD_DIM).to(dtype), torch.randn(POINTWISE_ROWS, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()

    def plain() -> None:
        x, y = qkv[:, :2].float().chunk(2, dim=-1)
        c, s = cos[:, None, None], sin[:, None, None]
        qkv[:, :2] = torch.cat((x * c - y * s, y * c + x * s), dim=-1)

    return {
        "ours": lambda: ops.rotate_qk_(qkv, cos, sin),
        f"torch {DTYPES[dtype]}": plain,
    }, float(2 * qkv[:, :2].nbytes + cos.nbytes + sin.nbytes)


def activation_contenders(activation: str, width: int, dtype: torch.dtype) -> tuple[Contenders, float]:
    """Of large numbers, which a GELU in place leaves as they are, however often it comes."""
    x = (torch.rand(POINTWISE_ROWS, width) + 10).to(dtype)
    plain = ACTIVATIONS[activation]
    return {
        "ours": lambda: ops.activate(x, activation),
        f"torch {DTYPES[dtype]}": lambda: plain(x),
    }, float(x.nbytes + plain(x).nbytes)


def positions_contenders(grid: tuple[int, int, int]) -> tuple[Contenders, float]:
    """Everything about positions that a forward needs; the peer makes it by transformers' functions."""
    angles = RotaryAngles(HEAD_DIM, torch.device("cpu")).up_to(max(grid))
    rotary = Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig(embed_dim=WIDTH, num_heads=HEADS))
    grid_thw = torch.tensor([grid])

    def transformers() -> object:
        ids = vision_utils.get_vision_position_ids(grid_thw, MERGE)
        order, cu_windows = vision_utils.get_vision_window_index(grid_thw, MERGE, WINDOW * MERGE * PATCH, PATCH)
        tables = [in_windows(table, order) for table in rotary(grid_thw, ids)]
        return tables, cu_windows, vision_utils.get_vision_cu_seqlens(grid_thw), order.argsort()

    tensors = [v for v in astuple(ops.vision_positions([grid], MERGE, WINDOW, angles)) if isinstance(v, Tensor)]
    return {
        "ours": lambda: ops.vision_positions([grid], MERGE, WINDOW, angles),
        "transformers": transformers,
    }, float(sum(tensor.nbytes for tensor in tensors))


def multiplying() -> Cases:
    layers: Cases = {
        f"{name}, {rows} rows": partial(linear_contenders, rows, k, n, activation)
        for name, k, n, activation in LAYERS
        for rows in ROWS
    }
    patches: Cases = {
        f"patch_embed, {kind}, {rows} rows": partial(patch_embed_contenders, rows, frames, WIDTH)
        for kind, frames in (("still", 1), ("clip", 2))
        for rows in (1768, 64)
    }
    thin: Cases = {
        f"patch_embed, still, 3996 rows, {width} wide": partial(patch_embed_contenders, 3996, 1, width)
        for width in (64, 16)
    }
    attention: Cases = {f"attention, {name}": partial(attention_contenders, s) for name, s in SEGMENTS.items()}
    return patches | thin | layers | attention


def moving() -> Cases:
    pointwise: Cases = {}
    for dtype, name in DTYPES.items():
        for has_delta, add in ((False, ""), (True, "add, ")):
            for has_bias, norm in ((False, "rms_norm"), (True, "layer_norm")):
                pointwise[f"{add}{norm}, {name}"] = partial(add_norm_contenders, has_bias, has_delta, dtype)
        pointwise[f"rotary, {name}"] = partial(rotary_contenders, dtype)
        for activation, width in (("silu_gate", 6840), ("gelu", 5120)):
            pointwise[f"{activation}, {name}"] = partial(activation_contenders, activation, width, dtype)
    positions: Cases = {f"vision_positions, {name}": partial(positions_contenders, g) for name, g in GRIDS.items()}
    return pointwise | positions


def copy_peak() -> tuple[Callable[[], object], float]:
    """A contender for `interleave`, and the bytes that one run of it reads and writes: far more than a cache holds."""
    source = torch.ones(64 << 20, dtype=torch.uint8)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * source.nbytes


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    selected = [{k: v for k, v in cases.items() if options.only in k} for cases in (multiplying(), moving())]
    instructions = bf16_instructions()
    results = {
        "gflops": measure(selected[0], "GFLOP/s", (BF16, *PEERS), product_peak(""), options.rounds, clock),
        **({"bf16_peak_gflops": peak_gflops(instructions)} if instructions else {}),
        "gigabytes": measure(selected[1], "GB/s", (*PEERS[1:], "transformers"), copy_peak(), options.rounds, clock),
    }
    if not options.only:
        write_result(f"kernels_{options.threads}_threads" + f"_{instructions}" * bool(instructions), results)


def peak_gflops(instructions: str) -> float:
    peak, work = product_peak(instructions)
    return work / interleave({"peak": peak}, rounds=9)["peak"].best * 1e-6


def measure(
    cases: Cases,
    unit: str,
    peers: Sequence[str],
    roof: tuple[Callable[[], object], float],
    rounds: int,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Rates of every case in 1e9 of its unit a second, and its milliseconds; shown as a table."""
    peak, peak_work = roof
    results: dict[str, Any] = {}
    table = Table("", "ours", "of peak", *peers, title=unit)
    for name, make in track(cases.items(), unit):
        contenders, work = make()
        timings = interleave({"peak": peak, **contenders}, rounds, clock)
        rates = {key: work / timings[key].median * 1e-6 for key in contenders}
        rates["peak"] = peak_work / timings["peak"].best * 1e-6
        results[name] = {"rates": rates, "milliseconds": {key: asdict(timings[key]) for key in contenders}}
        others = (f"{rates[key]:.3g}" if key in rates else "" for key in peers)
        table.add_row(name, f"{rates['ours']:.3g}", f"{rates['ours'] / rates['peak']:.0%}", *others)
    Console().print(table)
    return results


if __name__ == "__main__":
    main()
