"""Run by test_ops_triton.py: pointwise kernels against float64, beside plain PyTorch, interpreted or on a GPU."""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rtp_mm.ops import activate, add_norm, rotate_qk_

EPS = 1e-6
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
torch.set_default_device("cpu" if IS_INTERPRETED else "cuda")
torch.manual_seed(0)


def check(name: str, kernel: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain PyTorch in the same dtype, or one rounding of that dtype.

    The interpreter cuts to bf16 where a GPU rounds, which doubles that dtype's error.
    """
    scale = exact.norm()
    factor = 4 if IS_INTERPRETED and kernel.dtype == torch.bfloat16 else 2
    ours, theirs = ((t.double() - exact).norm() / scale for t in (kernel, plain))
    assert kernel.dtype == plain.dtype
    assert ours <= max(factor * theirs, torch.finfo(kernel.dtype).eps / 4), f"{name}: {ours:.2e}, PyTorch {theirs:.2e}"


def must_fail(name: str, compare: Callable[[], None]) -> None:
    try:
        compare()
    except AssertionError:
        return
    raise AssertionError(f"{name}: a wrong variant passed")


for dim in (64, 80, 1280):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, weight, bias = torch.randn(7, dim) * 3 + 1, torch.randn(dim), torch.randn(dim)
        delta = torch.randn(7, dim).to(dtype)
        summed = x + delta.float()
        rms = F.rms_norm(summed.double(), (dim,), weight.double(), EPS)
        for has_delta, total in ((True, summed), (False, x)):
            stream = x.clone()
            out = add_norm(stream, delta if has_delta else None, weight, None, EPS, dtype)
            assert torch.equal(stream, total)
            exact = F.rms_norm(total.double(), (dim,), weight.double(), EPS)
            check("rms_norm", out, F.rms_norm(total, (dim,), weight, EPS).to(dtype), exact)
            out = add_norm(x.clone(), delta if has_delta else None, weight, bias, EPS, dtype)
            exact = F.layer_norm(total.double(), (dim,), weight.double(), bias.double(), EPS)
            check("layer_norm", out, F.layer_norm(total, (dim,), weight, bias, EPS).to(dtype), exact)
        wrong = add_norm(x.clone(), None, weight, None, EPS, dtype)
        must_fail("rms_norm", lambda w=wrong, e=rms: check("", w, e.to(w.dtype), e))  # type: ignore[misc]

for heads, head_dim in ((4, 16), (16, 80), (3, 72)):
    for dtype in (torch.float32, torch.bfloat16):
        qkv = torch.randn(5, 3, heads, head_dim).to(dtype)
        angles = torch.randn(5, head_dim // 2)
        cos, sin = angles.cos(), angles.sin()

        def rotated(t: Tensor, wide: torch.dtype, c: Tensor = cos, s: Tensor = sin) -> Tensor:
            first, second = t.to(wide).chunk(2, -1)
            c, s = c[:, None].to(wide), s[:, None].to(wide)
            return torch.cat((first * c - second * s, second * c + first * s), -1)

        out = rotate_qk_(qkv.clone(), cos, sin)
        for i in (0, 1):
            check("rotate", out[:, i], rotated(qkv[:, i], torch.float32).to(dtype), rotated(qkv[:, i], torch.double))
        assert torch.equal(out[:, 2], qkv[:, 2]), "values must not turn"

for width in (172, 3420):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        gate_up = torch.randn(3, 2 * width).to(dtype)
        gate, up = gate_up.chunk(2, -1)
        exact = F.silu(gate.double()) * up.double()
        check("silu_gate", activate(gate_up, "silu_gate"), (F.silu(gate.float()) * up.float()).to(dtype), exact)
        must_fail("silu_gate", lambda g=gate, u=up, e=exact: check("", (F.silu(u) * g), (F.silu(g) * u), e))  # type: ignore[misc]

for activation, twin in (("gelu", F.gelu), ("quick_gelu", lambda t: t * torch.sigmoid(1.702 * t))):
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(3, 700).to(dtype)
        exact = twin(x.double())
        check(activation, activate(x.clone(), activation), twin(x.float()).to(dtype), exact)
        other = "quick_gelu" if activation == "gelu" else "gelu"
        must_fail(activation, lambda x=x, o=other, e=exact: check("", activate(x.clone(), o), e.to(x.dtype), e))  # type: ignore[misc]

rows = torch.randn(9, 1280)
alone = add_norm(rows[4:5].clone(), None, torch.ones(1280), None, EPS, torch.bfloat16)
together = add_norm(rows.clone(), None, torch.ones(1280), None, EPS, torch.bfloat16)
assert torch.equal(alone[0], together[4]), "a row's bits depend on its neighbours"
print("all kernels hold")
