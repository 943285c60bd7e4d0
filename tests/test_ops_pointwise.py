"""`ops.add_norm`, `ops.rotate_qk_` and `ops.activate` on a CPU against float64, plain PyTorch and themselves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import reference
import torch
from torch import Tensor
from torch.nn import functional as F
from torch_threads import torch_threads

from rtp_mm import ops

EPS = 1e-6
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu_gate": lambda x: F.silu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


@pytest.fixture(params=[False, True], ids=["rms", "layer"])
def is_layer_norm(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def random_rows(n: int, dim: int, is_layer_norm: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of very different size, weight, and bias."""
    generator = torch.Generator().manual_seed(n + dim)
    rows, weight, bias = (torch.randn(shape, generator=generator) for shape in ((n, dim), (dim,), (dim,)))
    return rows * torch.logspace(-4, 6, n)[:, None], weight, bias if is_layer_norm else None


def random_qkv(rows: int, heads: int, dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows * heads + dim)
    angles = torch.randn(rows, dim // 2, generator=generator) * 3
    return torch.randn(rows, 3, heads, dim, generator=generator).to(dtype), angles.cos(), angles.sin()


def plain_norm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (
        F.rms_norm(x, weight.shape, weight, EPS) if bias is None else F.layer_norm(x, weight.shape, weight, bias, EPS)
    )


def check_rows(ours: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The error of every row is at most twice that of plain PyTorch; a single number may be lucky."""
    assert ours.dtype == plain.dtype
    floor = exact.flatten(1).norm(dim=1) * torch.finfo(torch.float32).eps
    errors = ((t.double() - exact).flatten(1).norm(dim=1) for t in (ours, plain))
    assert bool((next(errors) <= 2 * next(errors) + floor).all())


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("n", "dim"), [(40, 1280), (7, 83), (3, 16), (1, 1), (0, 8)])
@pytest.mark.parametrize("delta_dtype", [None, torch.float32, torch.bfloat16], ids=["alone", "float32", "bfloat16"])
def test_the_norm_of_every_row_is_as_exact_as_plain_pytorch(
    n: int, dim: int, delta_dtype: torch.dtype | None, dtype: torch.dtype, is_layer_norm: bool
) -> None:
    x, weight, bias = random_rows(n, dim, is_layer_norm)
    delta = None if delta_dtype is None else x.flip(1).to(delta_dtype)
    total = x if delta is None else x + delta
    ours = ops.add_norm(stream := x.clone(), delta, weight, bias, EPS, dtype)
    assert torch.equal(stream, total)
    check_rows(ours, plain_norm(total, weight, bias).to(dtype), reference.norm(total, weight, bias, EPS))


def test_the_norm_for_a_linear_layer_is_the_same_with_rows_apart(dtype: torch.dtype, is_layer_norm: bool) -> None:
    x, weight, bias = random_rows(9, 64, is_layer_norm)
    plain, apart = (
        ops.add_norm(x.clone(), x.to(dtype), weight, bias, EPS, dtype, for_linear=value) for value in (False, True)
    )
    assert torch.equal(plain, apart)
    assert apart.stride(0) == ops.linear_row_stride(64, dtype, for_linear=True)
    assert plain.is_contiguous()


def test_eps_weight_and_bias_count(is_layer_norm: bool) -> None:
    x, weight, bias = random_rows(4, 64, is_layer_norm)
    exact = reference.norm(x, weight, bias, EPS)
    wrong = [reference.norm(x, weight, bias, 0.0), reference.norm(x, weight.sign(), bias, EPS)]
    if bias is not None:
        wrong += [reference.norm(x, weight, -bias, EPS), reference.norm(x + 1e-4, weight, None, EPS)]
    ours = ops.add_norm(x, None, weight, bias, EPS, torch.float32)
    assert error(ours, exact) < 1e-6
    assert min(error(each[:1], exact[:1]) for each in wrong) > 0.03


def test_a_layer_norm_far_from_zero_keeps_its_variance() -> None:
    """Which E[x^2] - E[x]^2 would lose."""
    x, weight, bias = random_rows(1, 1280, is_layer_norm=True)
    x = x / x.std() + 1e4
    ours = ops.add_norm(x, None, weight, bias, EPS, torch.float32)
    exact = reference.norm(x, weight, bias, EPS)
    assert error(ours, exact) < 1e-3  # the mean itself is exact to 1e-3 only
    naive = (x - x.mean()) / (x.square().mean() - x.mean() ** 2 + EPS).sqrt() * weight + bias
    assert not error(naive, exact) < 1e-2


@pytest.mark.parametrize(("heads", "dim"), [(2, 80), (3, 16), (1, 118), (2, 10), (1, 2)])
@pytest.mark.parametrize("rows", [1, 35])
def test_the_rotation_is_as_exact_as_plain_pytorch(rows: int, heads: int, dim: int, dtype: torch.dtype) -> None:
    qkv, cos, sin = random_qkv(rows, heads, dim, dtype)
    exact = reference.rotated_qk(qkv, cos, sin)
    x, y = qkv[:, :2].float().chunk(2, -1)
    c, s = cos[:, None, None], sin[:, None, None]
    plain = torch.cat((torch.cat((x * c - y * s, y * c + x * s), -1).to(dtype), qkv[:, 2:]), 1)
    ours = qkv.clone()
    assert ops.rotate_qk_(ours, cos, sin) is ours
    check_rows(ours, plain, exact)
    assert torch.equal(ours[:, 2], qkv[:, 2])
    assert error(ours, reference.rotated_qk(qkv, cos, -sin)) > 0.1


def test_the_memory_layout_is_invisible(dtype: torch.dtype) -> None:
    """Heads one after another, as a GEMM in blocks leaves them, or side by side; and rows with something between."""
    qkv, cos, sin = random_qkv(50, 3, 20, dtype)
    by_head = qkv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    apart = torch.zeros(50, 3, 3, 32, dtype=dtype)
    apart[..., :20] = qkv
    expected = ops.rotate_qk_(qkv, cos, sin)
    assert torch.equal(ops.rotate_qk_(by_head, cos, sin), expected)
    assert torch.equal(ops.rotate_qk_(apart[..., :20], cos, sin), expected)
    assert not apart[..., 20:].any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("m", "n"), [(9, 3420), (5, 166), (3, 32), (1, 2), (0, 8)])
def test_activations_are_as_exact_as_plain_pytorch(activation: str, m: int, n: int, dtype: torch.dtype) -> None:
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(n)).to(dtype)
    exact = reference.activated(x, activation)
    plain = ACTIVATIONS[activation](x.float()).to(dtype)
    check_rows(ops.activate(x.clone(), activation), plain, exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_bfloat16_are_as_good_as_rounded_over_the_whole_range(activation: str) -> None:
    """They are rougher ones than float32's: by 6e-6, next to half a unit of the last place."""
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[(x.abs() > 2.0**-100) & (x.abs() < 2.0**100)]
    rows = torch.cat((x, torch.ones_like(x)))[None] if activation == "silu_gate" else x[None].clone()
    exact, ours = reference.activated(rows, activation)[0], ops.activate(rows, activation)[0].double()
    is_tiny = x < (-4 if activation == "gelu" else -50)  # the answer, soon
    difference = (ours - exact).abs()
    assert float((difference / exact.abs())[~is_tiny].max()) < 2**-8 + 6e-6
    assert bool((difference <= 2**-8 * exact.abs() + 1e-9 + 2.0**-125 * x.double().abs())[is_tiny].all())


def test_activations_are_not_confused() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    ours = {activation: ops.activate(x.clone(), activation) for activation in ACTIVATIONS}
    gelu, quick_gelu, swapped = (
        reference.activated(*arguments) for arguments in ((x, "gelu"), (x, "quick_gelu"), (x.roll(32, 1), "silu_gate"))
    )
    assert min(error(ours["gelu"], quick_gelu), error(ours["quick_gelu"], gelu)) > 1e-3
    assert error(ours["silu_gate"], swapped) > 0.1


def test_the_thread_count_and_neighbours_are_invisible(dtype: torch.dtype, is_layer_norm: bool) -> None:
    x, weight, bias = random_rows(700, 163, is_layer_norm)
    gate_up, (qkv, cos, sin) = x.repeat(1, 2).to(dtype), random_qkv(700, 2, 78, dtype)

    def answers(rows: slice) -> list[Tensor]:
        return [
            ops.add_norm(x[rows].clone(), gate_up[rows, :163].contiguous(), weight, bias, EPS, dtype),
            ops.rotate_qk_(qkv[rows].clone(), cos[rows], sin[rows]),
            *(ops.activate(gate_up[rows].clone(), activation) for activation in ACTIVATIONS),
        ]

    with torch_threads(1):
        expected = answers(slice(None))
    for threads in (1, 2, 3):
        with torch_threads(threads):
            for rows in (slice(0, 1), slice(15, 18), slice(699, 700), slice(5, 600), slice(None)):
                ours = answers(rows)
                assert all(torch.equal(a, b[rows]) for a, b in zip(ours, expected, strict=True))


def test_nan_and_infinity_stay_in_their_row(is_layer_norm: bool) -> None:
    x, weight, bias = random_rows(20, 40, is_layer_norm)
    x[3, 7], x[5, 0] = torch.nan, torch.inf
    answers = [ops.activate(x.clamp(-50, 50), activation) for activation in ACTIVATIONS]
    qkv = x[:, None, None].repeat(1, 3, 1, 1)
    answers += [
        ops.add_norm(x.clone(), None, weight, bias, EPS, torch.float32),
        ops.rotate_qk_(qkv, torch.ones(20, 20), torch.ones(20, 20)).flatten(1),
    ]
    for answer in answers:
        is_finite = answer.isfinite().all(1)
        assert [i for i, finite in enumerate(is_finite) if not finite] in ([3, 5], [3])


ROWS, QKV, HALF = torch.ones(2, 4), torch.ones(4, 3, 1, 16), torch.ones(4, 8)


def add_norm(
    x: Tensor = ROWS,
    delta: Tensor | None = None,
    weight: Tensor = ROWS[0],
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return ops.add_norm(x, delta, weight, bias, EPS, dtype)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_norm(x=torch.ones(4)), r"add_norm_: x must be contiguous \[N, D\] float32, got \[4\] float32"),
        (lambda: add_norm(x=ROWS.half()), r"add_norm_: x must be .*, got \[2, 4\] float16"),
        (lambda: add_norm(delta=ROWS[:1]), r"add_norm_: delta must be contiguous \[2, 4\] float32 or .*, got \[1, 4\]"),
        (lambda: add_norm(delta=torch.ones(4, 2).T), r"add_norm_: delta must be .* with strides \[1, 2\]"),
        (lambda: add_norm(weight=torch.ones(3)), r"add_norm_: weight must be contiguous \[4\] float32, got \[3\] floa"),
        (lambda: add_norm(bias=ROWS), r"add_norm_: bias must be contiguous \[4\] float32, got \[2, 4\] float32"),
        (lambda: add_norm(dtype=torch.float16), "add_norm_: out_dtype must be float32 or bfloat16, got float16"),
        (lambda: ops.rotate_qk_(QKV[0], HALF, HALF), r"rotate_qk_: qkv must be \[N, 3, .*, got \[3, 1, 16\] float32"),
        (lambda: ops.rotate_qk_(QKV[..., :15], HALF, HALF), r"rotate_qk_: qkv must be .* an even head_dim, got"),
        (lambda: ops.rotate_qk_(QKV[..., ::2], HALF, HALF), r"rotate_qk_: qkv must be .* strides \[48, 16, 16, 2\]"),
        (
            lambda: ops.rotate_qk_(QKV[:1].expand(4, 3, 1, 16), HALF, HALF),
            r"rotate_qk_: no two elements of qkv may share memory, got .* strides \[0, 16, 16, 1\]",
        ),
        (lambda: ops.rotate_qk_(QKV.half(), HALF, HALF), r"rotate_qk_: qkv must be .*, got \[4, 3, 1, 16\] float16"),
        (lambda: ops.rotate_qk_(QKV, HALF[:3], HALF), r"rotate_qk_: cos must be contiguous \[4, 8\] float32, got \[3"),
        (lambda: ops.rotate_qk_(QKV, HALF, HALF.double()), r"rotate_qk_: sin must be .*, got \[4, 8\] float64"),
        (
            lambda: ops.activate(ROWS.half(), "gelu"),
            r"activate_: x must be contiguous \[M, N\] .*, got \[2, 4\] floa",
        ),
        (lambda: ops.activate(ROWS, "relu"), "activate_: activation must be gelu or quick_gelu, got relu"),
        (lambda: ops.activate(ROWS.T, "silu_gate"), r"silu_gate: gate_up must be contiguous .* strides \[1, 4\]"),
        (lambda: ops.activate(torch.ones(2, 3), "silu_gate"), r"silu_gate: gate_up must have as many gates as ups"),
    ],
)
def test_a_bad_argument_is_refused_with_what_came(call: Callable[[], object], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{message}"):
        call()


def test_schemas_and_fakes_agree_with_the_kernels(dtype: torch.dtype, is_layer_norm: bool) -> None:
    x, weight, bias = random_rows(5, 20, is_layer_norm)
    ours, check = torch.ops.rtp_mm, torch.library.opcheck
    for delta in (None, x.to(dtype)):
        check(ours.add_norm_.default, (x, delta, weight, bias, EPS, dtype))
        check(ours.add_norm_.default, (x, delta, weight, bias, EPS, dtype, True))
    check(ours.rotate_qk_.default, random_qkv(6, 2, 10, dtype))
    check(ours.activate_.default, (x.to(dtype), "gelu"))
    check(ours.silu_gate.default, (x.to(dtype),))
