"""What the steps of `gpu_session` share: options, inputs, timing. torch is imported when a step runs."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
ROUNDS = 9
UNFINISHED = "unfinished"  # the key, at any depth, of what there was no time for, which is no failure
FAILED = "failed"  # the key, at any depth of a step's figures, of what went wrong: then the session's status is 1
# Ways to run our tower, by the settings that differ.
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, no graphs": {"mm_cuda_graphs": "0"},
    "ours, cuBLAS": {"mm_batch_invariant": False},
    "ours, cuBLAS, torch.compile": {"mm_batch_invariant": False, "mm_torch_compile": True},
    "ours, fp8": {"mm_quantization": "fp8"},
}

Options = argparse.Namespace
Figures = Iterator[tuple[str, Any]]  # a step's, each as soon as it is known


class Unavailable(Exception):
    """This machine cannot do the step; says why."""


def failure(error: Exception) -> dict[str, str]:
    """An error as a figure: its type and first line. All of it, which compilers make pages of, goes to stderr."""
    traceback.print_exception(error, file=sys.stderr)
    return {FAILED: ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])}


def attempt(measure: Callable[[], Any]) -> Any:
    """What it finds, or how it failed: what comes after it is measured still.

    Not after an error of CUDA's that stays, an illegal address say: what is left then fails as well, and quickly, up
    to the end of this process. Each step has one of its own.
    """
    try:
        return measure()
    except Exception as error:  # noqa: BLE001 - is the figure
        return failure(error)


def failures(figures: dict[str, Any]) -> Iterator[str]:
    """A line for each failure in a step's figures, after the names that lead to it."""
    return found(FAILED, figures)


def found(wanted: str, figures: dict[str, Any], name: str = "") -> Iterator[str]:
    """A line for each value under this key, at any depth, after the names that lead to it."""
    for key, value in figures.items():
        if key == wanted:
            yield ": ".join([*filter(None, [name]), *value.strip().splitlines()[-1:]])
        elif isinstance(value, dict):
            yield from found(wanted, value, ", ".join(filter(None, [name, key])))


def is_gpu(options: Options) -> bool:
    return not options.device.startswith("cpu")


def need_cuda(options: Options) -> None:
    if not is_gpu(options):
        raise Unavailable(f"needs a GPU, and the device is {options.device}")


def dtype_of(options: Options) -> Any:
    """Triton's interpreter multiplies float32 rightly, bf16 not."""
    import torch

    return torch.bfloat16 if is_gpu(options) else torch.float32


def checkpoint(options: Options) -> Path:
    """A folder with random weights of Qwen2.5-VL, written by the first step that needs it: whole or not at all."""
    from rtp_mm.random_checkpoint import write_checkpoint

    path: Path = options.folder / "checkpoint"
    if not path.exists():
        partial = options.folder / f"partial-{os.getpid()}"
        write_checkpoint(partial, "qwen2_5_vl", options.size)
        partial.rename(path)
    return path


def load_part(folder: Path, options: Options, settings: dict[str, Any]) -> Any:
    from rtp_mm.config import load_settings
    from rtp_mm.models.registry import load_model

    # On a CPU float32, so that Triton's interpreter can run it.
    act_type, attention = ("bf16", "auto") if is_gpu(options) else ("fp32", "sdpa")
    values: dict[str, Any] = {"act_type": act_type, "mm_attention": attention, "device": options.device}
    return load_model(load_settings(checkpoint_path=folder, **values, **settings)).mm_part


def side_lengths(patches: int) -> tuple[int, int]:
    side = int(patches**0.5)
    return side, side


def random_image(h: int, w: int) -> Any:
    import numpy as np

    from rtp_mm.types import Patches

    return Patches(np.random.default_rng(h * w).integers(0, 256, (h * w, 588), np.uint8), (1, h, w))


def random_batch(images: int, patches: int) -> tuple[list[Any], dict[str, Any]]:
    """The same random bytes for both sides: `Patches` for ours, pixel values for the peer."""
    import torch

    from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
    from rtp_mm.types import Patches

    h, w = side_lengths(patches)
    rows = torch.randint(0, 256, (images, patches, 3, 1, 196), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PUBLISHED_PROCESSOR.image_mean, PUBLISHED_PROCESSOR.image_std))
    values = ((rows / 255 - mean) / std).expand(-1, -1, -1, 2, -1).reshape(images * patches, -1)
    items = [Patches(image.flatten(1).numpy(), (1, h, w)) for image in rows]
    return items, {"pixel_values": values, "image_grid_thw": torch.tensor([[1, h, w]] * images)}


def synchronize(device: Any) -> None:
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def timed(function: Callable[[], object], device: Any, rounds: int = ROUNDS) -> float:
    """Median seconds of a call, with all its device work, after one call to warm up (several rounds only)."""
    if rounds > 1:
        function()
    times = []
    for _ in range(rounds):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return median(times)


def kernel_seconds(call: Callable[[], object], options: Options, *, copies_up: bool = False) -> float:
    """Median seconds of a call's kernels, with nothing of its inputs in the cache; on a CPU those of the call.

    By a graph: a host that is slow to launch a short kernel would be timed in its place.
    copies_up: it copies from host memory, which a graph may refuse or read too late; its launch is timed with it.
    """
    if not is_gpu(options):
        return timed(call, options.device, rounds=3)
    import torch
    from triton.testing import do_bench

    if copies_up:
        return float(do_bench(call, return_mode="median")) / 1e3
    call()  # compiles
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:  # and so do, perhaps, all captures after it
        print(f"no graph, timed with its launch: {error}", file=sys.stderr)
        return float(do_bench(call, return_mode="median")) / 1e3
    return float(do_bench(graph.replay, return_mode="median")) / 1e3
