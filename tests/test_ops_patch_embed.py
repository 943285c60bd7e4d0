"""The patch embeddings of a CPU and of CUDA against float64, plain PyTorch and themselves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import reference
import torch
from conftest import require
from torch import Tensor
from torch.nn.functional import linear
from torch_threads import torch_threads

from rtp_mm import ops
from rtp_mm.vit.patch_embed import TermsProjection

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


def packed_weight(d: int, k: int = K) -> tuple[Tensor, ops.PackedWeight, Tensor]:
    """[1, d, k] for the reference, the same as the CPU reads it, and a bias [d]."""
    weight, bias = random_weight(1, d, k, torch.float32)
    return weight, ops.pack_linear(weight[0]), bias


def error(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize(("n", "k", "d"), [(70, K, D), (3, 1176, 33), (1, 5, 31), (9, 48, 64), (230, 147, 16)])
def test_error_is_at_most_twice_that_of_plain_pytorch(n: int, k: int, d: int) -> None:
    rows, (weight, packed, bias) = random_rows(n, k), packed_weight(d, k)
    exact = reference.patch_embed(rows, weight, bias)
    ours = ops.packed_patch_embed([rows], packed, bias)
    assert ours.dtype == torch.float32
    assert error(ours, exact) <= 2 * error(linear(rows.float() - 128, weight[0], bias), exact) + 1e-7


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-5), (torch.float16, 1e-6)])
@pytest.mark.parametrize("size", [2e-3, 1e-9])
def test_the_terms_for_cuda_stand_for_the_weight(
    dtype: torch.dtype, limit: float, size: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small it is, fp16's exponents or not; through the twin, as CUDA's operator takes them."""
    weight = torch.randn(40, K, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * size
    bias, rows = torch.zeros(40), [random_rows(8), random_rows(4)]
    order = torch.tensor([2, 0, 1], dtype=torch.int32)
    taken: list[torch.dtype] = []

    def twin(rows: Tensor, terms: Tensor, bias: Tensor, *, scale: float, order: Tensor, dtype: torch.dtype) -> Tensor:
        taken.append(terms.dtype)
        return reference.patch_embed(rows, terms, bias, scale=scale, order=order)

    monkeypatch.setattr(ops, "patch_embed", twin)
    ours = TermsProjection(weight, bias, dtype)(rows, order)
    exact = (torch.cat(rows).double() - 128) @ weight.T
    assert error(ours, exact.unflatten(0, (3, 4))[order.long()].flatten(0, 1)) < limit
    assert taken == [dtype]
    if dtype != torch.float32:
        assert (
            error((torch.cat(rows).double() - 128) @ weight.to(dtype).double().T, exact) > limit
        )  # one term is not enough


def test_the_centre_counts() -> None:
    rows, (weight, packed, bias) = random_rows(16), packed_weight(D)
    exact = reference.patch_embed(rows, weight, bias)
    off_centre = error(linear(rows.float() - 127, weight[0], bias), exact)
    assert error(ops.packed_patch_embed([rows], packed, bias), exact) < 1e-6 < 1e-4 < off_centre


@pytest.mark.parametrize("d", [16, 70])
def test_batching_is_invisible(d: int) -> None:
    rows, (_, packed, bias) = random_rows(461), packed_weight(d)
    together = ops.packed_patch_embed([rows], packed, bias)
    for begin in (0, 5, 63, 64, 126, 396):
        for n in (1, 2, 3, 5, 7, 9, 16, 65):
            part = rows[begin : begin + n].contiguous()
            assert torch.equal(ops.packed_patch_embed([part], packed, bias), together[begin : begin + n])


def test_items_are_read_one_after_another_wherever_they_lie() -> None:
    memory = random_rows(400)
    # One, none, many rows; in another order than memory's; one of them twice; from an odd address.
    items = [memory[300:301], memory[7:7], memory[10:243], memory[:10], memory[300:301]]
    odd = torch.empty(3 * K + 1, dtype=torch.uint8)[1:].view(3, K)
    items.append(odd.copy_(memory[:3]))
    _, packed, bias = packed_weight(70)
    order = torch.randperm(62, generator=torch.Generator().manual_seed(0)).int()  # groups of 4, also over items' ends
    for chosen in (None, order):
        ours = ops.packed_patch_embed(items, packed, bias, order=chosen)
        assert torch.equal(ours, ops.packed_patch_embed([torch.cat(items)], packed, bias, order=chosen))
        assert not torch.equal(ours, ops.packed_patch_embed([torch.cat(items[::-1])], packed, bias, order=chosen))


def test_the_thread_count_is_invisible() -> None:
    rows, (_, packed, bias) = random_rows(500), packed_weight(150)
    results = []
    for n in (1, 2, 3):
        with torch_threads(n):
            results.append(ops.packed_patch_embed([rows], packed, bias))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_calls_from_many_threads_do_not_know_each_other() -> None:
    _, packed, bias = packed_weight(150)
    batches = [[random_rows(n), random_rows(2 * n)] for n in (1, 40, 77, 300)]
    alone = [ops.packed_patch_embed(batch, packed, bias) for batch in batches]
    with ThreadPoolExecutor(len(batches)) as pool:
        for _ in range(5):
            together = pool.map(lambda batch: ops.packed_patch_embed(batch, packed, bias), batches)
            assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("group", [1, 4, 9])
def test_order_moves_whole_groups(group: int) -> None:
    n = group * 31
    rows, (weight, packed, bias) = random_rows(n), packed_weight(40)
    order = torch.randperm(31, generator=torch.Generator().manual_seed(0)).int()
    plain = ops.packed_patch_embed([rows], packed, bias)
    ours = ops.packed_patch_embed([rows], packed, bias, order=order)
    assert torch.equal(ours, plain.unflatten(0, (31, group))[order.long()].flatten(0, 1))
    assert not torch.equal(ours, plain.unflatten(0, (31, group))[order.argsort()].flatten(0, 1))
    assert error(ours, reference.patch_embed(rows, weight, bias, order=order)) < 1e-6


def test_the_position_embedding_is_that_of_the_output_row() -> None:
    rows, (weight, packed, bias) = random_rows(12), packed_weight(40)
    order, pos = torch.tensor([2, 0, 1], dtype=torch.int32), torch.randn(12, 40)
    before = pos.clone()
    exact = reference.patch_embed(rows, weight, bias, order=order, pos=pos)
    assert error(ops.packed_patch_embed([rows], packed, bias, order=order, pos=pos), exact) < 1e-6
    assert error(reference.patch_embed(rows, weight, bias, order=order, pos=pos.flip(0)), exact) > 0.1
    assert torch.equal(pos, before)


def test_a_group_may_be_taken_twice() -> None:
    rows, (_, packed, bias) = random_rows(4), packed_weight(8)
    ours = ops.packed_patch_embed([rows], packed, bias, order=torch.tensor([1, 1], dtype=torch.int32))
    assert torch.equal(ours[:2], ours[2:])


@pytest.mark.parametrize("rows", [[], [random_rows(0)], [random_rows(0), random_rows(0)]])
@pytest.mark.parametrize("order", [None, torch.empty(0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)])
def test_no_rows_give_no_rows(order: Tensor | None, rows: list[Tensor]) -> None:
    _, packed, bias = packed_weight(8)
    assert ops.packed_patch_embed(rows, packed, bias, order=order).shape == (0, 8)


def test_every_byte_is_read_exactly() -> None:
    rows = torch.arange(256).to(torch.uint8)[:, None].repeat(1, 37)
    packed = ops.pack_linear(torch.eye(37))
    ours = ops.packed_patch_embed([rows], packed, torch.zeros(37))
    assert torch.equal(ours, rows.float() - 128)


def bad_arguments() -> list[tuple[str, dict[str, object], str]]:
    bias, rows = torch.zeros(8), random_rows(2, 6)
    half = ops.pack_linear(torch.ones(8, 6).bfloat16())
    return [
        (
            "rows of floats",
            {"rows": [rows, torch.ones(2, 6)]},
            r"rows must be contiguous \[N, 6\] uint8, got \[2, 6\] f",
        ),
        ("strided rows", {"rows": [rows, random_rows(6, 2).T]}, r"got \[2, 6\] uint8 with strides \[1, 2\]"),
        (
            "another K",
            {"rows": [rows, random_rows(2, 5)]},
            r"rows must be contiguous \[N, 6\] uint8, got \[2, 5\] uint8",
        ),
        ("one row alone", {"rows": [rows[0]]}, r"rows must be contiguous \[N, 6\] uint8, got \[6\] uint8"),
        ("bfloat16 weight", {"packed": half}, r"packed must be what pack_linear made of a float32 \[8, K\], got .* bf"),
        (
            "no panels",
            {"packed": ops.PackedWeight(torch.ones(8, 6), 6)},
            r"packed must be what pack_linear .* \[8, 6\] float",
        ),
        ("another N", {"pos": torch.zeros(3, 8)}, r"pos must be contiguous \[4, 8\] float32, got \[3, 8\] float32"),
        ("bfloat16 pos", {"pos": torch.zeros(4, 8).bfloat16()}, r"pos must be .*, got \[4, 8\] bfloat16"),
        ("bfloat16 bias", {"bias": bias.bfloat16()}, r"bias must be contiguous \[8\] float32, got \[8\] bfloat16"),
        ("another D", {"bias": torch.zeros(70)}, r"packed must be what pack_linear made of a float32 \[70, K\]"),
        ("int64 order", {"order": torch.arange(4)}, r"order must be contiguous \[N / group\] int32 with N = 4, got"),
        ("no divisor", {"order": torch.arange(3).int()}, r"order must .* with N = 4, got \[3\] int32"),
        ("empty order", {"order": torch.arange(0).int()}, r"order must .* with N = 4, got \[0\] int32"),
        ("order too large", {"order": torch.tensor([0, 2]).int()}, r"order must be in \[0, 2\), got 2 at 1"),
        ("negative order", {"order": torch.tensor([-1, 0]).int()}, r"order must be in \[0, 2\), got -1 at 0"),
    ]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in bad_arguments()])
def test_a_bad_argument_is_refused_with_what_came(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "rows": [random_rows(2, 6), random_rows(2, 6)],
        "packed": ops.pack_linear(torch.ones(8, 6)),
        "bias": torch.zeros(8),
    }
    with pytest.raises(RuntimeError, match=f"^packed_patch_embed: .*{message}"):
        ops.packed_patch_embed(**{**arguments, **change})  # type: ignore[arg-type]


def test_schema_and_fake_agree_with_the_kernel() -> None:
    _, packed, bias = packed_weight(8, 6)
    for rows in ([random_rows(4, 6)], [random_rows(1, 6), random_rows(3, 6)]):
        for order in (None, torch.tensor([1, 0], dtype=torch.int32)):
            for pos in (None, torch.ones(4, 8)):
                arguments = (rows, packed.panels, bias, order, pos)
                torch.library.opcheck(torch.ops.rtp_mm.packed_patch_embed.default, arguments)


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": torch.ones(4, 6)}, r"rows must be contiguous \[N, K\] uint8, got \[4, 6\] float32"),
        ({"rows": random_rows(4, 5)}, r"weight must be \[1 or 2, D, 5\] .*, got \[1, 8, 6\]"),
        ({"weight": torch.ones(3, 8, 6)}, r"weight must be .*, got \[3, 8, 6\] float32"),
        ({"weight": torch.ones(1, 6, 8).mT}, r"weight must be .* with strides \[48, 1, 8\]"),
        ({"bias": torch.zeros(7)}, r"bias must be .*, got \[7\] float32"),
        ({"dtype": torch.int32}, r"out_dtype must be float32, bfloat16 or float16, got int32"),
    ],
)
def test_a_bad_argument_on_cuda_is_refused_with_what_came(change: dict[str, object], message: str) -> None:
    require("cuda")
    tensors = {"rows": random_rows(4, 6), "weight": torch.ones(1, 8, 6), "bias": torch.zeros(8)} | change
    arguments = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in tensors.items()}
    with pytest.raises(RuntimeError, match=f"^patch_embed: .*{message}"):
        ops.patch_embed(**{"dtype": torch.float32, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize("out_dtype", FLOATS)
def test_schema_and_fake_on_cuda_agree_with_the_kernel(out_dtype: torch.dtype) -> None:
    require("cuda")
    weight, bias = (tensor.cuda() for tensor in random_weight(2, 8, 6, torch.bfloat16))
    rows, order = random_rows(4, 6).cuda(), torch.tensor([1, 0], dtype=torch.int32, device="cuda")
    for arguments in ((None, None), (order, torch.ones(4, 8, device="cuda"))):
        values = (rows, weight, bias, 0.5, *arguments, out_dtype)
        torch.library.opcheck(torch.ops.rtp_mm.patch_embed.default, values)
