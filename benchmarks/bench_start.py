"""A server's start: seconds from its command to the first 200 of /health, and from there to the first answer.

    python -m benchmarks.bench_start [--family qwen2_5_vl] [--size 3b] [--rounds 5]

Each a process of its own, in turns: our server; Hugging Face's model behind the same interface; and, as what no start
can do without, a read of the tower's bytes, no more than that. The checkpoint, of random weights in the published
shape, is in the system's page cache at first, and dropped from it before each start after that. How fast the disk is
then, below a virtual machine often with a cache of its own, the bare read tells.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.load import (
    Client,
    Outcome,
    free_ports,
    hugging_face,
    image_requests,
    is_healthy,
    is_listening,
    ours,
    started,
)
from benchmarks.photo_source import photograph
from benchmarks.report import write_result
from rtp_mm.random_checkpoint import write_checkpoint

POLL_S = 0.01
TARGET_S = 3.0  # beyond the read
READ = "reading the tower"
STATES = ("in memory", "on disk")


def read_tower(checkpoint: Path) -> float:
    """Seconds to read the bytes of the tower's tensors into memory."""
    seconds = 0.0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_bytes))
            places = [t["data_offsets"] for name, t in header.items() if "visual." in name]
            begun = time.perf_counter()
            for first, end in places:
                read = os.preadv(file.fileno(), [bytearray(end - first)], 8 + header_bytes + first)
                if read != end - first:
                    raise SystemExit(f"{path}: {read} of {end - first} bytes came")
            seconds += time.perf_counter() - begun
    return seconds


def start(command: list[str], is_ready: Callable[[], bool], address: str, request: bytes) -> tuple[float, float]:
    """Seconds to be ready, and then to the first answer."""
    begun = time.perf_counter()
    with started(command, is_ready, POLL_S):
        ready = time.perf_counter()
        asyncio.run(first_answer(address, request))
        return ready - begun, time.perf_counter() - ready


async def first_answer(address: str, request: bytes) -> None:
    client, outcome = Client(address, lambda _: request), Outcome()
    await client.send(outcome, time.perf_counter())
    await client.close()
    if outcome.errors:
        raise SystemExit(f"{address}: {dict(outcome.errors)}")


def forget(checkpoint: Path) -> None:
    """Has the system drop its files from the page cache."""
    os.sync()
    for path in checkpoint.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(
    checkpoint: Path, dtype: str, rounds: int, before: Callable[[Path], object]
) -> dict[str, list[list[float]]]:
    """[seconds to be ready, seconds to the first answer] of every round, by contender. `before` each start."""
    with tempfile.NamedTemporaryFile(suffix=".jpg") as photo:
        photo.write(photograph(224, 224))
        photo.flush()
        request = image_requests(lambda _: photo.name)(0)
        times: dict[str, list[list[float]]] = {"ours": [], "Hugging Face": [], READ: []}
        for _ in track(range(rounds), "starts"):
            before(checkpoint)
            read = [sys.executable, "-m", "benchmarks.bench_start", "--read", str(checkpoint)]
            times[READ].append([float(subprocess.run(read, check=True, capture_output=True, text=True).stdout)])
            own, peer = free_ports(2)
            for name, command, is_ready, port in (
                ("ours", ours(checkpoint, own, dtype), partial(is_healthy, own), own + 1),
                ("Hugging Face", hugging_face(checkpoint, peer, dtype), partial(is_listening, peer), peer),
            ):
                before(checkpoint)
                times[name].append([*start(command, is_ready, f"127.0.0.1:{port}", request)])
    return times


def summary(times: dict[str, list[list[float]]]) -> dict[str, Any]:
    medians = {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}
    return {
        "ready_s": {name: median[0] for name, median in medians.items()},
        "first_answer_s": {name: median[1] for name, median in medians.items() if len(median) > 1},
        "beyond_reading_s": medians["ours"][0] - medians[READ][0],
        "rounds": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=("qwen2_vl", "qwen2_5_vl"))
    parser.add_argument("--size", default="3b", help="2b, 3b or 7b")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.read:
        print(read_tower(options.read))
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(checkpoint, options.family, options.size, sparse_llm=True)
        # A checkpoint that was written just now is in memory.
        states = {
            state: summary(measure(checkpoint, options.dtype, options.rounds, before))
            for state, before in zip(STATES, (lambda _: None, forget), strict=True)
        }
    for state, result in states.items():
        title = f"start with {options.family} {options.size}, {options.dtype}, {state}"
        table = Table("", "ready, s", "first answer, s", title=title)
        for name, seconds in result["ready_s"].items():
            answer = f"{result['first_answer_s'][name]:.2f}" if name in result["first_answer_s"] else ""
            table.add_row(name, f"{seconds:.2f}", answer)
        Console().print(table, f"{result['beyond_reading_s']:.2f} s beyond reading the tower; target {TARGET_S:.0f} s")
    result = {"dtype": options.dtype, "target_s": TARGET_S, "states": states}
    write_result(f"start_{options.family}_{options.size}", result)


if __name__ == "__main__":
    main()
