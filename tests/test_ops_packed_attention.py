"""`ops.packed_attention` against float64, plain PyTorch and itself."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import reference
import torch
from torch import Tensor
from torch_threads import torch_threads

from rtp_mm import ops
from rtp_mm.vit.attention import Segments, sdpa
from rtp_mm.vit.rope import RotaryTable

# Around blocks of 16, 32 and 128; the last one as long as a small frame.
LENGTHS = [1, 2, 3, 16, 31, 33, 64, 79, 97, 127, 129, 160, 300]


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found: torch.dtype = request.param
    return found


def random_inputs(rows: int, heads: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """qkv, cos, sin; scores are a few units wide."""
    generator = torch.Generator().manual_seed(rows * heads + dim)
    qkv = torch.randn(rows, 3, heads, dim, generator=generator)
    qkv[:, :2] *= 1.5
    angles = torch.randn(rows, dim // 2, generator=generator) * 3
    return qkv.to(dtype), angles.cos(), angles.sin()


def cumulative(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("heads", "dim"), [(2, 80), (3, 16), (1, 128), (2, 10), (1, 2)])
def test_error_is_at_most_twice_that_of_plain_pytorch(heads: int, dim: int, dtype: torch.dtype) -> None:
    qkv, cos, sin = random_inputs(sum(LENGTHS), heads, dim, dtype)
    cu = cumulative(LENGTHS)
    exact = reference.packed_attention(qkv, cos, sin, LENGTHS)
    plain = sdpa(qkv.clone(), RotaryTable(cos, sin), Segments.from_lengths(cu, LENGTHS))
    ours = ops.packed_attention(qkv, cos, sin, cu)
    assert ours.dtype == dtype
    assert error(ours, exact) <= (2 if dtype == torch.float32 else 1.1) * error(plain, exact)


def test_what_a_linear_layer_reads_is_the_same_with_rows_apart(dtype: torch.dtype) -> None:
    arguments = (*random_inputs(50, 3, 20, dtype), cumulative([30, 8]))  # and 12 rows past the last segment
    plain, apart = (ops.packed_attention(*arguments, for_linear=value) for value in (False, True))
    assert torch.equal(plain, apart)
    assert not apart[38:].any()
    assert apart.flatten(1).stride(0) == ops.linear_row_stride(60, dtype, for_linear=True)
    assert plain.is_contiguous()


def test_rotation_scale_and_borders_count() -> None:
    qkv, cos, sin = random_inputs(100, 2, 16)
    ours = ops.packed_attention(qkv, cos, sin, cumulative([60, 40]))
    exact = reference.packed_attention(qkv, cos, sin, [60, 40])
    backwards = reference.packed_attention(qkv, cos, -sin, [60, 40])
    unscaled = reference.packed_attention(torch.cat((qkv[:, :1] * 4, qkv[:, 1:]), 1), cos, sin, [60, 40])
    one_segment = reference.packed_attention(qkv, cos, sin, [100])
    assert error(ours, exact) < 1e-6 < 1e-2 < min(error(ours, w) for w in (backwards, unscaled, one_segment))


def test_large_scores_neither_overflow_nor_lose_the_largest() -> None:
    """The row's largest score moves up from block to block of keys, and down to -1000 below it."""
    qkv, cos, sin = random_inputs(300, 1, 16)
    qkv[:, 1] *= torch.linspace(0.01, 100, 300)[:, None, None]
    ours = ops.packed_attention(qkv, cos, sin, cumulative([300]))
    assert error(ours, reference.packed_attention(qkv, cos, sin, [300])) < 1e-4  # scores of 1e3 are exact to 1e-4


def test_scores_that_rise_by_a_little_and_by_much(dtype: torch.dtype) -> None:
    """Weights are relative to a score that is not always the row's largest so far: a little above it, or far."""
    qkv, cos, sin = random_inputs(400, 2, 80, dtype)
    qkv[:, 1] *= torch.linspace(0.01, 6, 400)[:, None, None].to(dtype)
    cu = cumulative([400])
    exact = reference.packed_attention(qkv, cos, sin, [400])
    plain = sdpa(qkv.clone(), RotaryTable(cos, sin), Segments.from_lengths(cu, [400]))
    ours = ops.packed_attention(qkv, cos, sin, cu)
    assert error(ours, exact) <= (2 if dtype == torch.float32 else 1.1) * error(plain, exact)


def test_a_key_that_is_infinite_or_no_number_is_seen_by_its_segment_alone(dtype: torch.dtype) -> None:
    qkv, cos, sin = random_inputs(300, 1, 16, dtype)
    clean = ops.packed_attention(qkv, cos, sin, cumulative([130, 170]))
    for value in (float("nan"), float("inf")):
        broken = qkv.clone()
        broken[120, 1, 0, 3] = value
        answers = ops.packed_attention(broken, cos, sin, cumulative([130, 170]))
        assert torch.equal(answers[130:], clean[130:])
        if value != value:
            assert answers[:130].isnan().all()


def test_batching_is_invisible(dtype: torch.dtype) -> None:
    lengths = [64, 130, 1, 300, 5, 64, 113]
    starts = [0, *accumulate(lengths)]
    qkv, cos, sin = random_inputs(sum(lengths), 2, 80, dtype)
    together = ops.packed_attention(qkv, cos, sin, cumulative(lengths))
    for start, length in zip(starts, lengths, strict=False):
        rows = slice(start, start + length)
        alone = ops.packed_attention(qkv[rows], cos[rows], sin[rows], cumulative([length]))
        assert torch.equal(alone, together[rows])


def test_a_query_is_answered_alike_wherever_it_stands(dtype: torch.dtype) -> None:
    """Blocks of queries are cut from the segment's start: a row's strip depends on its place, its bits do not."""
    qkv, cos, sin = random_inputs(230, 1, 80, dtype)
    ours = ops.packed_attention(qkv, cos, sin, cumulative([230]))
    turned = torch.arange(230).roll(57)
    queries_turned = torch.cat((qkv[turned][:, :1], qkv[:, 1:]), 1)
    ones, zeros = torch.ones(230, 40), torch.zeros(230, 40)
    plain = ops.packed_attention(qkv, ones, zeros, cumulative([230]))
    assert torch.equal(ops.packed_attention(queries_turned, ones, zeros, cumulative([230])), plain[turned])
    assert not torch.equal(ours, plain)


def test_the_memory_layout_is_invisible(dtype: torch.dtype) -> None:
    """Heads one after another, as a GEMM in blocks leaves them, or side by side."""
    qkv, cos, sin = random_inputs(150, 3, 20, dtype)
    by_head = qkv.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    assert by_head.stride() != qkv.stride()
    cu = cumulative([100, 50])
    assert torch.equal(ops.packed_attention(by_head, cos, sin, cu), ops.packed_attention(qkv, cos, sin, cu))


def test_the_thread_count_is_invisible(dtype: torch.dtype) -> None:
    qkv, cos, sin = random_inputs(400, 3, 16, dtype)
    results = []
    for n in (1, 2, 3):
        with torch_threads(n):
            results.append(ops.packed_attention(qkv, cos, sin, cumulative([300, 100])))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_rows_past_the_last_segment_and_empty_segments(dtype: torch.dtype) -> None:
    qkv, cos, sin = random_inputs(30, 2, 16, dtype)
    qkv[20:] = torch.nan
    ours = ops.packed_attention(qkv, cos, sin, torch.tensor([0, 0, 20, 20], dtype=torch.int32))
    assert torch.equal(ours[:20], ops.packed_attention(qkv[:20], cos[:20], sin[:20], cumulative([20])))
    assert torch.equal(ours[20:], torch.zeros(10, 2, 16, dtype=dtype))
    assert ops.packed_attention(qkv[:0], cos[:0], sin[:0], cumulative([])).shape == (0, 2, 16)


def test_nan_stays_in_its_segment(dtype: torch.dtype) -> None:
    qkv, cos, sin = random_inputs(60, 1, 16, dtype)
    qkv[35, 1, 0, 3] = torch.nan
    ours = ops.packed_attention(qkv, cos, sin, cumulative([30, 30]))
    assert ours[:30].isfinite().all()
    assert ours[30:].isnan().all()


def bad_arguments() -> list[tuple[str, dict[str, object], str]]:
    return [
        (
            "no heads",
            {"qkv": torch.ones(4, 3, 16)},
            r"qkv must be \[N, 3, heads, dim\] .*, got \[4, 3, 16\]",
        ),
        ("odd dim", {"qkv": torch.ones(4, 3, 1, 15)}, r"an even dim of at most 128, got \[4, 3, 1, 15\] float32"),
        ("wide dim", {"qkv": torch.ones(4, 3, 1, 130)}, r"an even dim of at most 128, got \[4, 3, 1, 130\] float32"),
        ("float16 qkv", {"qkv": torch.ones(4, 3, 1, 16).half()}, r"got \[4, 3, 1, 16\] float16"),
        (
            "strided heads",
            {"qkv": torch.ones(4, 3, 1, 32)[..., ::2]},
            r"contiguous heads .* strides \[96, 32, 32, 2\]",
        ),
        ("short cos", {"cos": torch.ones(3, 8)}, r"cos must be contiguous \[4, 8\] float32, got \[3, 8\] float32"),
        ("wide sin", {"sin": torch.ones(4, 16)}, r"sin must be contiguous \[4, 8\] float32, got \[4, 16\] float32"),
        ("int64", {"cu_seqlens": torch.tensor([0, 4])}, r"cu_seqlens must be .* int32, got \[2\] int64"),
        ("too many rows", {"cu_seqlens": cumulative([5])}, r"cu_seqlens must ascend from 0 to at most 4"),
        ("descending", {"cu_seqlens": torch.tensor([0, 3, 2]).int()}, r"cu_seqlens must ascend from 0"),
        ("not from 0", {"cu_seqlens": torch.tensor([1, 4]).int()}, r"cu_seqlens must ascend from 0"),
    ]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in bad_arguments()])
def test_a_bad_argument_is_refused_with_what_came(change: dict[str, object], message: str) -> None:
    qkv, cos, sin = random_inputs(4, 1, 16)
    arguments: dict[str, object] = {"qkv": qkv, "cos": cos, "sin": sin, "cu_seqlens": cumulative([4])}
    with pytest.raises(RuntimeError, match=f"^packed_attention: .*{message}"):
        ops.packed_attention(**{**arguments, **change})  # type: ignore[arg-type]


def test_schema_and_fake_agree_with_the_kernel(dtype: torch.dtype) -> None:
    arguments = (*random_inputs(40, 2, 16, dtype), cumulative([30, 8]))
    torch.library.opcheck(torch.ops.rtp_mm.packed_attention.default, arguments)
    torch.library.opcheck(torch.ops.rtp_mm.packed_attention.default, (*arguments, True))
