"""Every CUDA and Triton kernel once or twice, with tails in every direction, against the host: little enough for
compute-sanitizer, which makes kernels many times slower. Inputs are made and outputs compared on the host, so that
hardly a kernel runs that is not ours.

    compute-sanitizer --tool memcheck python tests/kernels_once.py
    TRITON_INTERPRET=1 python tests/kernels_once.py          the Triton ones, in the interpreter
"""

from __future__ import annotations

import os
from dataclasses import fields

import reference
import torch
from torch import Tensor

from rtp_mm import ops

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if IS_INTERPRETED else "cuda")
HALF = torch.float16 if IS_INTERPRETED else torch.bfloat16  # the interpreter multiplies bf16 wrongly
torch.manual_seed(0)


def there(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE) for tensor in tensors]


def check(name: str, ours: Tensor, exact: Tensor, limit: float) -> None:
    found = float((ours.cpu().double() - exact).norm() / exact.norm())
    assert found <= limit, f"{name}: {found:.1e}, over {limit:.1e}"
    print(f"{name}: {found:.1e}")


def positions() -> None:
    angles = torch.randn(2, 64, 10)
    grids = [(1, 2, 2), (3, 8, 16), (1, 10, 14), (1, 2, 40)]
    for window in (0, 4):
        ours = ops.vision_positions(grids, 2, window, angles.cuda())
        expected = ops.vision_positions(grids, 2, window, angles)
        for field in fields(ours):
            value = getattr(ours, field.name)
            if isinstance(value, Tensor):
                assert torch.equal(value.cpu(), getattr(expected, field.name)), field.name


def resize() -> None:
    frames = torch.randint(0, 256, (2, 61, 83, 4), dtype=torch.uint8)
    views = ((t[..., :3], t[:, 1:-2, 2:, :3]) for t in (frames, frames.cuda()))
    for view, on_device in zip(*views, strict=True):
        for size, temporal in (((56, 84), 1), ((28, 140), 2)):
            for order in ("horizontal", "vertical"):
                ours, expected = (
                    ops.resize_patchify(f, *size, 14, 2, order=order, temporal_patch_size=temporal)
                    for f in (on_device, view)
                )
                assert torch.equal(ours.cpu(), expected)


def patch_embed() -> None:
    for n, k, d, dtype in ((132, 588, 70, HALF), (64, 1176, 128, torch.float16), (40, 147, 33, torch.float32)):
        rows = torch.randint(0, 256, (n, k), dtype=torch.uint8)
        weight, bias, pos = (torch.randn(2, d, k) / k).to(dtype), torch.randn(d), torch.randn(n, d)
        order = torch.randperm(n // 4).int()
        exact = reference.patch_embed(rows, weight, bias, order=order, pos=pos)
        on_device = there(rows, weight, bias, order, pos)
        for out_dtype in (torch.float32, HALF):
            ours = ops.patch_embed(*on_device[:3], order=on_device[3], pos=on_device[4], dtype=out_dtype)
            check(f"patch_embed {k} {dtype}", ours, exact, 1e-4 + torch.finfo(out_dtype).eps / 2)


def pointwise() -> None:
    for dim in (80, 1280):
        x, delta, weight, bias = torch.randn(7, dim), torch.randn(7, dim), torch.randn(dim), torch.randn(dim)
        for shift in (None, bias):
            exact = reference.norm(x + delta, weight, shift, 1e-6)
            stream, added, scale = there(x, delta, weight)
            ours = ops.add_norm(stream, added, scale, None if shift is None else shift.to(DEVICE), 1e-6, torch.float32)
            check(f"add_norm {dim}", ours, exact, 1e-6)
    qkv, angle = torch.randn(5, 3, 3, 72), torch.randn(5, 36)
    cos, sin = angle.cos(), angle.sin()
    exact = reference.rotated_qk(qkv, cos, sin)  # before they are turned in place
    check("rotate_qk", ops.rotate_qk_(*there(qkv, cos, sin)), exact, 1e-6)
    x = torch.randn(9, 2 * 172)
    for activation in ops.ACTIVATIONS[1:]:
        exact = reference.activated(x, activation)
        check(activation, ops.activate(*there(x), activation), exact, 1e-6)


def linear() -> None:
    """By copies of tiles where rows are wide enough, and without; a tile cut off in every direction."""
    for m, k, n, dtype in ((131, 72, 260, torch.float32), (70, 1280, 344, HALF), (3, 3420, 172, HALF)):
        x, weight, bias = torch.randn(m, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n)
        limit = 1e-4 + torch.finfo(dtype).eps / 2
        for activation in ("none", "gelu", "silu_gate"):
            packed = ops.pack_fixed_linear(*there(weight, bias), activation)
            exact = reference.packed_linear(x, weight, bias, activation)
            ours = ops.fixed_linear(x.to(DEVICE), *packed, activation)[:, : exact.shape[1]]
            check(f"{activation} {m}x{k}x{n} {dtype}", ours, exact, limit)
        packed = ops.pack_fixed_linear(*there(weight, bias), "none")
        residual = torch.randn(m, n)
        exact = residual + reference.packed_linear(x, weight, bias, "none")
        check(f"add {m}x{k}x{n}", ops.fixed_linear_add_(*there(residual, x), *packed), exact, 1e-4)


def quantized() -> None:
    x, weight, bias = torch.randn(70, 300).to(HALF), torch.randn(172, 300).to(HALF), torch.randn(172)
    rows, scale = ops.quantize_rows(x.to(DEVICE))
    # A rounding to three bits; the interpreter cuts.
    check("quantize_rows", rows[:, :300].float() * scale[:, None], x.double(), 0.07 if IS_INTERPRETED else 0.03)
    if not IS_INTERPRETED:
        packed, padded = ops.pack_fixed_linear(*there(weight, bias), "none")
        columns, scales = ops.quantize_rows(packed)
        ours = ops.fixed_linear(rows, columns, padded, scales=(scale, scales), dtype=HALF)
        check("e4m3", ours[:, :172], reference.packed_linear(x, weight, bias, "none"), 0.05)


for kernels in (pointwise, linear, quantized) if IS_INTERPRETED else (
    positions, resize, patch_embed, pointwise, linear, quantized,
):  # fmt: skip
    kernels()
if not IS_INTERPRETED:
    torch.cuda.synchronize()
print("all kernels hold")
