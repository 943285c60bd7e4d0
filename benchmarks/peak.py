"""The machine's roof for float32: fused multiply-adds in registers, on as many cores as torch uses."""

from __future__ import annotations

import ctypes
import os
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROUNDS = 20_000_000  # some 150 ms: on a busy machine threads take a while to find a core each


def fma_peak() -> tuple[Callable[[], object], float]:
    """A contender for `interleave`, and the floating-point operations of one run of it."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "fma_peak.so"
        flags = ("-O3", "-march=native", "-ffp-contract=fast", "-shared", "-fPIC")
        source = Path(__file__).with_name("fma_peak.cpp")
        subprocess.run([os.environ.get("CXX", "c++"), *flags, source, "-o", library], check=True)
        kernel = ctypes.CDLL(str(library)).fma_peak  # ctypes releases the GIL
    kernel.restype = ctypes.c_double
    outs = [(ctypes.c_float * 12)(*range(12)) for _ in range(threads)]

    def one(out: ctypes.Array[ctypes.c_float]) -> float:
        return float(kernel(ctypes.c_long(ROUNDS), ctypes.c_float(0.5), out))

    if threads == 1:
        return lambda: one(outs[0]), one(outs[0])
    pool = ThreadPoolExecutor(threads)
    return lambda: list(pool.map(one, outs)), one(outs[0]) * threads
