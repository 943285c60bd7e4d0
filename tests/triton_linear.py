"""Run by test_ops_triton.py: linear layers against their twin, and a row's bits, interpreted or on a GPU."""

from __future__ import annotations

import os

import reference
import torch
from torch import Tensor

from rtp_mm import ops

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
torch.set_default_device("cpu" if IS_INTERPRETED else "cuda")
torch.manual_seed(0)
# The interpreter multiplies bf16 and e4m3 wrongly when an operand is transposed.
DTYPES = (torch.float32, torch.float16) if IS_INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)
# M, K, N: one row, a tile cut in every direction, several tiles a program, widths that no 16 divides
SHAPES = [(1, 32, 64), (131, 72, 260), (70, 180, 172)]
if not IS_INTERPRETED:
    SHAPES += [(256, 1280, 3840), (1000, 3420, 1280), (4111, 1280, 6840)]


def random(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(m, k).to(dtype), (torch.randn(n, k) * k**-0.5).to(dtype), torch.randn(n)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


wrong: list[str] = []  # what does not hold: told at the end, all of it


def check(name: str, ours: Tensor, exact: Tensor, depth: int) -> None:
    """One rounding of its dtype: sums are float32, over `depth` products. Columns past the twin's are zeros.

    Tensor cores add 16 products at a time and cut off what float32 cannot hold: half a last bit each time, and all of
    it to one side.
    """
    columns = exact.shape[1]
    limit = 3e-7 + depth / 16 * 2.0**-24 if ours.dtype == torch.float32 else torch.finfo(ours.dtype).eps / 2
    if not (found := error(ours[:, :columns], exact)) < limit:
        wrong.append(f"{name}: {found:.1e}, over {limit:.1e}")
    if ours[:, columns:].any():
        wrong.append(f"{name}: columns past the end must be zeros, the next layer reads them")


for shape in SHAPES:
    for dtype in DTYPES:
        x, weight, bias = random(*shape, dtype)
        for activation in ops.ACTIVATIONS:
            packed = ops.pack_fixed_linear(weight, bias, activation)
            exact = reference.packed_linear(x, weight, bias, activation)
            check(f"{activation} {shape} {dtype}", ops.fixed_linear(x, *packed, activation), exact, shape[1])
        packed = ops.pack_fixed_linear(weight, bias, "none")
        residual = torch.randn(shape[0], shape[2])
        product = reference.packed_linear(x, weight, bias, "none")
        check(f"add {shape} {dtype}", ops.fixed_linear_add_(residual.clone(), x, *packed), residual + product, shape[1])
        other = ops.fixed_linear(x, packed[0], packed[1] * 1.01, "none")
        assert error(other, product) > 1e-3, "a wrong bias passed"

# A layer with an activation feeds the next one its padding.
x, weight, bias = random(5, 48, 172, torch.float32)
hidden = ops.fixed_linear(x, *ops.pack_fixed_linear(weight, bias, "gelu"), "gelu")
assert hidden.shape[1] == 176
_, weight2, bias2 = random(1, 172, 48, torch.float32)
out = ops.fixed_linear(hidden, *ops.pack_fixed_linear(weight2, bias2, "none"))
check("two layers", out, reference.packed_linear(hidden[:, :172], weight2, bias2, "none"), 172)

# A row's bits: alone, in any company, at any place.
k, n = (96, 160) if IS_INTERPRETED else (3420, 1280)
for dtype in DTYPES:
    for activation in ("none", "silu_gate"):
        x, weight, bias = random(200 if IS_INTERPRETED else 5000, k, n, dtype)
        packed = ops.pack_fixed_linear(weight, bias, activation)
        whole = ops.fixed_linear(x, *packed, activation)
        for start, rows in ((0, 1), (17, 1), (63, 2), (64, 5), (1, 64), (50, 129)):
            part = ops.fixed_linear(x[start : start + rows].clone(), *packed, activation)
            if not torch.equal(part, whole[start : start + rows]):
                wrong.append(f"{dtype} {activation}: other bits in {rows} rows from {start} on")

rows, scale = ops.quantize_rows(torch.randn(5, 300) * torch.tensor([[1e-6], [1.0], [1e6], [0.0], [3.0]]))
values = rows[:, :300].float()
assert not rows[:, 300:].float().any()
assert torch.equal(values.abs().amax(1), torch.tensor([448.0, 448.0, 448.0, 0.0, 448.0]))
assert scale[3] == 1
if not IS_INTERPRETED:
    for shape in SHAPES:
        x, weight, bias = random(*shape, torch.bfloat16)
        packed, padded_bias = ops.pack_fixed_linear(weight, bias, "none")
        (qx, sx), (qw, sw) = ops.quantize_rows(x), ops.quantize_rows(packed)
        exact = (qx.double() * sx.double()[:, None]) @ (qw.double() * sw.double()[:, None]).T + bias.double()
        ours = ops.fixed_linear(qx, qw, padded_bias, scales=(sx, sw), dtype=torch.bfloat16)
        check(f"e4m3 {shape}", ours, exact, shape[1])
assert not wrong, "\n".join(wrong)
print("all linear layers hold")
