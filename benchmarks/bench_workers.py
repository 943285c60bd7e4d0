"""JPEG bytes to patch rows through the engine's preprocess workers: threads of one process against processes.

    python -m benchmarks.bench_workers

Latency: one item at a time. Throughput: as many items at a time as workers, and twice as many. All rows are compared
with those of a direct call before anything is timed.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import skimage.data
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.report import write_result
from rtp_mm.config import load_settings
from rtp_mm.engine.workers import PreprocessWorkers
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.types import Blob, MMPreprocessConfig, MMUrlType, PreprocessOptions

SIZES = ((224, 224), (640, 480), (1024, 768), (3840, 2160))
PREPROCESS = ImagePreprocessor.from_config(PUBLISHED_PROCESSOR, load_settings())
CONFIG = MMPreprocessConfig()


class Part(MultiModalEmbeddingInterface):
    """What the workers need of a model."""

    preprocessor = PREPROCESS


def photograph(width: int, height: int) -> Blob:
    file = io.BytesIO()
    image = Image.fromarray(skimage.data.coffee()).resize((width, height), Image.Resampling.LANCZOS)
    image.save(file, "JPEG", quality=90)
    return Blob(file.getvalue(), b"", f"{width}x{height}")


def own_pss_mib(pid: int) -> float:
    """Without shared memory, which MM_SLAB_MB bounds for all together."""
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines())
    kib = {words[0]: int(words[1]) for words in lines if words[0].startswith("Pss")}
    return round((kib["Pss:"] - kib["Pss_Shmem:"]) / 1024, 1)


async def throughput(workers: PreprocessWorkers, blob: Blob, at_once: int, seconds: float) -> tuple[float, list[float]]:
    """Items per second, and the milliseconds of each, with `at_once` callers that each wait for their answer."""
    latencies: list[float] = []
    end = time.perf_counter() + seconds

    async def caller() -> None:
        while (started := time.perf_counter()) < end:
            await workers.prepare(blob, MMUrlType.IMAGE, CONFIG)
            latencies.append((time.perf_counter() - started) * 1e3)

    started = time.perf_counter()
    await asyncio.gather(*(caller() for _ in range(at_once)))
    return len(latencies) / (time.perf_counter() - started), latencies


async def measure(rounds: int, seconds: float, count: int) -> dict[str, Any]:
    kinds = {
        name: PreprocessWorkers(Part(), load_settings(use_local_preprocess=local, mm_preprocess_max_workers=count))
        for name, local in (("threads", 1), ("processes", 0))
    }
    blobs = [photograph(*size) for size in SIZES]
    results: dict[str, Any] = {}
    for blob in blobs:
        expected = PREPROCESS(blob, MMUrlType.IMAGE, PreprocessOptions()).rows
        figures: dict[str, dict[str, list[float]]] = {name: {} for name in kinds}
        for round_number in range(rounds + 1):
            for name, workers in kinds.items():
                prepared = await workers.prepare(blob, MMUrlType.IMAGE, CONFIG)
                np.testing.assert_array_equal(prepared.value.rows, expected)
                for at_once in (1, count, 2 * count):
                    rate, latencies = await throughput(workers, blob, at_once, seconds)
                    if round_number:  # the first is the warm-up
                        figures[name].setdefault(f"items/s, {at_once} at once", []).append(rate)
                        if at_once == 1:
                            figures[name].setdefault("ms, alone", []).extend(latencies)
        results[f"{blob.source}, {blob.nbytes >> 10} KiB"] = {
            name: {what: round(statistics.median(values), 2) for what, values in each.items()}
            for name, each in figures.items()
        }
    memory = [own_pss_mib(child.pid) for child in psutil.Process().children()]
    for workers in kinds.values():
        workers.close()
    return {
        "workers": count,
        "results": results,
        "pss_mib_of_each_worker": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.3, help="of each measurement")
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    measured = asyncio.run(measure(options.rounds, options.seconds, options.workers))
    table = Table("photograph", "figure", "threads", "processes")
    for photo, kinds in measured["results"].items():
        for what, value in kinds["threads"].items():
            table.add_row(photo, what, str(value), str(kinds["processes"][what]))
    Console().print(table)
    print("MiB of each worker, PSS without the slab and inboxes:", measured["pss_mib_of_each_worker"])
    write_result("workers", measured)


if __name__ == "__main__":
    main()
