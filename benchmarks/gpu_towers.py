"""Steps of `gpu_session` that measure the tower and the service whole."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_common import (
    FAILED,
    ROOT,
    ROUNDS,
    VARIANTS,
    Figures,
    Options,
    attempt,
    checkpoint,
    failure,
    is_gpu,
    load_part,
    random_batch,
    side_lengths,
    synchronize,
    timed,
)
from benchmarks.gpu_kernels import peaks

PEER, PEER_FLASH = "Hugging Face", "Hugging Face, flash-attn"
NEED_GPU = {"mm_quantization", "mm_torch_compile"}  # on a CPU there are no fp8 kernels, and no trace of an interpreter
PROFILED_KERNELS = 20
# More error than this, relative to float32, and a tower answers wrongly: of bf16 Hugging Face's own and a tenth, as
# everywhere; of fp8, and where Hugging Face failed, what no rounding explains.
BF16_ERROR_RATIO, MOST_ERROR = 1.1, 0.1
START_LIMIT_S = 240  # of a server whose kernels nobody has compiled yet
# Images in a forward, patches of each: one small image, one of a megapixel, full batches, one of the largest.
BATCHES = ((1, 64), (1, 256), (1, 1024), (4, 1024), (16, 1024), (1, 4096), (1, 16384))


def tower(options: Options) -> Figures:
    """Ours, in several ways, against Hugging Face on the same weights, with SDPA and flash-attn, rounds in turns;
    errors against float32, rates also as parts of what a large bf16 product reaches (`peaks`).
    """
    import torch

    from rtp_mm.cli.hugging_face import HuggingFacePeer

    folder = checkpoint(options)
    parts: dict[str, Any] = {}
    for variant, settings in VARIANTS.items():
        if NEED_GPU & settings.keys() and not is_gpu(options):
            yield variant, {"not here": "needs a GPU"}
            continue
        try:
            parts[variant] = load_part(folder, options, settings)
        except Exception as error:  # noqa: BLE001 - the others are measured still
            yield variant, failure(error)
    if not parts:
        return
    device = torch.device(options.device)
    peers = {PEER: HuggingFacePeer(folder, torch.bfloat16, device).tower}
    if is_gpu(options) and importlib.util.find_spec("flash_attn"):
        try:
            flash = HuggingFacePeer(folder, torch.bfloat16, device).tower
            flash.set_attn_implementation("flash_attention_2")
            peers[PEER_FLASH] = flash
        except Exception as error:  # noqa: BLE001 - the others are measured still
            yield PEER_FLASH, failure(error)
    else:
        yield PEER_FLASH, {"not here": "needs a GPU and flash-attn"}
    exact = HuggingFacePeer(folder, torch.float32, device)
    peak = dict(peaks(options))["bf16_tflop_s"]
    for images, patches in BATCHES if is_gpu(options) else BATCHES[:1]:
        figures = attempt(partial(batch_figures, parts, peers, exact, peak, images, patches, options))
        yield f"{images} x {patches} patches", figures


def batch_figures(
    parts: dict[str, Any], peers: dict[str, Any], exact: Any, peak: float, images: int, patches: int, options: Options
) -> dict[str, Any]:
    """One batch through each; what fails at its first call, which compiles and captures, or later is left out then."""
    import torch

    from benchmarks.bench_tower import operations

    items, peer_inputs = random_batch(images, patches)
    values, grid = (peer_inputs[name].to(options.device) for name in ("pixel_values", "image_grid_thw"))
    with torch.inference_mode():
        expected = exact.forward(peer_inputs).double()
    calls: dict[str, Callable[[], Any]] = {
        variant: partial(part.mm_process_batch, items, [], []) for variant, part in parts.items()
    }
    calls |= {name: partial(peer_forward, peer, values.to(torch.bfloat16), grid) for name, peer in peers.items()}
    figures: dict[str, Any] = {
        name: attempt(lambda call=call: {"error": relative_error(call(), expected)}) for name, call in calls.items()
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(ROUNDS if is_gpu(options) else 2):
        for name in [name for name in calls if FAILED not in figures[name]]:
            try:
                seconds[name].append(timed(calls[name], options.device, rounds=1))
            except Exception as error:  # noqa: BLE001 - the others are measured still
                figures[name] |= failure(error)
    work = images * operations(next(iter(parts.values())).tower.config, *side_lengths(patches))
    for name in [name for name in calls if FAILED not in figures[name]]:
        rate = work / median(seconds[name]) / 1e12
        figures[name] |= {"ms": 1e3 * median(seconds[name]), "tflop_s": rate, "of_peak": rate / peak}
    judge(figures)
    return figures


def judge(figures: dict[str, Any]) -> None:
    """Makes a failure of each of our towers that is less exact than it must be."""
    peer = figures[PEER].get("error", MOST_ERROR)
    for name, found in figures.items():
        if name.startswith(PEER):
            continue
        limit = MOST_ERROR if name.endswith("fp8") else BF16_ERROR_RATIO * peer
        if found.get("error", 0) > limit:
            found[FAILED] = f"an error of {found['error']:.1e}, over {limit:.1e}"


def relative_error(out: Any, expected: Any) -> float:
    """Of a tower's answer. Raises where it is no number, which any comparison would let pass."""
    import torch

    embedding = out if isinstance(out, torch.Tensor) else torch.cat([embedding for embedding, _ in out])
    error = float((embedding.cpu().double() - expected).norm() / expected.norm())
    if not math.isfinite(error):
        raise ArithmeticError(f"the error is {error}")
    return error


def peer_forward(tower: Any, values: Any, grid: Any) -> Any:
    import torch

    with torch.inference_mode():
        return tower(values, grid_thw=grid).pooler_output


def profile(options: Options) -> Figures:
    """The kernels that a full batch spends its time in, ours and Hugging Face's: milliseconds and calls each, those of
    one name apart by their grid, which tells the layers apart; all of them together, and the time between them.
    """
    import torch

    from rtp_mm.cli.hugging_face import HuggingFacePeer

    folder = checkpoint(options)
    items, peer_inputs = random_batch(*((16, 1024) if is_gpu(options) else (1, 64)))
    values, grid = (peer_inputs[name].to(options.device) for name in ("pixel_values", "image_grid_thw"))
    part, peer = load_part(folder, options, {}), HuggingFacePeer(folder, torch.bfloat16, torch.device(options.device))
    calls: dict[str, Callable[[], Any]] = {
        "ours": partial(part.mm_process_batch, items, [], []),
        PEER: partial(peer_forward, peer.tower, values.to(torch.bfloat16), grid),
    }
    for name, call in calls.items():
        yield name, attempt(partial(kernels, call, options))


def kernels(call: Callable[[], Any], options: Options) -> dict[str, Any]:
    """Of one call, after another one, from the trace that torch's profiler writes."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    call()
    synchronize(options.device)
    activity, category = (ProfilerActivity.CUDA, "kernel") if is_gpu(options) else (ProfilerActivity.CPU, "cpu_op")
    with record(activities=[activity]) as recorded:
        call()
        synchronize(options.device)
    with tempfile.TemporaryDirectory() as folder:
        recorded.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    found = [event for event in events if event.get("cat") == category]
    if not found:
        raise RuntimeError(f"the profiler saw no event of category {category}")
    spent: dict[str, list[float]] = {}
    for event in found:
        where = event["args"].get("grid", "")
        spent.setdefault(f"{event['name'][:80]} {where}".strip(), []).append(event["dur"] / 1e3)
    span = max(event["ts"] + event["dur"] for event in found) - min(event["ts"] for event in found)
    total = sum(map(sum, spent.values()))
    figures: dict[str, Any] = {"ms": span / 1e3, "kernels_ms": total, "between_ms": span / 1e3 - total}
    most = sorted(spent.items(), key=lambda item: -sum(item[1]))[:PROFILED_KERNELS]
    return figures | {name: {"ms": sum(times), "calls": len(times)} for name, times in most}


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
        # Of Triton's interpreter a server knows nothing: on a CPU it runs as it does there.
        settings = {"device": options.device, "act_type": "bf16", "triton_interpret": "0"}
        with running_server(checkpoint(options), start_limit_s=START_LIMIT_S, **settings) as server:
            yield "start_s", time.perf_counter() - started
            engine = RemoteEngine(server.address)

            def call(url: str) -> float:
                began = time.perf_counter()
                engine.submit([url], [MMUrlType.IMAGE])
                return time.perf_counter() - began

            with ThreadPoolExecutor(callers) as pool:
                for _ in pool.map(call, urls[: count // 4]):  # first batches of every size compile and allocate
                    pass
                began = time.perf_counter()
                latencies = sorted(pool.map(call, urls[count // 4 :]))
                elapsed = time.perf_counter() - began
            engine.close()
            yield "images_per_s", len(latencies) / elapsed
            yield "p50_ms", 1e3 * median(latencies)
            yield "p99_ms", 1e3 * latencies[int(0.99 * (len(latencies) - 1))]
            status = server.terminate()
            yield "exit_status", {FAILED: f"status {status} after SIGTERM"} if status else status
