"""The steps of `gpu_session`: each takes its options and gives figures by name. torch is imported when a step runs."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parent.parent
ROUNDS = 9
LIMIT_S = 480  # of a command, less than a lease's longest call
PROFILED_KERNELS = 20
# Images in a forward, patches of each: one small image, one of a megapixel, full batches, one of the largest.
BATCHES = ((1, 64), (1, 256), (1, 1024), (4, 1024), (16, 1024), (1, 4096), (1, 16384))
KERNEL_TESTS = ("tests/test_ops_positions.py", "tests/test_ops_patch_embed.py", "tests/test_ops_resize_patchify.py")
TRITON_TESTS = ("tests/triton_kernels.py", "tests/triton_linear.py")
SANITIZERS = ("memcheck", "racecheck", "initcheck")
# Ways to run our tower, by the settings that differ.
VARIANTS: dict[str, dict[str, Any]] = {
    "ours": {},
    "ours, no graphs": {"mm_cuda_graphs": "0"},
    "ours, cuBLAS": {"mm_batch_invariant": False},
    "ours, fp8": {"mm_quantization": "fp8"},
}
# name, K, N, activation; of Qwen2.5-VL
LAYERS = (
    ("qkv", 1280, 3840, "none"),
    ("proj", 1280, 1280, "add"),
    ("gate/up", 1280, 6840, "silu_gate"),
    ("down", 3420, 1280, "add"),
    ("merger 1", 5120, 5120, "gelu"),
)
ROWS = (256, 1024, 4096, 16384)

Options = argparse.Namespace
Figures = dict[str, Any]


class Unavailable(Exception):
    """This machine cannot do the step; says why."""


def build(options: Options) -> Figures:
    """The extension with its CUDA operators, for this machine's torch."""
    need_cuda(options)
    started = time.perf_counter()
    pip = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "-e", ".")
    run(*pip, RTP_MM_CUDA="1", RTP_MM_CUDA_ARCHS="90a-real")
    return {"seconds": time.perf_counter() - started}


def tests(options: Options) -> Figures:
    """Every CUDA and Triton kernel against its twin, the towers against Hugging Face, and graphs, on the GPU."""
    need_cuda(options)
    found = {}
    files = (*KERNEL_TESTS, "tests/test_ops_triton.py", "tests/test_tower.py")
    for file in files:
        command = (sys.executable, "-m", "pytest", "-q", "-k", "cuda or gpu or capability or spills", file)
        found[file] = end_of(*command, RTP_MM_REQUIRE="cuda,triton")
    return found


def sanitizer(options: Options) -> Figures:
    """compute-sanitizer over the kernels' tests."""
    need_cuda(options)
    if shutil.which("compute-sanitizer") is None:
        raise Unavailable("no compute-sanitizer")
    found = {}
    pytest = (sys.executable, "-m", "pytest", "-q", "-x", "-k", "cuda", *KERNEL_TESTS)
    targets: dict[str, tuple[str, ...]] = {"operators": pytest}
    targets |= {script: (sys.executable, script) for script in TRITON_TESTS}
    for target, command in targets.items():
        for tool in SANITIZERS:
            found[f"{target}, {tool}"] = end_of(
                *("compute-sanitizer", "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"),
                *command,
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",  # else an access past a tensor stays inside torch's own block
                PYTHONPATH=os.pathsep.join((str(ROOT), str(ROOT / "tests"))),
            )
    return found


def peaks(options: Options) -> Figures:
    """What this device does at best: a large copy, and a large bf16 matrix product on random data."""
    import torch

    size, side = (1 << 30, 8192) if is_gpu(options) else (1 << 20, 64)
    block = torch.empty(size, dtype=torch.uint8, device=options.device)
    target = torch.empty_like(block)
    copy = timed(lambda: target.copy_(block), options.device)
    a, b = (torch.randn(side, side, device=options.device, dtype=torch.bfloat16) for _ in range(2))
    product = timed(lambda: a @ b, options.device)
    return {"copy_gb_s": 2 * block.nbytes / copy / 1e9, "bf16_tflop_s": 2 * side**3 / product / 1e12}


def linears(options: Options) -> Figures:
    """Our linear layers against cuBLAS with the same epilogue behind it: microseconds, and TFLOP/s of either."""
    found = {}
    for name, k, n, activation in layers(options):
        for rows in ROWS if is_gpu(options) else (70,):
            contenders = linear_contenders(rows, k, n, activation, options)
            work = 2.0 * rows * k * n
            seconds = {side: timed(call, options.device) for side, call in contenders.items()}
            found[f"{name}, {rows} rows"] = {f"{side}_us": 1e6 * s for side, s in seconds.items()} | {
                f"{side}_tflop_s": work / s / 1e12 for side, s in seconds.items()
            }
    return found


def tiles(options: Options) -> Figures:
    """Other tiles for each layer: microseconds, and whether a row has the bits that it has in the layer's own tile."""
    import torch

    from rtp_mm.ops import linear_triton
    from rtp_mm.ops.linear_triton import Tile

    candidates = [
        Tile(m, n, 64, stages, warps)
        for m, n, warps in ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 8), (128, 256, 8), (64, 256, 8))
        for stages in (3, 4)
    ]
    found: Figures = {}
    chosen = linear_triton.choose_tile
    for name, k, n, activation in layers(options):
        for rows in (256, 16384) if is_gpu(options) else (70,):
            figures: Figures = {}
            torch.manual_seed(0)
            call = linear_contenders(rows, k, n, activation, options)["ours"]
            expected = call().clone()
            for tma in (True, False) if is_gpu(options) else (False,):
                for tile in candidates if is_gpu(options) else candidates[:1]:
                    label = f"{tile.m}x{tile.n}, {tile.stages} stages{', TMA' if tma else ''}"
                    linear_triton.choose_tile = lambda *_, tile=tile, tma=tma: (tile, tma)  # type: ignore[assignment]
                    try:
                        torch.manual_seed(0)
                        call = linear_contenders(rows, k, n, activation, options)["ours"]
                        same = torch.equal(call(), expected)
                        figures[label] = {"us": 1e6 * timed(call, options.device, 5), "same_bits": same}
                    except Exception as error:  # noqa: BLE001 - too large a tile for this GPU is a finding
                        figures[label] = f"{type(error).__name__}: {str(error)[:80]}"
                    finally:
                        linear_triton.choose_tile = chosen
            found[f"{name}, {rows} rows"] = figures
    return found


def attention(options: Options) -> Figures:
    """Every backend that can run here: milliseconds of the trial that MM_ATTENTION=fastest makes."""
    import torch

    from rtp_mm.vit.attention import VARLEN_ATTENTION, is_usable, time_attention

    device, dtype = torch.device(options.device), dtype_of(options)
    usable = {n: backend for n, backend in VARLEN_ATTENTION.items() if is_usable(n, dtype, device)}
    return {f"{n}_ms": 1e3 * s for n, s in time_attention(usable, dtype, device, time.perf_counter).items()}


def pointwise(options: Options) -> Figures:
    """The pointwise kernels at 16384 rows of Qwen2.5-VL: microseconds and GB/s moved."""
    import torch

    from rtp_mm import ops

    rows, dim, heads, hidden = (16384, 1280, 16, 3424) if is_gpu(options) else (8, 64, 4, 176)
    dtype, width = dtype_of(options), dtype_of(options).itemsize
    with torch.device(options.device):
        x, delta, weight, bias = (
            torch.zeros(rows, dim),
            torch.zeros(rows, dim, dtype=dtype),
            torch.ones(dim),
            torch.zeros(dim),
        )
        qkv, turn = torch.zeros(rows, 3, heads, dim // heads, dtype=dtype), torch.zeros(rows, dim // heads // 2)
        gate_up = torch.zeros(rows, 2 * hidden, dtype=dtype)
    element = rows * dim
    cases: dict[str, tuple[Callable[[], object], float]] = {
        "rms_norm": (lambda: ops.add_norm(x, None, weight, None, 1e-6, dtype), element * (4 + width)),
        "add, rms_norm": (lambda: ops.add_norm(x, delta, weight, None, 1e-6, dtype), element * (8 + 2 * width)),
        "layer_norm": (lambda: ops.add_norm(x, None, weight, bias, 1e-6, dtype), element * (4 + width)),
        "rotate": (lambda: ops.rotate_qk_(qkv, turn, turn), element * 4 * width + rows * dim // heads * 4),
        "silu_gate": (lambda: ops.activate(gate_up, "silu_gate"), rows * hidden * 3 * width),
        "gelu": (lambda: ops.activate(gate_up, "gelu"), rows * hidden * 4 * width),
    }
    seconds = {name: timed(call, options.device) for name, (call, _) in cases.items()}
    return {name: {"us": 1e6 * s, "gb_s": cases[name][1] / s / 1e9} for name, s in seconds.items()}


def invariance(options: Options) -> Figures:
    """Images alone, and in random company at every edge of a graph's bucket: how many changed a bit."""
    import random

    import torch

    from rtp_mm.vit.graphs import SIZES

    edges = SIZES if is_gpu(options) else SIZES[:2]
    found = {}
    folder = checkpoint(options)
    for variant in ("ours", "ours, no graphs"):
        part = load_part(folder, options, VARIANTS[variant])
        shuffled = random.Random(0)
        images = [random_image(h, w) for h, w in ((2, 2), (2, 4), (2, 6), (10, 2), (14, 2), (8, 8), (12, 18))]
        alone = [part.mm_process(image)[0].clone() for image in images]
        changed = tried = 0
        for edge in edges:
            for patches in (edge - 4, edge, edge + 4):
                rest = patches - 8  # beside the images of 4 and 12 patches: a filler that makes up the edge
                batch, expected = [images[0], images[2]], [alone[0], alone[2]]
                if rest > 8:
                    batch.append(random_image(2, (rest - 8) // 2))
                order = shuffled.sample(range(len(batch)), len(batch))
                together = part.mm_process_batch([batch[i] for i in order], [], [])
                for place, i in enumerate(order):
                    if i < len(expected):
                        tried += 1
                        changed += not torch.equal(together[place][0], expected[i])
        for _ in range(50 if is_gpu(options) else 3):
            order = shuffled.sample(range(len(images)), shuffled.randint(2, len(images)))
            together = part.mm_process_batch([images[i] for i in order], [], [])
            tried += len(order)
            changed += sum(not torch.equal(e, alone[i]) for i, (e, _) in zip(order, together, strict=True))
        found[variant] = {"tried": tried, "changed": changed}
    return found


def tower(options: Options) -> Figures:
    """Ours, in several ways, against Hugging Face SDPA on the same weights, rounds in turns; errors against float32."""
    import torch

    from benchmarks.bench_tower import operations
    from rtp_mm.cli.hugging_face import HuggingFacePeer

    device = torch.device(options.device)
    folder = checkpoint(options)
    parts: dict[str, Any] = {}
    found: Figures = {}
    for variant, settings in VARIANTS.items():
        try:
            parts[variant] = load_part(folder, options, settings)
        except Exception as error:  # noqa: BLE001 - the others are measured still
            found[variant] = f"{type(error).__name__}: {error}"
    peer = HuggingFacePeer(folder, torch.bfloat16, device)
    exact = HuggingFacePeer(folder, torch.float32, device)
    for images, patches in BATCHES if is_gpu(options) else BATCHES[:1]:
        items, peer_inputs = random_batch(images, patches)
        values, grid = peer_inputs["pixel_values"].to(device), peer_inputs["image_grid_thw"].to(device)
        with torch.inference_mode():
            expected = exact.forward(peer_inputs).double()
        calls: dict[str, Callable[[], Any]] = {
            variant: partial(part.mm_process_batch, items, [], []) for variant, part in parts.items()
        }
        calls["Hugging Face"] = partial(peer_forward, peer.tower, values.to(torch.bfloat16), grid)
        figures: Figures = {}
        work = images * operations(parts["ours"].visual.config, *side_lengths(patches))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for name, call in calls.items():
            out = call()  # compiles, captures
            embedding = out if name == "Hugging Face" else torch.cat([e for e, _ in out])
            error = (embedding.cpu().double() - expected).norm() / expected.norm()
            figures[name] = {"error": float(error)}
        for _ in range(ROUNDS if is_gpu(options) else 2):
            for name, call in calls.items():
                seconds[name].append(timed(call, options.device, rounds=1))
        for name, times in seconds.items():
            figures[name] |= {"ms": 1e3 * median(times), "tflop_s": work / median(times) / 1e12}
        found[f"{images} x {patches} patches"] = figures
    return found


def peer_forward(tower: Any, values: Any, grid: Any) -> Any:
    import torch

    with torch.inference_mode():
        return tower(values, grid_thw=grid).pooler_output


def profile(options: Options) -> Figures:
    """The kernels that a full batch spends its time in, milliseconds each."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    gpu = is_gpu(options)
    folder = checkpoint(options)
    part = load_part(folder, options, {})
    items, _ = random_batch(*((16, 1024) if gpu else (1, 64)))
    part.mm_process_batch(items, [], [])
    with record(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as recorded:
        part.mm_process_batch(items, [], [])
        synchronize(options.device)
    attribute = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = sorted(recorded.key_averages(), key=lambda event: -getattr(event, attribute))
    return {event.key[:80]: getattr(event, attribute) / 1e3 for event in events[:PROFILED_KERNELS]}


def service(options: Options) -> Figures:
    """The server on this device: seconds to start, then distinct images from several callers at once."""
    import io

    import numpy as np
    from PIL import Image

    sys.path.insert(0, str(ROOT / "tests"))
    from running_server import running_server

    from rtp_mm.server.client import RemoteEngine
    from rtp_mm.types import MMUrlType

    count, callers, side = (256, 16, 896) if is_gpu(options) else (4, 2, 56)
    with tempfile.TemporaryDirectory() as images:
        urls = []
        for i in range(count):
            file = io.BytesIO()
            noise = np.random.default_rng(i).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
            Image.fromarray(noise).resize((side, side)).save(file, "JPEG")
            path = Path(images) / f"{i}.jpg"
            path.write_bytes(file.getvalue())
            urls.append(str(path))
        started = time.perf_counter()
        with running_server(checkpoint(options), device=options.device, act_type="bf16") as server:
            start_s = time.perf_counter() - started
            engine = RemoteEngine(server.address)

            def call(url: str) -> float:
                began = time.perf_counter()
                engine.submit([url], [MMUrlType.IMAGE])
                return time.perf_counter() - began

            call(urls[0])
            with ThreadPoolExecutor(callers) as pool:
                began = time.perf_counter()
                latencies = sorted(pool.map(call, urls[1:]))
                elapsed = time.perf_counter() - began
            engine.close()
            status = server.terminate()
    return {
        "start_s": start_s,
        "images_per_s": len(latencies) / elapsed,
        "p50_ms": 1e3 * median(latencies),
        "p99_ms": 1e3 * latencies[int(0.99 * (len(latencies) - 1))],
        "exit_status": status,
    }


STEPS: dict[str, Callable[[Options], Figures]] = {
    step.__name__: step
    for step in (
        *(build, tests, peaks, attention, pointwise, linears, tower, invariance),
        *(service, profile, tiles, sanitizer),
    )
}


def is_gpu(options: Options) -> bool:
    return not options.device.startswith("cpu")


def need_cuda(options: Options) -> None:
    if not is_gpu(options):
        raise Unavailable(f"needs a GPU, and the device is {options.device}")


def dtype_of(options: Options) -> Any:
    """Triton's interpreter multiplies float32 rightly, bf16 not."""
    import torch

    return torch.bfloat16 if is_gpu(options) else torch.float32


def layers(options: Options) -> Sequence[tuple[str, int, int, str]]:
    from rtp_mm import ops

    if is_gpu(options):
        return LAYERS
    import torch

    if not ops.uses_triton(torch.device("cpu")):
        raise Unavailable("needs TRITON_INTERPRET=1 on a CPU")
    return [(name, 64, 96, activation) for name, _, _, activation in LAYERS]


def linear_contenders(rows: int, k: int, n: int, activation: str, options: Options) -> dict[str, Callable[[], Any]]:
    """Calls of a layer by ours and by cuBLAS; "add": to a float32 residual, which cuBLAS leaves to the next norm."""
    import torch

    from rtp_mm.vit.linear import CublasGemm, FixedGemm

    with torch.device(options.device):
        x = torch.randn(rows, k).to(dtype_of(options))
        weight, bias = (torch.randn(n, k) * k**-0.5).to(dtype_of(options)), torch.randn(n)
        residual = torch.zeros(rows, n)
    if activation == "add":
        fixed, library = FixedGemm(weight, bias, "none"), CublasGemm(weight, bias, "none")
        x = torch.nn.functional.pad(x, (0, -k % 16))
        library_x = x[:, :k].contiguous()
        return {
            "ours": lambda: (fixed.add_to(residual, x), residual)[1],
            "cublas": lambda: library.add_to(residual, library_x),
        }
    fixed, library = FixedGemm(weight, bias, activation), CublasGemm(weight, bias, activation)
    return {"ours": lambda: fixed(x), "cublas": lambda: library(x)}


def run(*command: str, **environment: str) -> str:
    """The output of a command; raises with the end of it where the command failed or took too long."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{' '.join(command)}: not done after {LIMIT_S} s\n{str(error.stdout)[-2000:]}") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout[-3000:]}")
    return done.stdout


def end_of(*command: str, **environment: str) -> str:
    """The last line of a command's output, or how it failed: the commands after it still run."""
    try:
        return run(*command, **environment).strip().splitlines()[-1]
    except RuntimeError as error:
        return f"FAILED: {error}"


def checkpoint(options: Options) -> Path:
    """A folder with random weights of Qwen2.5-VL, written by the first step that needs it."""
    from rtp_mm.models.random_checkpoint import write_checkpoint

    path: Path = options.folder / "checkpoint"
    if not (path / "config.json").exists():
        write_checkpoint(path, "qwen2_5_vl", options.size)
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
