"""The machine's roofs for products: multiplications and additions in registers, on as many cores as torch uses.

python -m benchmarks.peak    shows them, in turns, and writes them down
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

# Some 150 ms: on a busy machine threads take a while to find a core each.
ROUNDS = {"float32": 20_000_000, "avx512_bf16": 20_000_000, "amx": 4_000_000}


def product_peak(instructions: str) -> tuple[Callable[[], object], float]:
    """A contender for `interleave`, and the floating-point operations of one run of it; of "" float32's."""
    kind = instructions or "float32"
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "peak.so"
        flags = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
        source = Path(__file__).with_name("peak.cpp")
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", library], check=True)
        kernel = getattr(ctypes.CDLL(str(library)), f"{kind}_peak")  # ctypes releases the GIL
    kernel.restype = ctypes.c_double
    outs = [(ctypes.c_float * 12)(*range(12)) for _ in range(threads)]

    def one(out: ctypes.Array[ctypes.c_float]) -> float:
        return float(kernel(ctypes.c_long(ROUNDS[kind]), ctypes.c_float(0.5), out))

    if threads == 1:
        return lambda: one(outs[0]), one(outs[0])
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(one, outs)), one(outs[0]) * threads


def main() -> None:
    """Of every instruction that this CPU has for them."""
    from benchmarks.harness import interleave
    from benchmarks.report import write_result

    has = {
        "float32": True,
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
    }
    peaks = {kind: product_peak(kind) for kind in ROUNDS if has[kind]}
    timings = interleave({kind: run for kind, (run, _) in peaks.items()}, rounds=15)
    gflops = {kind: round(work / timings[kind].median * 1e-6) for kind, (_, work) in peaks.items()}
    print(gflops)
    write_result("peaks", {"gflops": gflops})


if __name__ == "__main__":
    main()
