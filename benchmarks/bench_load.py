"""What loading the tower costs beside a whole language model: seconds, peak anonymous memory, bytes read from disk.

    python -m benchmarks.bench_load --family qwen2_5_vl --size 7b

The checkpoint has the published shards and index; the language model's tensors are holes in sparse files. Its pages
are dropped from the page cache first, so that every byte read is seen.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

MB = 1e6


def proc_value(file: str, key: str) -> int:
    """A number from /proc/self: kB in `status`, bytes in `io`."""
    for line in Path(f"/proc/self/{file}").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise KeyError(key)


def measure(checkpoint: Path, act_type: str) -> dict[str, Any]:
    """In a process of its own."""
    import torch

    from rtp_mm.config import load_settings
    from rtp_mm.models.registry import load_model

    peak_kb, is_done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak_kb
        while not is_done.wait(0.002):
            peak_kb = max(peak_kb, proc_value("status", "RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    read_before, started = proc_value("io", "read_bytes"), time.perf_counter()
    model = load_model(load_settings(checkpoint_path=checkpoint, act_type=act_type))
    seconds, read = time.perf_counter() - started, proc_value("io", "read_bytes") - read_before
    is_done.set()
    watcher.join()
    tensors = [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and not t.is_meta]  # packed weights, too
    held = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    del model  # until here it holds them
    return {"seconds": seconds, "peak_anonymous_bytes": peak_kb * 1024, "bytes_read": read, "tower_held_bytes": held}


def tower_file_bytes(checkpoint: Path) -> int:
    """Bytes of the tower's tensors as they stand in the files."""
    from safetensors import safe_open

    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())["weight_map"]
    total = 0
    for name, file in index.items():
        if "visual." in name:
            with safe_open(checkpoint / file, framework="pt") as opened:
                total += opened.get_tensor(name).nbytes
    return total


def drop_page_cache(checkpoint: Path) -> None:
    for path in checkpoint.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=("qwen2_vl", "qwen2_5_vl"))
    parser.add_argument("--size", default="7b", help="2b, 3b or 7b")
    parser.add_argument("--act-type", default="bf16", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.act_type)))
        return

    from benchmarks.report import write_result
    from rtp_mm.random_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(checkpoint, options.family, options.size, sparse_llm=True)
        apparent = sum(path.stat().st_size for path in checkpoint.iterdir())
        in_files = tower_file_bytes(checkpoint)
        drop_page_cache(checkpoint)
        command = [sys.executable, "-m", "benchmarks.bench_load", "--measure", str(checkpoint)]
        command += ["--act-type", options.act_type]
        result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    result |= {
        "act_type": options.act_type,
        "checkpoint_bytes": apparent,
        "tower_file_bytes": in_files,
        "peak_beyond_tower_bytes": result["peak_anonymous_bytes"] - result["tower_held_bytes"],
        "read_ratio": result["bytes_read"] / in_files,
    }
    table = Table("", "MB", title=f"loading the tower of {options.family} {options.size}, {result['seconds']:.1f} s")
    for label, key in (
        ("checkpoint", "checkpoint_bytes"),
        ("tower in the files", "tower_file_bytes"),
        ("read from disk", "bytes_read"),
        (f"tower held in {options.act_type}", "tower_held_bytes"),
        ("peak anonymous memory", "peak_anonymous_bytes"),
        ("  beyond the tower", "peak_beyond_tower_bytes"),
    ):
        table.add_row(label, f"{result[key] / MB:,.0f}")
    Console().print(table)
    write_result(f"load_{options.family}_{options.size}_{options.act_type}", result)


if __name__ == "__main__":
    main()
