"""`ops.patch_embed` against float64, plain PyTorch and itself."""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import require
from torch import Tensor
from torch.nn.functional import linear

from rtp_mm import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
K, D = 588, 1280  # a still patch of 14 x 14 pixels into Qwen2.5-VL's width


def random_rows(n: int, k: int = K) -> Tensor:
    return torch.randint(0, 256, (n, k), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


def random_weight(terms: int, d: int, k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A weight of published size, [terms, d, k], and a bias [d]."""
    generator = torch.Generator().manual_seed(d)
    exact = torch.randn(d, k, generator=generator) * 2e-3
    high = exact.to(dtype)
    low = (exact - high.float()).to(dtype)
    return torch.stack((high, low)[:terms]), torch.randn(d, generator=generator)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize(("n", "k", "d", "terms"), [(70, K, D, 2), (3, 1176, 33, 1), (1, 5, 31, 2), (9, 48, 64, 1)])
def test_error_is_at_most_twice_that_of_plain_pytorch(
    n: int, k: int, d: int, terms: int, weight_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    rows, (weight, bias) = random_rows(n, k), random_weight(terms, d, k, weight_dtype)
    exact = reference.patch_embed(rows, weight, bias)
    plain = linear(rows.float() - 128, weight.float().sum(0), bias).to(out_dtype)
    ours = ops.patch_embed(rows, weight, bias, dtype=out_dtype)
    assert ours.dtype == out_dtype
    assert error(ours, exact) <= 2 * error(plain, exact)


def test_the_second_term_and_the_centre_count() -> None:
    rows, (weight, bias) = random_rows(16), random_weight(2, D, K, torch.bfloat16)
    exact = reference.patch_embed(rows, weight, bias)
    ours = error(ops.patch_embed(rows, weight, bias, dtype=torch.float32), exact)
    one_term = error(ops.patch_embed(rows, weight[:1].contiguous(), bias, dtype=torch.float32), exact)
    off_centre = error(linear(rows.float() - 127, weight.float().sum(0), bias), exact)
    assert ours < 1e-6 < 1e-4 < min(one_term, off_centre)


def test_scale_multiplies_the_sum_and_not_the_bias() -> None:
    rows, (weight, bias) = random_rows(4), random_weight(1, 40, K, torch.float32)
    ours = ops.patch_embed(rows, weight * 64, bias, scale=1 / 64, dtype=torch.float32)
    assert torch.equal(ours, ops.patch_embed(rows, weight, bias, dtype=torch.float32))  # powers of two are exact
    assert error(ours, reference.patch_embed(rows, weight * 64, bias, scale=1 / 64)) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
def test_batching_is_invisible(dtype: torch.dtype) -> None:
    rows, (weight, bias) = random_rows(131), random_weight(1, 70, K, torch.float32)
    together = ops.patch_embed(rows, weight, bias, dtype=dtype)
    for begin in (0, 5, 63, 64, 126):
        for n in (1, 2, 3, 5, 7, 9, 16, 65):
            part = rows[begin : begin + n].contiguous()
            assert torch.equal(ops.patch_embed(part, weight, bias, dtype=dtype), together[begin : begin + n])


def test_the_thread_count_is_invisible() -> None:
    rows, (weight, bias) = random_rows(200), random_weight(1, 70, K, torch.float32)
    threads = torch.get_num_threads()
    results = []
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        results.append(ops.patch_embed(rows, weight, bias, dtype=torch.float32))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("group", [1, 4, 9])
def test_order_moves_whole_groups(group: int) -> None:
    n = group * 31
    rows, (weight, bias) = random_rows(n), random_weight(1, 40, K, torch.float32)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0)).int()
    plain = ops.patch_embed(rows, weight, bias, dtype=torch.float32)
    ours = ops.patch_embed(rows, weight, bias, order=order, dtype=torch.float32)
    assert torch.equal(ours, plain.unflatten(0, (31, group))[order.long()].flatten(0, 1))
    assert not torch.equal(ours, plain.unflatten(0, (31, group))[order.argsort()].flatten(0, 1))
    assert error(ours, reference.patch_embed(rows, weight, bias, order=order)) < 1e-6


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_position_embedding_is_that_of_the_output_row(dtype: torch.dtype) -> None:
    rows, (weight, bias) = random_rows(12), random_weight(1, 40, K, torch.float32)
    order, pos = torch.tensor([2, 0, 1], dtype=torch.int32), torch.randn(12, 40)
    exact = reference.patch_embed(rows, weight, bias, order=order, pos=pos)
    plain = (
        linear(rows[order.repeat_interleave(4) * 4 + torch.arange(4).repeat(3)] - 128.0, weight[0], bias) + pos
    ).to(dtype)
    ours = ops.patch_embed(rows, weight, bias, order=order, pos=pos, dtype=dtype)
    assert error(ours, exact) <= 2 * error(plain, exact)
    assert error(reference.patch_embed(rows, weight, bias, order=order, pos=pos.flip(0)), exact) > 0.1


@pytest.mark.parametrize("dtype", FLOATS)
def test_a_weight_may_be_a_view_of_a_longer_one(dtype: torch.dtype) -> None:
    rows, (weight, bias) = random_rows(5), random_weight(2, 40, K, dtype)
    longer = torch.full((2, 41, K + 4), torch.nan, dtype=dtype)
    longer[:, :40, :K] = weight
    ours = ops.patch_embed(rows, longer[:, :40, :K], bias, dtype=torch.float32)
    assert torch.equal(ours, ops.patch_embed(rows, weight, bias, dtype=torch.float32))


def test_a_group_may_be_taken_twice() -> None:
    rows, (weight, bias) = random_rows(4), random_weight(1, 8, K, torch.float32)
    ours = ops.patch_embed(rows, weight, bias, order=torch.tensor([1, 1], dtype=torch.int32), dtype=torch.float32)
    assert torch.equal(ours[:2], ours[2:])


@pytest.mark.parametrize("order", [None, torch.empty(0, dtype=torch.int32)])
def test_no_rows_give_no_rows(order: Tensor | None) -> None:
    weight, bias = random_weight(1, 8, K, torch.float32)
    ours = ops.patch_embed(random_rows(0), weight, bias, order=order, dtype=torch.bfloat16)
    assert ours.shape == (0, 8)
    assert ours.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_is_pytorchs(dtype: torch.dtype) -> None:
    """Rows of 128 leave the bias alone: float32 of all magnitudes, halves between two neighbours, infinity, NaN."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
    near_half = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16).float().view(torch.int32)
    ties = torch.cat([near_half + offset for offset in (0x0FFF, 0x1000, 0x1001)])
    edges = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.99, 65520.0, 2.0**-25, 2.0**-24])
    bias = torch.cat((bits.view(torch.float32), ties.view(torch.float32), (bits & -65536 | 0x8000).view(torch.float32)))
    bias = torch.cat((bias, edges))
    rows = torch.full((1, 1), 128, dtype=torch.uint8)
    ours = ops.patch_embed(rows, torch.ones(1, len(bias), 1), bias, dtype=dtype)[0]
    torch.testing.assert_close(ours, bias.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_is_read_exactly(dtype: torch.dtype) -> None:
    weight = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    rows = torch.full((1, 1), 129, dtype=torch.uint8)
    ours = ops.patch_embed(rows, weight.reshape(1, -1, 1), torch.zeros(2**16), dtype=torch.float32)[0]
    torch.testing.assert_close(ours, weight.float(), rtol=0, atol=0, equal_nan=True)


def bad_arguments() -> list[tuple[str, dict[str, object], str]]:
    weight, bias = torch.ones(1, 8, 6), torch.zeros(8)
    return [
        ("rows of floats", {"rows": torch.ones(4, 6)}, r"rows must be contiguous \[N, K\] uint8, got \[4, 6\] float32"),
        ("strided rows", {"rows": random_rows(6, 4).T}, r"got \[4, 6\] uint8 with strides \[1, 4\]"),
        ("another K", {"rows": random_rows(4, 5)}, r"weight must be \[1 or 2, D, 5\] .*, got \[1, 8, 6\]"),
        ("three terms", {"weight": torch.ones(3, 8, 6)}, r"weight must be .*, got \[3, 8, 6\] float32"),
        ("float64 weight", {"weight": weight.double()}, r"weight must be .*, got \[1, 8, 6\] float64"),
        ("strided weight", {"weight": torch.ones(1, 6, 8).mT}, r"weight must be .* with strides \[48, 1, 8\]"),
        ("another N", {"pos": torch.zeros(3, 8)}, r"pos must be contiguous \[4, 8\] float32, got \[3, 8\] float32"),
        ("bfloat16 pos", {"pos": torch.zeros(4, 8).bfloat16()}, r"pos must be .*, got \[4, 8\] bfloat16"),
        ("bfloat16 bias", {"bias": bias.bfloat16()}, r"bias must be contiguous \[8\] float32, got \[8\] bfloat16"),
        ("another D", {"bias": torch.zeros(7)}, r"bias must be .*, got \[7\] float32"),
        ("integer output", {"dtype": torch.int32}, r"out_dtype must be float32, bfloat16 or float16, got int32"),
        ("int64 order", {"order": torch.arange(4)}, r"order must be contiguous \[N / group\] int32 with N = 4, got"),
        ("no divisor", {"order": torch.arange(3).int()}, r"order must .* with N = 4, got \[3\] int32"),
        ("empty order", {"order": torch.arange(0).int()}, r"order must .* with N = 4, got \[0\] int32"),
        ("order too large", {"order": torch.tensor([0, 2]).int()}, r"order must be in \[0, 2\), got 2 at 1"),
        ("negative order", {"order": torch.tensor([-1, 0]).int()}, r"order must be in \[0, 2\), got -1 at 0"),
    ]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in bad_arguments()])
def test_a_bad_argument_is_refused_with_what_came(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "rows": random_rows(4, 6),
        "weight": torch.ones(1, 8, 6),
        "bias": torch.zeros(8),
        "dtype": torch.float32,
    }
    with pytest.raises(RuntimeError, match=f"^patch_embed: .*{message}"):
        ops.patch_embed(**{**arguments, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_schema_and_fake_agree_with_the_kernel(out_dtype: torch.dtype) -> None:
    weight, bias = random_weight(2, 8, 6, torch.bfloat16)
    for order in (None, torch.tensor([1, 0], dtype=torch.int32)):
        for pos in (None, torch.ones(4, 8)):
            arguments = (random_rows(4, 6), weight, bias, 0.5, order, pos, out_dtype)
            torch.library.opcheck(torch.ops.rtp_mm.patch_embed.default, arguments)


# Tails of rows, columns and k; K of stills, of clips, of 16 x 16 patches, and one that tensor cores do not take.
CUDA_SHAPES = [(132, K, 70), (4, 1176, 1280), (300, 768, 64), (40, 147, 33)]


@pytest.mark.parametrize("out_dtype", FLOATS)
@pytest.mark.parametrize("weight_dtype", FLOATS)
@pytest.mark.parametrize(("n", "k", "d"), CUDA_SHAPES)
@pytest.mark.parametrize("terms", [1, 2])
def test_cuda_is_exact_and_batching_is_invisible(
    terms: int, n: int, k: int, d: int, weight_dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    require("cuda")
    rows, (weight, bias) = random_rows(n, k), random_weight(terms, d, k, weight_dtype)
    order = torch.randperm(n // 4, generator=torch.Generator().manual_seed(0)).int()
    pos = torch.randn(n, d, generator=torch.Generator().manual_seed(1))
    exact = reference.patch_embed(rows, weight, bias, scale=0.5, order=order, pos=pos)
    padded = torch.zeros(terms, d, k + -k % 8, dtype=weight_dtype, device="cuda")[..., :k]
    padded.copy_(weight)
    device_rows, device_bias, device_pos = rows.cuda(), bias.cuda(), pos.cuda()
    wide, narrow = (
        ops.patch_embed(device_rows, w, device_bias, scale=0.5, order=order.cuda(), pos=device_pos, dtype=out_dtype)
        for w in (padded, weight.cuda())
    )
    assert torch.equal(wide, narrow)
    # Tensor cores drop what a sum's float32 cannot hold, so that errors lean one way: K / 8 sums of half a last bit.
    truncation = 0 if weight_dtype == torch.float32 else terms * k / 8 * 2.0**-24
    assert error(wide.cpu(), exact) <= 2 * error(exact.to(out_dtype), exact) + 1e-6 + truncation
    together = ops.patch_embed(device_rows, padded, device_bias, scale=0.5, dtype=out_dtype)
    for begin, count in ((0, 1), (1, 3), (n // 2, 2), (n - n // 3, n // 3)):
        part = device_rows[begin : begin + count].clone()
        alone = ops.patch_embed(part, padded, device_bias, scale=0.5, dtype=out_dtype)
        assert torch.equal(alone, together[begin : begin + count])
