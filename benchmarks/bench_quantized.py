"""What MM_QUANTIZATION=int8 costs and gains on a CPU: relative L2 error image by image, milliseconds of the tower.

    python -m benchmarks.bench_quantized [--family qwen2_5_vl --size 3b] [--checkpoint FOLDER]

Errors are those of every second image or clip of `bench_accuracy` against our own float32, which is within 2e-6 of
Hugging Face's; beside them Hugging Face's in bf16, from that benchmark's committed result. Random weights.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.bench_accuracy import SMALLEST, patches_of, relative_l2, sights
from benchmarks.bench_tower import GRIDS
from benchmarks.harness import interleave
from benchmarks.readme import results
from benchmarks.report import write_result
from rtp_mm._core import bf16_instructions
from rtp_mm.config import load_settings
from rtp_mm.models.registry import load_model
from rtp_mm.random_checkpoint import write_checkpoint
from rtp_mm.types import Patches

WAYS: dict[str, dict[str, Any]] = {
    "float32": {"act_type": "fp32"},
    "bf16": {"act_type": "bf16"},
    "bf16, int8": {"act_type": "bf16", "mm_quantization": "int8"},
}


def embed(part: Any) -> list[Tensor]:
    return [part.mm_process(patches_of(part.preprocessor, sight))[0] for sight in sights()[::2]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=SMALLEST)
    parser.add_argument("--size", help="the family's smallest published one if left out")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--patches", type=int, nargs="+", default=[64, 256, 1024], choices=GRIDS)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    size = options.size or SMALLEST[options.family]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or Path(folder)
        if options.checkpoint is None:
            write_checkpoint(checkpoint, options.family, size)
        parts: dict[str, Any] = {
            name: load_model(load_settings(checkpoint_path=checkpoint, **way)).mm_part for name, way in WAYS.items()
        }
    exact = embed(parts["float32"])
    errors = [relative_l2(a, b) for a, b in zip(embed(parts["bf16, int8"]), exact, strict=True)]
    [(_, accuracy)] = results(f"accuracy_{options.family}_{size}")
    peer = [row["hugging_face_bf16"] for row in accuracy["images"][::2]]
    milliseconds: dict[str, Any] = {}
    table = Table("patches", *WAYS, title="ms")
    for count in options.patches:
        h, w = GRIDS[count]
        side = parts["float32"].processor.patch_size
        rows = np.random.default_rng(count).integers(0, 256, (count, 3 * side**2), np.uint8)
        patches = Patches(rows, (1, h, w))
        contenders = {name: lambda part=part, p=patches: part.tower([p]) for name, part in parts.items()}
        timings = interleave(contenders, options.rounds)
        milliseconds[str(count)] = {name: asdict(timing) for name, timing in timings.items()}
        table.add_row(str(count), *(f"{timing.median:,.0f}" for timing in timings.values()))
    Console().print(table)
    summary = {
        "mean_int8": mean(errors),
        "mean_hugging_face_bf16": mean(peer),
        "worst_ratio": max(a / b for a, b in zip(errors, peer, strict=True)),
    }
    Console().print({key: f"{value:.3g}" for key, value in summary.items()})
    instructions = bf16_instructions()
    write_result(
        f"int8_{options.family}_{size}" + f"_{instructions}" * bool(instructions),
        {"summary": summary, "errors": errors, "hugging_face_bf16": peer, "milliseconds": milliseconds},
    )


if __name__ == "__main__":
    main()
