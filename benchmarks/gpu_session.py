"""Everything there is to do on a GPU that is lent for minutes: build, check, measure, profile; one table, one JSON.

    python -m benchmarks.gpu_session             on a machine with a GPU, torch and nvcc
    python -m benchmarks.gpu_session --only tower --device cpu --size tiny      to try the script anywhere

Every step runs even where another failed; the exit status is that of the worst.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

ROOT = Path(__file__).parent.parent
ROUNDS = 9
PROFILED_KERNELS = 15
# Images in a forward, patches of each: one small image, one of a megapixel, a full batch.
BATCHES = ((1, 256), (1, 1024), (4, 1024), (16, 1024))
CUDA_TESTS = ("tests/test_ops_positions.py", "tests/test_ops_patch_embed.py", "tests/test_ops_resize_patchify.py")
KERNEL_TESTS = (*CUDA_TESTS, "tests/test_ops_triton.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck")


def run(*command: str, **environment: str) -> str:
    """The output of a command; raises with the end of it where the command failed."""
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def build(options: argparse.Namespace) -> dict[str, Any]:
    """The extension with its CUDA operators, for this machine's torch."""
    started = time.perf_counter()
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    run(*pip, RTP_MM_CUDA="1", RTP_MM_CUDA_ARCHS="90a-real")
    return {"seconds": time.perf_counter() - started}


def tests(options: argparse.Namespace) -> dict[str, Any]:
    """Every CUDA and Triton kernel against its twin, and the towers on the GPU against Hugging Face."""
    files = (*KERNEL_TESTS, "tests/test_tower.py")
    output = run(sys.executable, "-m", "pytest", "-q", "-k", "cuda or gpu", *files, RTP_MM_REQUIRE="cuda,triton")
    return {"pytest": output.strip().splitlines()[-1]}


def sanitizer(options: argparse.Namespace) -> dict[str, Any]:
    """compute-sanitizer over the kernels' tests."""
    found = {}
    for tool in SANITIZERS:
        output = run(
            *("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"),
            *(sys.executable, "-m", "pytest", "-q", "-x", "-k", "cuda", *CUDA_TESTS),
            PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else an access past a tensor stays inside torch's own block
        )
        found[tool] = next(line for line in reversed(output.splitlines()) if "SUMMARY" in line)
    return found


def peaks(options: argparse.Namespace) -> dict[str, Any]:
    """What this device does at best: a large copy, and a large bf16 matrix product on random data."""
    import torch

    block = torch.empty(1 << 30, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(block)
    copy = timed(lambda: target.copy_(block), options.device)
    a, b = (torch.randn(8192, 8192, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b, options.device)
    return {"copy_gb_s": 2 * block.nbytes / copy / 1e9, "bf16_tflop_s": 2 * 8192**3 / product / 1e12}


def tower(options: argparse.Namespace) -> dict[str, Any]:
    """Ours against Hugging Face SDPA on the same weights, bf16, rounds interleaved; errors against float32."""
    import torch

    from rtp_mm.cli.hugging_face import HuggingFacePeer

    device = torch.device(options.device)
    with checkpoint(options.size) as folder:
        ours = load_part(folder, options.device)
        peer = HuggingFacePeer(folder, torch.bfloat16, device)
        exact = HuggingFacePeer(folder, torch.float32, device)
        rows = []
        for images, patches in BATCHES if device.type == "cuda" else BATCHES[:1]:
            items, peer_inputs = random_batch(images, patches)
            expected = exact.forward(peer_inputs).double()
            errors = {
                "ours": torch.cat([e for e, _ in ours.mm_process_batch(items, [], [])]).cpu(),
                "hugging_face": peer.forward(peer_inputs),
            }
            seconds: dict[str, list[float]] = {"ours": [], "hugging_face": []}
            for _ in range(ROUNDS):
                seconds["ours"].append(timed(lambda i=items: ours.mm_process_batch(i, [], []), device, rounds=1))
                seconds["hugging_face"].append(timed(lambda i=peer_inputs: peer.forward(i), device, rounds=1))
            rows.append(
                {
                    "images": images,
                    "patches": patches,
                    **{f"{side}_ms": 1e3 * median(times) for side, times in seconds.items()},
                    **{
                        f"{s}_error": float((e.double() - expected).norm() / expected.norm()) for s, e in errors.items()
                    },
                }
            )
    return {f"{row['images']} x {row['patches']} patches": row for row in rows}


def profile(options: argparse.Namespace) -> dict[str, Any]:
    """The kernels that a full batch spends its time in, milliseconds each."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    with checkpoint(options.size) as folder:
        part = load_part(folder, options.device)
        items, _ = random_batch(*BATCHES[-1])
        part.mm_process_batch(items, [], [])
        with record(activities=[ProfilerActivity.CUDA]) as recorded:
            part.mm_process_batch(items, [], [])
            synchronize(options.device)
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:80]: event.self_device_time_total / 1e3 for event in events[:PROFILED_KERNELS]}


STEPS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    step.__name__: step for step in (build, tests, sanitizer, peaks, tower, profile)
}


@contextmanager
def checkpoint(size: str) -> Iterator[Path]:
    """A folder with random weights of Qwen2.5-VL, gone afterwards."""
    from rtp_mm.models.random_checkpoint import write_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint"
        write_checkpoint(path, "qwen2_5_vl", size)
        yield path


def load_part(folder: Path, device: str) -> Any:
    from rtp_mm.config import load_settings
    from rtp_mm.models.registry import load_model

    return load_model(load_settings(checkpoint_path=folder, device=device, act_type="bf16")).mm_part


def random_batch(images: int, patches: int) -> tuple[list[Any], dict[str, Any]]:
    """The same random bytes for both sides: `Patches` for ours, pixel values for the peer."""
    import torch

    from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
    from rtp_mm.types import Patches

    side = int(patches**0.5)
    rows = torch.randint(0, 256, (images, patches, 3, 1, 196), dtype=torch.uint8)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PUBLISHED_PROCESSOR.image_mean, PUBLISHED_PROCESSOR.image_std))
    values = ((rows / 255 - mean) / std).expand(-1, -1, -1, 2, -1).reshape(images * patches, -1)
    items = [Patches(image.flatten(1).numpy(), (1, side, side)) for image in rows]
    return items, {"pixel_values": values, "image_grid_thw": torch.tensor([[1, side, side]] * images)}


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


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"steps, comma-separated: {', '.join(STEPS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="3b", help="tiny, 3b or 7b")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    for name in options.only.split(",") if options.only else STEPS:
        try:
            results[name] = STEPS[name](options)
        except Exception:  # noqa: BLE001 - the lease is short: the other steps still run
            results[name] = {"failed": traceback.format_exc()}
    table = Table("step", "figure", "", show_lines=True)
    for name, figures in results.items():
        for figure, value in figures.items():
            table.add_row(name, figure, escape(shown(value)))
    Console(width=160).print(table)

    from benchmarks.report import write_result

    if options.device != "cpu":
        write_result("gpu_session", results)
    return int(any("failed" in figures for figures in results.values()))


if __name__ == "__main__":
    sys.exit(main())
