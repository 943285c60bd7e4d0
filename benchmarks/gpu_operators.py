"""The step of `gpu_session` that measures the operators of CUDA C++, against what the device can do at best."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple
from functools import partial
from typing import Any

from benchmarks.gpu_common import Figures, Options, attempt, dtype_of, is_gpu, kernel_seconds
from benchmarks.gpu_kernels import peaks

PATCH, MERGE, WINDOW, HEAD_DIM = 14, 2, 4, 80  # of Qwen2.5-VL
# Frames, their size (width, height), what they become, temporal patch size.
RESIZES = (
    (1, (1024, 768), (1036, 756), 1),
    (1, (3840, 2160), (3836, 2156), 1),
    (1, (3840, 2160), (1316, 728), 1),
    (16, (1920, 1080), (644, 364), 2),
)
PATCH_ROWS = (256, 1024, 16384)
BATCHES = ((1, 1024), (16, 1024), (1, 16384))  # images, patches of each

Work = dict[str, float]  # of one call, in what `peaks` measures a second of: {"gb": ...}, {"tflop": ...}


def operators(options: Options) -> Figures:
    """resize_patchify, patch_embed and vision_positions: microseconds, GB/s of what must be read and written, TFLOP/s,
    and parts of the peaks, which are measured first. What an operator copies up, tables or grids, counts in its time.
    """
    best = dict(peaks(options))
    roofs = {"gb": best["copy_gb_s"], "tflop": best["bf16_tflop_s"]}

    def figures(make: Callable[[], tuple[Callable[[], Any], Work]], *, copies_up: bool) -> dict[str, float]:
        call, work = make()
        seconds = kernel_seconds(call, options, copies_up=copies_up)
        found = {"us": 1e6 * seconds}
        for unit, amount in work.items():
            rate = amount / seconds
            found |= {f"{unit}_s": rate, f"{unit}_s_of_peak": rate / roofs[unit]}
        return found

    for frames, size, new_size, temporal in RESIZES if is_gpu(options) else [(2, (64, 48), (56, 28), 2)]:
        name = f"resize_patchify, {frames} x {'x'.join(map(str, size))} to {'x'.join(map(str, new_size))}"
        make = partial(resize, frames, size, new_size, temporal, options)
        yield name, attempt(partial(figures, make, copies_up=True))
    for kind, temporal in (("still", 1), ("clip", 2)):
        for rows in PATCH_ROWS if is_gpu(options) else (64,):
            for side, embed in (("ours", ours_embed), ("torch bf16", torch_embed)):
                make = partial(embed, rows, temporal, options)
                yield f"patch_embed, {kind}, {rows} rows, {side}", attempt(partial(figures, make, copies_up=False))
    for images, patches in BATCHES if is_gpu(options) else [(2, 64)]:
        make = partial(positions, images, patches, options)
        yield f"vision_positions, {images} x {patches}", attempt(partial(figures, make, copies_up=True))


def resize(
    frames: int, size: tuple[int, int], new_size: tuple[int, int], temporal: int, options: Options
) -> tuple[Callable[[], Any], Work]:
    import torch

    from rtp_mm import ops

    (width, height), (new_width, new_height) = size, new_size
    pixels = torch.randint(0, 256, (frames, height, width, 3), dtype=torch.uint8, device=options.device)
    moved = pixels.nbytes + 3 * frames * new_width * new_height

    def call() -> Any:
        return ops.resize_patchify(pixels, new_height, new_width, PATCH, MERGE, temporal_patch_size=temporal)

    return call, {"gb": moved / 1e9}


def ours_embed(rows: int, temporal: int, options: Options) -> tuple[Callable[[], Any], Work]:
    """In window order, from bytes; on CUDA the weight has two terms of bf16, and both are multiplied."""
    import torch

    from rtp_mm import ops

    width, k, terms = 1280 if is_gpu(options) else 64, 3 * temporal * PATCH**2, 2 if is_gpu(options) else 1
    with torch.device(options.device):
        pixels, bias = torch.randint(0, 256, (rows, k), dtype=torch.uint8), torch.randn(width)
        order = torch.randperm(rows // MERGE**2).int()
        # Its columns start at multiples of 16 bytes, as a tower's do.
        weight = torch.randn(terms, width, k + -k % 8).to(dtype_of(options))[..., :k]
    work = {
        "gb": (pixels.nbytes + terms * width * k * weight.itemsize + rows * width * 4) / 1e9,
        "tflop": 2.0 * terms * rows * k * width / 1e12,
    }
    if is_gpu(options):
        return lambda: ops.patch_embed(pixels, weight, bias, order=order, dtype=torch.float32), work
    packed = ops.pack_linear(weight[0].contiguous())
    return lambda: ops.packed_patch_embed([pixels], packed, bias, order=order), work


def torch_embed(rows: int, temporal: int, options: Options) -> tuple[Callable[[], Any], Work]:
    """The product alone, from what Hugging Face's processor gives: bf16, in which a still image stands twice."""
    import torch

    width, k = 1280 if is_gpu(options) else 64, 3 * 2 * PATCH**2
    with torch.device(options.device):
        pixels, weight = torch.randn(rows, k).bfloat16(), torch.randn(width, k).bfloat16()
    moved = 2 * (pixels.numel() + weight.numel() + rows * width)
    return lambda: pixels @ weight.T, {"gb": moved / 1e9, "tflop": 2.0 * rows * k * width / 1e12}


def positions(images: int, patches: int, options: Options) -> tuple[Callable[[], Any], Work]:
    """Of a batch, with its rotary tables."""
    import torch

    from rtp_mm import ops
    from rtp_mm.vit.rope import RotaryAngles

    side = int(patches**0.5)
    angles = RotaryAngles(HEAD_DIM, torch.device(options.device)).up_to(side)

    def call() -> Any:
        return ops.vision_positions([(1, side, side)] * images, MERGE, WINDOW, angles)

    return call, {"gb": sum(t.nbytes for t in astuple(call()) if isinstance(t, torch.Tensor)) / 1e9}
