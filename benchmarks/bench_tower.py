"""The vision tower against Hugging Face's on the same checkpoint: milliseconds, GFLOP/s, error against float32.

    python -m benchmarks.bench_tower [--checkpoint FOLDER] [--patches 64 256 1024 1768]

Without a checkpoint, random weights of the published 3B shape. Towers run in turns in one process; Hugging Face's uses
its SDPA attention. Patch counts that are not measured stay as they are in the result: the large ones take minutes.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import interleave
from benchmarks.peak import fma_peak
from benchmarks.readme import results
from benchmarks.report import write_result
from rtp_mm.cli.hugging_face import HuggingFacePeer
from rtp_mm.config import load_settings
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.random_checkpoint import write_checkpoint
from rtp_mm.models.registry import load_model
from rtp_mm.types import Patches
from rtp_mm.vit.tower import TowerConfig, full_lengths, window_lengths

RESULT = "tower_qwen2_5_vl_3b_cpu"  # ..._bf16 from CPUs where ours multiplies that
# Patches to a grid of one image; 1768 is 728 x 476 pixels, with windows cut at both edges.
GRIDS = {16: (4, 4), 64: (8, 8), 256: (16, 16), 1024: (32, 32), 1768: (52, 34), 3996: (74, 54)}


def operations(tower: TowerConfig, h: int, w: int) -> float:
    """Multiplications and additions of one image's forward: GEMMs, and scores and values of attention."""
    dim, merge, patches = tower.hidden_size, tower.spatial_merge_size, h * w
    cell = dim * merge**2
    mlp = (3 if tower.is_gated else 2) * dim * tower.intermediate_size
    full = sum(length**2 for length in full_lengths([(1, h, w)]))
    windowed = sum(length**2 for length in window_lengths([(1, h, w)], merge, tower.window)) if tower.window else full
    full_blocks = len(tower.full_attention_blocks) if tower.window else tower.depth
    pairs = full_blocks * full + (tower.depth - full_blocks) * windowed
    merger = patches // merge**2 * (cell * cell + cell * tower.out_hidden_size)
    embed = patches * dim * tower.in_channels * tower.patch_size**2
    return 2.0 * (patches * tower.depth * (4 * dim * dim + mlp) + 2 * dim * pairs + merger + embed)


def inputs(tower: TowerConfig, h: int, w: int, mean: Tensor, std: Tensor) -> tuple[Patches, Tensor, Tensor]:
    """Noise as our bytes, and as Hugging Face's pixel values and grid."""
    rows = np.random.default_rng(h * w).integers(0, 256, (h * w, tower.in_channels, tower.patch_size**2), np.uint8)
    frame = (torch.from_numpy(rows) / 255 - mean.view(1, -1, 1)) / std.view(1, -1, 1)
    values = frame[:, :, None].expand(-1, -1, tower.temporal_patch_size, -1).flatten(1)
    return Patches(rows.reshape(h * w, -1), (1, h, w)), values, torch.tensor([[1, h, w]])


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@torch.inference_mode()
def measure(checkpoint: Path, patch_counts: list[int], rounds: int, act_types: list[str]) -> None:
    """Prints and writes the result after each patch count."""
    ours = {a: load_model(load_settings(checkpoint_path=checkpoint, act_type=a)).mm_part.tower for a in act_types}
    peers = {a: HuggingFacePeer(checkpoint, ACT_DTYPES[a], torch.device("cpu")) for a in ("bf16", "fp32")}
    config: TowerConfig = next(iter(ours.values())).config
    mean, std = (torch.tensor(getattr(peers["fp32"].processor, name)) for name in ("image_mean", "image_std"))
    peak, peak_operations = fma_peak()
    is_bf16 = any(tower.compute_dtype == torch.bfloat16 for tower in ours.values())
    result = RESULT + "_bf16" * is_bf16
    found: dict[str, Any] = {
        str(count): row for _, before in results(result) for count, row in before["patches"].items()
    }
    for count in patch_counts:
        patches, values, grid = inputs(config, *GRIDS[count], mean, std)

        def run_ours(tower: Any, patches: Patches = patches) -> Tensor:
            return tower([patches])[0][0]  # type: ignore[no-any-return]

        def run_peer(peer: HuggingFacePeer, values: Tensor = values, grid: Tensor = grid) -> Tensor:
            return peer.tower(values.to(peer.tower.dtype), grid_thw=grid).pooler_output  # type: ignore[no-any-return]

        contenders: dict[str, Callable[[], object]] = {"peak": peak}
        contenders |= {f"ours {a}": lambda tower=tower: run_ours(tower) for a, tower in ours.items()}
        contenders |= {f"Hugging Face {a}": lambda peer=peer: run_peer(peer) for a, peer in peers.items()}
        exact = run_peer(peers["fp32"])
        errors = {name: relative_l2(run(), exact) for name, run in contenders.items() if name != "peak"}  # type: ignore[arg-type]
        timings = interleave(contenders, rounds, warm_up_rounds=0 if count > 1024 else 1)
        work = operations(config, *GRIDS[count])
        found[str(count)] = {
            "gflop": work * 1e-9,
            "rounds": rounds,
            "peak_gflops": peak_operations / timings["peak"].best * 1e-6,
            "error": errors,
            "gflops": {name: work / timings[name].median * 1e-6 for name in errors},
            "milliseconds": {name: asdict(timings[name]) for name in errors},
        }
        print_row(count, found[str(count)])
        write_result(result, {"patches": dict(sorted(found.items(), key=lambda item: int(item[0])))})


def print_row(count: int, row: dict[str, Any]) -> None:
    title = f"{count} patches, {row['gflop']:.0f} GFLOP, FMA peak {row['peak_gflops']:.0f} GFLOP/s"
    table = Table("", "ms", "x Hugging Face bf16", "x fp32", "GFLOP/s", "of peak", "relative error", title=title)
    medians = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    for name, median in medians.items():
        table.add_row(
            name,
            f"{median:,.0f}",
            f"{medians['Hugging Face bf16'] / median:.2f}",
            f"{medians['Hugging Face fp32'] / median:.2f}",
            f"{row['gflops'][name]:.0f}",
            f"{row['gflops'][name] / row['peak_gflops']:.0%}",
            f"{row['error'][name]:.1e}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--patches", type=int, nargs="+", default=[64, 256, 1024, 1768], choices=GRIDS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--act-types", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or Path(folder) / "checkpoint"
        if options.checkpoint is None:
            write_checkpoint(checkpoint, "qwen2_5_vl", "3b")
        measure(checkpoint, options.patches, options.rounds, options.act_types)


if __name__ == "__main__":
    main()
