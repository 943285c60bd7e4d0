"""Memory of the server's process tree over ten thousand requests for distinct images of many sizes.

    python -m benchmarks.bench_memory [--requests 10000]

PSS counts a page that several processes share once. Flat is what it has to be once caches and buffers are full, and
never above its target: the tower's weights, the configured budgets, 300 MB, and 60 MB a worker. Budgets are those of
what is kept, the caches' and the slab's, set to little here; what requests in flight hold has to fit beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from rich.progress import Progress
from safetensors.torch import load_file

from benchmarks.bench_service import write_tower
from benchmarks.load import (
    Client,
    Outcome,
    free_ports,
    image_requests,
    is_healthy,
    is_listening,
    ours,
    pss,
    started,
    tree,
)
from benchmarks.report import RESULTS, write_result
from rtp_mm.config import Settings, load_settings

SIZES = ["112x112", "224x336", "640x480", "333x777", "1024x768", "256x256", "800x90", "480x640"]
CALLERS = 8
SAMPLES = 200
BUDGETS = {"mm_embedding_cache_mb": 64, "mm_slab_mb": 64}  # small, so that they are full early
BASE_MB, WORKER_MB = 300, 60  # beyond weights and budgets


async def load(address: str, requests: Any, total: int, root: psutil.Process) -> tuple[list[dict[str, float]], Outcome]:
    client, outcome, samples, sent = Client(address, requests), Outcome(), [], 0
    step = max(CALLERS, total // SAMPLES)
    started_at = time.perf_counter()
    with Progress() as progress:
        bar = progress.add_task("requests", total=total)
        while sent < total:
            for _ in range(0, step, CALLERS):
                await asyncio.gather(*(client.send(outcome, time.perf_counter()) for _ in range(CALLERS)))
            sent += -(-step // CALLERS) * CALLERS
            processes = tree(root)
            samples.append(
                {
                    "requests": sent,
                    "pss_bytes": pss(root),
                    "processes": len(processes),
                    "descriptors": sum(process.num_fds() for process in processes),
                    "threads": sum(process.num_threads() for process in processes),
                }
            )
            progress.update(bar, completed=sent)
    outcome.seconds = time.perf_counter() - started_at
    await client.close()
    return samples, outcome


def target_bytes(settings: Settings, checkpoint: Path) -> int:
    """What the process tree may hold at most."""
    budgets_mb = settings.mm_bytes_cache_mb + settings.mm_patch_cache_mb + settings.mm_embedding_cache_mb
    budgets = (budgets_mb + settings.mm_slab_mb) << 20
    weights = sum(t.nbytes for name, t in load_file(checkpoint / "model.safetensors").items() if "visual." in name)
    return weights + budgets + (BASE_MB + WORKER_MB * settings.mm_preprocess_max_workers) * 1_000_000


def plot(path: Path, samples: list[dict[str, float]], target: int) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4), layout="constrained")
    axes.plot([s["requests"] for s in samples], [s["pss_bytes"] / 1e6 for s in samples], label="measured")
    axes.axhline(target / 1e6, color="gray", linestyle="--", label="target")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("requests answered")
    axes.set_ylabel("PSS of the process tree, MB")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def quarter_medians(values: Sequence[float]) -> list[float]:
    """Of each quarter of a run: what is flat stays, while what is in flight goes up and down."""
    quarter = len(values) // 4
    return [statistics.median(values[i * quarter : (i + 1) * quarter]) for i in range(4)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--option", action="append", default=[], help="a flag for our server, --name=value")
    options = parser.parse_args()
    own, photos = free_ports(2)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        checkpoint = Path(folder) / "checkpoint"
        write_tower(checkpoint, "tiny")
        stack.enter_context(started(["benchmarks.photo_source", "--port", str(photos)], lambda: is_listening(photos)))
        command = ours(checkpoint, own, "bf16", *(f"--{k}={v}" for k, v in BUDGETS.items()), *options.option)
        target = target_bytes(load_settings(command[1:]), checkpoint)
        process = stack.enter_context(started(command, lambda: is_healthy(own)))
        root = psutil.Process(process.pid)
        idle = pss(root)
        requests = image_requests(lambda n: f"http://127.0.0.1:{photos}/{SIZES[n % len(SIZES)]}/{n}.jpg")
        samples, outcome = asyncio.run(load(f"127.0.0.1:{own + 1}", requests, options.requests, root))
    peak = max(s["pss_bytes"] for s in samples)
    result = {
        "requests": options.requests,
        "idle_bytes": idle,
        "target_bytes": target,
        "peak_bytes": peak,
        "is_target_met": peak <= target,
        "last_bytes": samples[-1]["pss_bytes"],
        "quarter_medians": quarter_medians([sample["pss_bytes"] for sample in samples]),
        "outcome": outcome.summary(),
        "samples": samples,
    }
    plot(RESULTS / "memory.png", samples, target)
    megabytes = ", ".join(f"{value / 1e6:.0f}" for value in result["quarter_medians"])
    print(f"idle {idle / 1e6:.0f} MB; medians of the run's quarters {megabytes}")
    print(f"peak {peak / 1e6:.0f} MB, target {target / 1e6:.0f} MB: {'met' if peak <= target else 'not met'}")
    print(outcome.summary())
    write_result("memory", result)


if __name__ == "__main__":
    main()
