"""`ops.packed_linear` against float64, plain PyTorch and itself."""

from __future__ import annotations

import pytest
import reference
import torch
from linear_layers import ACTIVATIONS, FLOATS, error, random_layer
from torch import Tensor
from torch.nn import functional as F
from torch_threads import torch_threads

from rtp_mm import ops


def packed(x: Tensor, weight: Tensor, bias: Tensor, activation: str = "none") -> Tensor:
    return ops.packed_linear(x, ops.pack_linear(weight, 2 if activation == "silu_gate" else 1), bias, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("m", "k", "n"), [(230, 300, 100), (7, 1280, 66), (40, 129, 32), (3, 5, 6), (30, 16, 330)])
def test_error_is_at_most_twice_that_of_plain_pytorch(
    m: int, k: int, n: int, dtype: torch.dtype, activation: str
) -> None:
    x, weight, bias = random_layer(m, k, n, dtype)
    exact = reference.packed_linear(x, weight, bias, activation)
    plain = ACTIVATIONS[activation](F.linear(x, weight.float(), bias))
    # a handful of numbers may be lucky: half a unit of float32's last place is always allowed
    assert error(packed(x, weight, bias, activation), exact) <= max(2 * error(plain, exact), 2**-22)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_activations_are_exact_to_float32_over_the_whole_range(activation: str) -> None:
    """Relative to the input, and where the answer is not tiny, to the answer."""
    bias = torch.cat((torch.linspace(-14, 14, 40_001), torch.tensor([-1e30, -88.0, 88.0, 1e30, 0.0, -0.0])))
    ours = packed(torch.zeros(1, 1), torch.zeros(len(bias), 1), bias, activation)[0]
    exact = reference.packed_linear(torch.zeros(1, 1), torch.zeros(len(bias), 1), bias, activation)[0]
    difference = (ours.double() - exact).abs()
    assert float((difference / (bias.abs() + 1e-30)).max()) < 4e-7  # torch's own gelu has 3.2e-7
    is_not_tiny = (bias > -5) & (bias != 0)
    assert float((difference / exact.abs())[is_not_tiny].max()) < 2e-6


def test_nan_and_infinity_stay_where_they_are() -> None:
    x, weight, bias = random_layer(20, 40, 64)
    x[3, 7], x[5, 0] = torch.nan, torch.inf
    for activation in ACTIVATIONS:
        is_finite = packed(x, weight, bias, activation).isfinite().all(1)
        assert [i for i, finite in enumerate(is_finite) if not finite] == [3, 5], activation


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_weight_is_read_exactly(dtype: torch.dtype) -> None:
    weight = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(-1, 1)
    ours = packed(torch.ones(1, 1), weight, torch.zeros(2**16))[0]
    torch.testing.assert_close(ours, weight.float()[:, 0], rtol=0, atol=0, equal_nan=True)


def test_gate_and_up_are_not_confused() -> None:
    x, weight, bias = random_layer(5, 64, 40)
    exact = reference.packed_linear(x, weight, bias, "silu_gate")
    swapped = packed(x, weight.roll(20, 0), bias.roll(20), "silu_gate")
    assert error(packed(x, weight, bias, "silu_gate"), exact) < 1e-6 < 0.1 < error(swapped, exact)


def test_the_residual_is_added_in_place() -> None:
    x, weight, bias = random_layer(50, 200, 70)
    residual = torch.randn(50, 70)
    expected = residual + packed(x, weight, bias)
    out = residual.clone()
    assert ops.packed_linear_add_(out, x, ops.pack_linear(weight), bias) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_batching_is_invisible(activation: str) -> None:
    """Tiles are at most 224 rows high, strips 14 or fewer; both are evened out."""
    x, weight, bias = random_layer(460, 140, 70, torch.bfloat16)
    together = packed(x, weight, bias, activation)
    for begin in (0, 1, 13, 222, 450):
        for m in (1, 2, 3, 5, 7, 9, 10):
            assert torch.equal(packed(x[begin : begin + m], weight, bias, activation), together[begin : begin + m])
    assert torch.equal(packed(x[5:305], weight, bias, activation), together[5:305])


@pytest.mark.parametrize("kind", ["float32", "bf16", "int8"])
@pytest.mark.parametrize(("m", "k", "n"), [(460, 140, 70), (400, 4096, 1024)])
def test_the_thread_count_is_invisible(kind: str, m: int, k: int, n: int) -> None:
    """Nor is how the work is cut into tiles for it: the larger layer, by AMX, has two blocks of rows, and tiles of 8, 6
    and 4 panels."""
    x, weight, bias = random_layer(m, k, n)
    pack = {"float32": ops.pack_linear, "bf16": ops.pack_bf16_linear, "int8": ops.pack_int8_linear}[kind]
    if kind == "bf16":
        x, weight = x.bfloat16(), weight.bfloat16()
    layer = (x, pack(weight), bias)
    results = []
    for threads in (1, 2, 3):
        with torch_threads(threads):
            results.append(ops.packed_linear(*layer))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    assert torch.equal(ops.packed_linear(x[150:152].clone(), *layer[1:]), results[0][150:152])


def test_packing_keeps_the_bytes() -> None:
    """Every weight once, in its own type; padding is zero."""
    weight = torch.arange(1, 41, dtype=torch.bfloat16).view(20, 2)
    for parts in (1, 2):
        packed_weight = ops.pack_linear(weight, parts).panels
        assert packed_weight.shape == (1, 2, 32)
        assert packed_weight.dtype == weight.dtype
        assert packed_weight.sort(stable=True).values.flatten().sort().values[-40:].equal(weight.flatten())
        assert int((packed_weight != 0).sum()) == weight.numel()


@pytest.mark.parametrize(
    ("rows", "parts", "shape"),
    [
        *[(16, 1, (1, 16)), (64, 1, (1, 64)), (65, 1, (2, 48)), (200, 1, (4, 64)), (1280, 1, (20, 64))],
        *[(32, 2, (1, 32)), (48, 2, (1, 64)), (96, 2, (2, 64)), (6840, 2, (107, 64))],
    ],
)
def test_panels_are_few_and_no_wider_than_the_weight(rows: int, parts: int, shape: tuple[int, int]) -> None:
    """Else a narrow tower multiplies zeros."""
    packed = ops.pack_linear(torch.ones(rows, 3), parts).panels
    assert packed.shape == (shape[0], 3, shape[1])
    assert int(packed.sum()) == 3 * rows


@pytest.mark.parametrize("activation", ["none", "silu_gate"])
def test_blocks_are_the_columns_in_pieces(activation: str) -> None:
    """Of 2 columns, and of 100, which tiles of 128 columns cut; in a gated layer tiles have 64."""
    x, weight, bias = random_layer(230, 30, 600)
    panels, parts = (
        ops.pack_linear(weight, 2 if activation == "silu_gate" else 1),
        2 if activation == "silu_gate" else 1,
    )
    whole = ops.packed_linear(x, panels, bias, activation)
    for blocks in (1, 3, 300 // parts):
        pieces = ops.packed_linear_blocks(x, panels, bias, blocks, activation)
        assert pieces.is_contiguous()
        assert torch.equal(pieces, whole.unflatten(1, (blocks, -1)).transpose(0, 1))


def test_blocks_must_fit() -> None:
    x, weight, bias = random_layer(2, 4, 6)
    with pytest.raises(RuntimeError, match=r"^packed_linear: blocks must divide the 6 columns of the output, got 4"):
        ops.packed_linear_blocks(x, ops.pack_linear(weight), bias, 4)


def test_no_rows_give_no_rows() -> None:
    _, weight, bias = random_layer(1, 8, 6)
    assert packed(torch.empty(0, 8), weight, bias, "silu_gate").shape == (0, 3)


def bad_arguments() -> list[tuple[str, dict[str, object], str]]:
    return [
        ("a batch of matrices", {"x": torch.ones(1, 4, 6)}, r"x must be \[M, K\] .*, got \[1, 4, 6\]"),
        ("rows apart", {"x": torch.ones(4, 8)[:, :6]}, r"x must be \[M, K\] float32, contiguous, .* strides \[8, 1\]"),
        (
            "columns apart",
            {
                "x": torch.ones(4, 12).bfloat16()[:, ::2],
                "packed": ops.pack_bf16_linear(torch.ones(8, 6).bfloat16()),
            },
            r"x must be .* or bfloat16, each row contiguous, .* strides \[12, 2\]",
        ),
        ("float16 x", {"x": torch.ones(4, 6).half()}, r"x must be .*, got \[4, 6\] float16"),
        (
            "bfloat16 x, packed for float32",
            {"x": torch.ones(4, 6).bfloat16(), "packed": ops.pack_linear(torch.ones(8, 6).bfloat16())},
            r"packed must be what pack_bf16_linear made of \[8, 6\], got \[1, 6, 16\] bfloat16",
        ),
        (
            "float32 x, packed for bfloat16",
            {"packed": ops.pack_bf16_linear(torch.ones(8, 6).bfloat16())},
            r"packed must be what pack_linear made of \[8, 6\], got \[1, 16, 32\] bfloat16",
        ),
        (
            "K of another weight",
            {"x": torch.ones(4, 5), "packed": ops.pack_linear(torch.ones(8, 6))._replace(k=5)},
            r"packed must be what pack_linear made of \[8, 5\], got \[1, 6, 16\]",
        ),
        (
            "unpacked",
            {"packed": ops.PackedWeight(torch.ones(8, 6), 6)},
            r"packed must be what pack_linear made of \[8, 6\], got \[8, 6\]",
        ),
        ("bfloat16 bias", {"bias": torch.zeros(8).bfloat16()}, r"bias must be .*, got \[8\] bfloat16"),
        ("no scales", {"packed": ops.pack_int8_linear(torch.ones(8, 6))._replace(scales=None)}, "scales .*, got None"),
        (
            "sums of floats",
            {"packed": ops.pack_linear(torch.ones(8, 6))._replace(sums=torch.zeros(8, dtype=torch.int32))},
            r"sums must be None for a weight of floats, got \[8\] int32",
        ),
        ("another N", {"bias": torch.zeros(65)}, r"packed must be what pack_linear made of \[65, 6\]"),
        ("odd gate", {"bias": torch.zeros(7), "activation": "silu_gate"}, r"N divisible by 2, got \[7\] float32"),
        ("activation", {"activation": "relu"}, r"activation must be none, gelu, quick_gelu or silu_gate, got relu"),
    ]


@pytest.mark.parametrize(("change", "message"), [pytest.param(c, m, id=i) for i, c, m in bad_arguments()])
def test_a_bad_argument_is_refused_with_what_came(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        "x": torch.ones(4, 6),
        "packed": ops.pack_linear(torch.ones(8, 6)),
        "bias": torch.zeros(8),
    }
    with pytest.raises(RuntimeError, match=f"^packed_linear: .*{message}"):
        ops.packed_linear(**{**arguments, **change})  # type: ignore[arg-type]


FORMATS = {  # how a weight is packed, and the dtype of x
    "float32": (ops.pack_linear, torch.float32),
    "bfloat16": (lambda weight: ops.pack_linear(weight.bfloat16()), torch.float32),
    "float16": (lambda weight: ops.pack_linear(weight.half()), torch.float32),
    "int8": (ops.pack_int8_linear, torch.float32),
    "pairs of bfloat16": (lambda weight: ops.pack_bf16_linear(weight.bfloat16()), torch.bfloat16),
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_another_k_is_refused_by_the_kernel_and_by_its_fake(kind: str, device: str) -> None:
    """Also where the weight's zeros would hide it: K is 40, and 64 with them. Only pairs take these columns."""
    pack, dtype = FORMATS[kind]
    _, weight, bias = random_layer(1, 40, 8)
    packed = ops.PackedWeight(*(p.to(device) if isinstance(p, Tensor) else p for p in pack(weight)))
    bias, out = bias.to(device), torch.zeros(4, 8, device=device)
    taken = (40, 64) if dtype == torch.bfloat16 else (40,)
    for k in taken:
        x = torch.ones(4, k, dtype=dtype, device=device)
        assert ops.packed_linear(x, packed, bias).shape == ops.packed_linear_add_(out, x, packed, bias).shape == (4, 8)
    for k in {8, 33, 39, 41, 63, 64, 65, 80} - {*taken}:
        x = torch.ones(4, k, dtype=dtype, device=device)
        message = rf"^packed_linear: x must be .* with K = 40, .*got \[4, {k}\]"
        with pytest.raises(RuntimeError, match=message):
            ops.packed_linear(x, packed, bias)
        with pytest.raises(RuntimeError, match=message):
            ops.packed_linear_add_(out, x, packed, bias)


@pytest.mark.parametrize("blocks", [1, 5, 10])  # of 320 columns, of which a panel has 64
def test_what_is_made_for_a_linear_layer_is_the_same_with_rows_apart(blocks: int) -> None:
    rows, weight, bias = random_layer(9, 64, 320)
    for x, packed in ((rows, ops.pack_linear(weight)), (rows.bfloat16(), ops.pack_bf16_linear(weight.bfloat16()))):
        plain, apart = (ops.packed_linear_blocks(x, packed, bias, blocks, for_linear=value) for value in (False, True))
        assert torch.equal(plain, apart)
        width = 320 // blocks
        assert apart.stride(1) == ops.linear_row_stride(width, x.dtype, for_linear=True)
        assert plain.is_contiguous()


def test_packing_and_adding_refuse_what_does_not_fit() -> None:
    with pytest.raises(RuntimeError, match=r"^pack_linear: parts must be 1 or 2 and divide N = 3, got 2"):
        ops.pack_linear(torch.ones(3, 2), 2)
    with pytest.raises(RuntimeError, match=r"^pack_linear: weight must be contiguous .*, got \[3, 2\] float64"):
        ops.pack_linear(torch.ones(3, 2).double())
    with pytest.raises(
        RuntimeError, match=r"^packed_linear_add_: out must be contiguous \[4, 8\] float32, got \[4, 7\]"
    ):
        ops.packed_linear_add_(torch.ones(4, 7), torch.ones(4, 6), ops.pack_linear(torch.ones(8, 6)), torch.zeros(8))


@pytest.mark.parametrize("dtype", FLOATS)
def test_schema_and_fake_agree_with_the_kernel(dtype: torch.dtype) -> None:
    x, weight, bias = random_layer(4, 6, 40, dtype)
    for parts in (1, 2):
        for rows in (0, 2, 40, 140):
            torch.library.opcheck(torch.ops.rtp_mm.pack_linear.default, (torch.ones(rows, 6, dtype=dtype), parts))
    for parts, activation in ((1, "gelu"), (2, "silu_gate")):
        for pack in (ops.pack_linear, ops.pack_int8_linear):
            arguments = (x, *pack(weight, parts), bias, activation, 2)
            torch.library.opcheck(torch.ops.rtp_mm.packed_linear.default, arguments)
            torch.library.opcheck(torch.ops.rtp_mm.packed_linear.default, (*arguments, True))
        halves = (x.bfloat16(), *ops.pack_bf16_linear(weight.bfloat16(), parts), bias, activation, 2)
        torch.library.opcheck(torch.ops.rtp_mm.packed_linear.default, halves)
        torch.library.opcheck(torch.ops.rtp_mm.packed_linear.default, (*halves, True))
    for m in (0, 1):
        few = (x[:m].bfloat16(), *ops.pack_bf16_linear(weight.bfloat16()), bias, "gelu", 1, True)
        torch.library.opcheck(torch.ops.rtp_mm.packed_linear.default, few)
    adding = (torch.ones(4, 40), x, *ops.pack_linear(weight), bias)
    torch.library.opcheck(torch.ops.rtp_mm.packed_linear_add_.default, adding)
