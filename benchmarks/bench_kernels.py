"""The tower's CPU kernels against PyTorch's, at the shapes of Qwen2.5-VL, in GFLOP/s and parts of the machine's peak.

    python -m benchmarks.bench_kernels [--threads 1]

On one thread the clock is that thread's own, so that other work on the machine hardly counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional as F

from benchmarks.harness import interleave
from benchmarks.peak import fma_peak
from benchmarks.report import write_result
from rtp_mm import ops
from rtp_mm.vit.attention import Segments, sdpa
from rtp_mm.vit.rope import RotaryTable

Contenders = dict[str, Callable[[], object]]

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
SEGMENTS = {"windows": [64] * 27, "256": [256], "1768": [1768]}
HEADS, HEAD_DIM = 16, 80
PEERS = ("onednn, widened", "torch float32", "torch bf16")


def linear_contenders(rows: int, k: int, n: int, activation: str) -> tuple[Contenders, float]:
    """Ours, and what runs in a tower otherwise: the same bf16 weights widened at each call, widened for good, or
    bf16 throughout. And the floating-point operations."""
    x, weight, bias = torch.randn(rows, k), (torch.randn(n, k) * k**-0.5).bfloat16(), torch.randn(n)
    packed = ops.pack_linear(weight, 2 if activation == "silu_gate" else 1)
    wide, scratch, half_x, half_bias = weight.float(), torch.empty(n, k), x.bfloat16(), bias.bfloat16()
    act = partial(ops.activate, activation=activation)
    onednn = torch.ops.mkldnn._linear_pointwise
    return {
        "ours": lambda: ops.packed_linear(x, packed, bias, activation),
        "onednn, widened": lambda: act(onednn(x, scratch.copy_(weight), bias, "none", [], "")),
        "torch float32": lambda: act(F.linear(x, wide, bias)),
        "torch bf16": lambda: act(F.linear(half_x, weight, half_bias)),
    }, 2.0 * rows * k * n


def attention_contenders(lengths: list[int]) -> tuple[Contenders, float]:
    """From qkv as our GEMM leaves it, a head's rows together, rotary embedding included."""
    rows = sum(lengths)
    qkv, angles = torch.randn(3, HEADS, rows, HEAD_DIM).permute(2, 0, 1, 3), torch.randn(rows, HEAD_DIM // 2)
    cos, sin = angles.cos(), angles.sin()
    cu = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
    segments, rotary, half = Segments.from_lengths(cu, lengths), RotaryTable(cos, sin), qkv.bfloat16()
    return {
        "ours": lambda: ops.packed_attention(qkv, cos, sin, cu),
        "torch float32": lambda: sdpa(qkv, rotary, segments),
        "torch bf16": lambda: sdpa(half, rotary, segments),
    }, 4.0 * sum(length**2 for length in lengths) * HEADS * HEAD_DIM


def cases() -> dict[str, Callable[[], tuple[Contenders, float]]]:
    layers = {
        f"{name}, {rows} rows": partial(linear_contenders, rows, k, n, activation)
        for name, k, n, activation in LAYERS
        for rows in ROWS
    }
    return layers | {f"attention, {name}": partial(attention_contenders, s) for name, s in SEGMENTS.items()}


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.thread_time if options.threads == 1 else time.perf_counter
    peak, peak_operations = fma_peak()
    results: dict[str, Any] = {}
    table = Table("", "ours", "of peak", *PEERS, title="GFLOP/s")
    for name, make in cases().items():
        if options.only not in name:
            continue
        contenders, operations = make()
        timings = interleave({"peak": peak, **contenders}, options.rounds, clock)
        rates = {key: operations / timings[key].median * 1e-6 for key in contenders}
        rates["peak"] = peak_operations / timings["peak"].best * 1e-6
        results[name] = {"gflops": rates, "milliseconds": {key: asdict(timings[key]) for key in contenders}}
        others = (f"{rates[key]:.0f}" if key in rates else "" for key in PEERS)
        table.add_row(name, f"{rates['ours']:.0f}", f"{rates['ours'] / rates['peak']:.0%}", *others)
    Console().print(table)
    if not options.only:
        write_result(f"kernels_{options.threads}_threads", {"cases": results})


if __name__ == "__main__":
    main()
