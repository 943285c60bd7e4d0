"""The vision tower against Hugging Face's on the same checkpoint: milliseconds, GFLOP/s, error against float32.

    python -m benchmarks.bench_tower [--family qwen2_5_vl] [--checkpoint FOLDER] [--patches 64 256 1024 1768 16x256]

Without a checkpoint, random weights of the family's smallest published shape. Towers run in turns in one process;
Hugging Face's uses its SDPA attention. `16x256` is a batch: sixteen images of 256 patches in one forward, which Hugging
Face gets in one packed call, too. What is not measured stays as it is in the result: the large ones take minutes.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.harness import interleave
from benchmarks.peak import product_peak
from benchmarks.readme import results
from benchmarks.report import COMMIT, command, machine, write_result
from rtp_mm._core import bf16_instructions
from rtp_mm.cli.hugging_face import HuggingFacePeer
from rtp_mm.config import load_settings
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.registry import load_model
from rtp_mm.random_checkpoint import write_checkpoint
from rtp_mm.types import Patches
from rtp_mm.vit.tower import TowerConfig, full_lengths, window_lengths

SIZES = {"qwen2_vl": "2b", "qwen2_5_vl": "3b"}
# Patches to a grid of one image; 1768 is 728 x 476 pixels, with windows cut at both edges.
GRIDS = {16: (4, 4), 64: (8, 8), 256: (16, 16), 512: (32, 16), 1024: (32, 32), 1768: (52, 34), 3996: (74, 54)}


DEFAULT = ("64", "256", "1024", "1768")


class Batch(NamedTuple):
    """Images of so many patches each, of `GRIDS`."""

    patches: int
    images: int

    @classmethod
    def parse(cls, text: str) -> Batch:
        """Of "256", or "16x256". Raises `ArgumentTypeError`."""
        found = re.fullmatch(r"(?:([1-9]\d*)x)?(\d+)", text)
        if found is None or int(found[2]) not in GRIDS:
            raise argparse.ArgumentTypeError(
                f"{text}: of the patches of an image there are {', '.join(map(str, GRIDS))}"
            )
        return cls(int(found[2]), int(found[1] or 1))

    def __str__(self) -> str:
        return f"{self.images}x{self.patches}" if self.images > 1 else str(self.patches)


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


def inputs(tower: TowerConfig, batch: Batch, mean: Tensor, std: Tensor) -> tuple[list[Patches], Tensor, Tensor]:
    """Noise as our bytes, and as Hugging Face's pixel values and grids."""
    h, w = GRIDS[batch.patches]
    size = (batch.images, h * w, tower.in_channels, tower.patch_size**2)
    rows = np.random.default_rng(h * w).integers(0, 256, size, np.uint8)
    frame = (torch.from_numpy(rows) / 255 - mean.view(1, -1, 1)) / std.view(1, -1, 1)
    values = frame[..., None, :].expand(-1, -1, -1, tower.temporal_patch_size, -1).flatten(2).flatten(0, 1)
    patches = [Patches(image.reshape(h * w, -1), (1, h, w)) for image in rows]
    return patches, values, torch.tensor([[1, h, w]] * batch.images)


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def load_ours(options: argparse.Namespace, checkpoint: Path) -> dict[str, Any]:
    """Our towers, by name."""

    def tower(**settings: Any) -> Any:
        return load_model(load_settings(checkpoint_path=checkpoint, **settings)).mm_part.tower

    towers = {f"ours {a}": tower(act_type=a) for a in options.act_types}
    if options.torch_compile:
        towers |= {f"ours {a}, torch.compile": tower(act_type=a, mm_torch_compile=True) for a in options.act_types}
    return towers


@torch.inference_mode()
def measure(options: argparse.Namespace, checkpoint: Path) -> None:
    """Prints and writes the result after each batch."""
    ours = load_ours(options, checkpoint)
    peers = {
        f"Hugging Face {a}": HuggingFacePeer(checkpoint, ACT_DTYPES[a], torch.device("cpu")) for a in ("bf16", "fp32")
    }
    exact_peer = peers["Hugging Face fp32"]
    config: TowerConfig = next(iter(ours.values())).config
    mean, std = (torch.tensor(getattr(exact_peer.processor, name)) for name in ("image_mean", "image_std"))
    instructions = bf16_instructions()
    peak, peak_operations = product_peak(instructions)
    result = f"tower_{options.family}_{SIZES[options.family]}_{instructions or 'cpu'}"
    found: dict[Batch, Any] = {
        Batch.parse(text): {key: before[key] for key in ("machine", "command")} | row
        for _, before in results(result)
        for text, row in before["patches"].items()
    }
    for batch in options.patches:
        patches, values, grid = inputs(config, batch, mean, std)

        def run_ours(tower: Any, patches: list[Patches] = patches) -> Tensor:
            return torch.cat([embedding for embedding, _ in tower(patches)])

        def run_peer(peer: HuggingFacePeer, values: Tensor = values, grid: Tensor = grid) -> Tensor:
            return peer.tower(values.to(peer.tower.dtype), grid_thw=grid).pooler_output  # type: ignore[no-any-return]

        towers = {name: partial(run_ours, tower) for name, tower in ours.items()}
        towers |= {name: partial(run_peer, peer) for name, peer in peers.items()}
        exact = run_peer(exact_peer)
        errors = {name: relative_l2(run(), exact) for name, run in towers.items()}
        is_long = batch.patches * batch.images > 1024
        timings = interleave({"peak": peak, **towers}, options.rounds, warm_up_rounds=0 if is_long else 1)
        work = batch.images * operations(config, *GRIDS[batch.patches])
        found[batch] = {
            "machine": machine(),
            "command": command(),
            **COMMIT,
            "gflop": work * 1e-9,
            "rounds": options.rounds,
            "peak_of": instructions or "float32",
            "peak_gflops": peak_operations / timings["peak"].best * 1e-6,
            "error": errors,
            "gflops": {name: work / timings[name].median * 1e-6 for name in towers},
            "images_per_s": {name: batch.images / timings[name].median * 1e3 for name in towers},
            "milliseconds": {name: asdict(timings[name]) for name in towers},
        }
        print_row(batch, found[batch])
        if "bf16" in options.act_types:
            write_result(result, {"patches": {str(key): row for key, row in sorted(found.items())}})
        else:
            print("not written: the tables are of bf16")


def print_row(batch: Batch, row: dict[str, Any]) -> None:
    title = f"{batch} patches, {row['gflop']:.0f} GFLOP, {row['peak_of']} peak {row['peak_gflops']:.0f} GFLOP/s"
    table = Table(
        "", "ms", "images/s", "x Hugging Face bf16", "x fp32", "GFLOP/s", "of peak", "relative error", title=title
    )
    medians = {name: timing["median"] for name, timing in row["milliseconds"].items()}
    for name, median in medians.items():
        table.add_row(
            name,
            f"{median:,.0f}",
            f"{row['images_per_s'][name]:.2f}",
            f"{medians['Hugging Face bf16'] / median:.2f}",
            f"{medians['Hugging Face fp32'] / median:.2f}",
            f"{row['gflops'][name]:.0f}",
            f"{row['gflops'][name] / row['peak_gflops']:.0%}",
            f"{row['error'][name]:.1e}",
        )
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=SIZES)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument(
        "--patches", type=Batch.parse, nargs="+", default=[*map(Batch.parse, DEFAULT)], metavar="[Nx]PATCHES"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--act-types", nargs="+", default=["bf16", "fp32"], choices=("bf16", "fp32"))
    parser.add_argument("--torch-compile", action="store_true", help="ours with MM_TORCH_COMPILE=1, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or Path(folder) / "checkpoint"
        if options.checkpoint is None:
            write_checkpoint(checkpoint, options.family, SIZES[options.family])
        measure(options, checkpoint)


if __name__ == "__main__":
    main()
