"""The towers against Hugging Face's on the same checkpoint, and against themselves in other company."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from huggingface import HuggingFace, relative_l2
from numpy.typing import NDArray
from torch import Tensor
from towers import Load, check_batching_is_invisible, loader, multiplying_bf16

from rtp_mm import _core
from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.registry import load_model
from rtp_mm.types import Patches
from rtp_mm.vit import attention as attention_backends
from rtp_mm.vit.attention import Attention, Segments, choose_attention
from rtp_mm.vit.linear import (
    Bf16Gemm,
    Gemm,
    Int8Gemm,
    Linear,
    PackedGemm,
    choose_compute_dtype,
    choose_gemm,
)
from rtp_mm.vit.rope import RotaryTable

# Merged tokens 1, 2, 3, 5, 7, then windows whole, cut and both; sides of 28 are one merged cell.
SIDES = [(28, 28), (56, 28), (28, 84), (140, 28), (28, 196), (112, 112), (112, 224), (140, 252), (308, 196), (420, 308)]


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def model(request: pytest.FixtureRequest, tiny_checkpoint: Path) -> Load:
    """The tiny checkpoint's `mm_part` in a dtype, loaded once."""
    return loader(tiny_checkpoint, request.param)


@pytest.fixture(scope="module")
def peer(tiny_checkpoint: Path) -> HuggingFace:
    return HuggingFace(tiny_checkpoint)


@pytest.fixture(scope="module")
def images(photos: dict[str, NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    photo = max(photos.values(), key=lambda p: p.shape[0] * p.shape[1])
    return [np.ascontiguousarray(photo[:height, :width]) for height, width in SIDES]


def as_patches(peer: HuggingFace, image: NDArray[np.uint8]) -> Patches:
    """The peer's own resized bytes, so that only towers are compared; the first of two equal frames."""
    values, grid = peer.pixels(image, do_rescale=False, do_normalize=False)
    rows = values.to(torch.uint8).view(len(values), 3, 2, -1)[:, :, 0].reshape(len(values), -1)
    t, h, w = grid[0].tolist()
    return Patches(rows.numpy(), (t, h, w))


def test_float32_equals_hugging_face(model: Load, peer: HuggingFace, images: list[NDArray[np.uint8]]) -> None:
    errors = [relative_l2(model().mm_process(as_patches(peer, i))[0], peer.embed(i)) for i in images]
    assert max(errors) <= 1e-5, errors


def test_bf16_is_at_least_as_close_to_float32_as_hugging_face_bf16(
    model: Load, peer: HuggingFace, tiny_checkpoint: Path, images: list[NDArray[np.uint8]]
) -> None:
    peer_bf16 = HuggingFace(tiny_checkpoint, torch.bfloat16)
    exact = [peer.embed(i) for i in images]
    ours = [
        relative_l2(model("bf16").mm_process(as_patches(peer, i))[0], e) for i, e in zip(images, exact, strict=True)
    ]
    theirs = [relative_l2(peer_bf16.embed(i), e) for i, e in zip(images, exact, strict=True)]
    assert np.mean(ours) <= np.mean(theirs)
    assert all(o <= 1.1 * t for o, t in zip(ours, theirs, strict=True))


def test_fp16_keeps_its_own_precision(model: Load, peer: HuggingFace, images: list[NDArray[np.uint8]]) -> None:
    embedding, _ = model("fp16").mm_process(as_patches(peer, images[-1]))
    assert embedding.dtype == torch.float16
    assert relative_l2(embedding, peer.embed(images[-1])) < 1e-3  # fp16 rounds to 2^-11


def test_a_clip_equals_hugging_face(model: Load, peer: HuggingFace) -> None:
    """Both temporal frames kept, several frames in one grid."""
    t, h, w = 3, 8, 12
    rows = torch.randint(0, 256, (t * h * w, 3, 2, 14, 14), dtype=torch.uint8)
    mean = torch.tensor(peer.processor.image_mean).view(1, 3, 1, 1, 1)
    std = torch.tensor(peer.processor.image_std).view(1, 3, 1, 1, 1)
    values = ((rows / 255 - mean) / std).flatten(1)
    with torch.inference_mode():
        expected = peer.tower(values, grid_thw=torch.tensor([[t, h, w]])).pooler_output
    embedding, position_ids = model().mm_process(Patches(rows.flatten(1).numpy(), (t, h, w)))
    assert relative_l2(embedding, expected) <= 1e-5
    assert position_ids[:, 0].tolist() == [i for i in range(t) for _ in range(h * w // 4)]


def test_position_ids_are_the_merged_raster(model: Load, peer: HuggingFace, images: list[NDArray[np.uint8]]) -> None:
    patches = as_patches(peer, images[-1])
    _, h, w = patches.grid_thw
    _, position_ids = model().mm_process(patches)
    assert position_ids.dtype == torch.int32
    assert position_ids.tolist() == [[0, row, column] for row in range(h // 2) for column in range(w // 2)]


@pytest.mark.parametrize("act_type", ["fp32", "bf16", "fp16"])
def test_batching_is_invisible(act_type: str, model: Load, peer: HuggingFace, images: list[NDArray[np.uint8]]) -> None:
    items = [as_patches(peer, image) for image in images]
    clip = Patches(np.random.default_rng(0).integers(0, 256, (2 * 6 * 10, 1176), np.uint8), (2, 6, 10))
    check_batching_is_invisible(model(act_type), [*items, clip])


@pytest.fixture(scope="module")
def bf16_products(tiny_checkpoint: Path) -> Any:
    return multiplying_bf16(tiny_checkpoint)


def test_bf16_products_are_as_close_to_float32_as_hugging_face_bf16(
    bf16_products: Any, peer: HuggingFace, tiny_checkpoint: Path, images: list[NDArray[np.uint8]]
) -> None:
    peer_bf16 = HuggingFace(tiny_checkpoint, torch.bfloat16)
    exact = [peer.embed(i) for i in images]
    ours = [
        relative_l2(bf16_products.mm_process(as_patches(peer, i))[0], e) for i, e in zip(images, exact, strict=True)
    ]
    theirs = [relative_l2(peer_bf16.embed(i), e) for i, e in zip(images, exact, strict=True)]
    assert 2e-3 < np.mean(ours) <= 0.9 * np.mean(theirs)  # rounding the answer alone costs 1.7e-3
    assert all(o <= 1.1 * t for o, t in zip(ours, theirs, strict=True))


def test_batching_is_invisible_with_bf16_products(
    bf16_products: Any, peer: HuggingFace, images: list[NDArray[np.uint8]]
) -> None:
    assert bf16_products.is_reentrant
    check_batching_is_invisible(bf16_products, [as_patches(peer, image) for image in images])


@pytest.mark.parametrize(
    ("act_type", "has_bf16", "choice", "gemm", "attention"),
    [
        ("bf16", False, "auto", PackedGemm, "packed"),
        ("bf16", True, "auto", Bf16Gemm, "packed"),
        ("bf16", True, "fp32", PackedGemm, "packed"),
        ("bf16", False, "bf16", Bf16Gemm, "packed"),
        ("fp16", True, "auto", PackedGemm, "packed"),
        ("fp32", True, "auto", PackedGemm, "packed"),
    ],
)
def test_what_a_cpu_multiplies_follows_its_instructions(
    monkeypatch: pytest.MonkeyPatch,
    act_type: str,
    has_bf16: bool,
    choice: str,
    gemm: type[Gemm],
    attention: str,
) -> None:
    monkeypatch.setattr(_core, "bf16_instructions", lambda: "amx" if has_bf16 else "")
    cpu = torch.device("cpu")
    dtype = choose_compute_dtype(ACT_DTYPES[act_type], cpu, choice)
    assert choose_gemm(cpu, dtype) is gemm
    assert choose_attention("auto", dtype, cpu) == attention


def test_a_process_can_do_without_amx() -> None:
    """With products of bf16 as on a CPU that lacks it; where the CPU does, nothing changes."""
    code = "from rtp_mm import _core; print(repr(_core.bf16_instructions()))"
    run = partial(subprocess.run, [sys.executable, "-c", code], capture_output=True, text=True, check=True)
    told = run(env=os.environ | {"RTP_MM_AMX": "0"}).stdout.strip()
    assert told in ("''", "'avx512_bf16'")
    if (default := _core.bf16_instructions()) != "amx":
        assert told == repr(default)


def test_a_compute_type_that_there_is_not_is_refused() -> None:
    with pytest.raises(StartError, match=r"MM_COMPUTE_TYPE=bf16 needs ACT_TYPE=bf16"):
        choose_compute_dtype(torch.float16, torch.device("cpu"), "bf16")
    with pytest.raises(StartError, match=r"MM_COMPUTE_TYPE=fp32 needs a CPU, and the tower is on cuda"):
        choose_compute_dtype(torch.bfloat16, torch.device("cuda"), "fp32")


@pytest.mark.parametrize("gemm", [PackedGemm, Bf16Gemm])
def test_rows_of_the_chosen_gemm_do_not_depend_on_the_batch(gemm: type[Gemm]) -> None:
    """The property that batch invariance stands on, at a real layer's size."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if gemm is Bf16Gemm else torch.float32
    x, weight = (torch.randn(rows, 3420, generator=generator).to(dtype) for rows in (528, 1280))
    product = gemm(weight, torch.zeros(1280), "none")
    whole = product(x)
    for rows in (1, 2, 3, 7, 16):
        assert torch.equal(product(x[16 : 16 + rows].clone()), whole[16 : 16 + rows]), rows


@pytest.mark.parametrize("hidden", [40, 64])
@pytest.mark.parametrize("activation", ["gelu", "silu_gate"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(PackedGemm, PackedGemm), (Int8Gemm, PackedGemm), (Bf16Gemm, Bf16Gemm), (Int8Gemm, Bf16Gemm)],
)
def test_a_layer_takes_what_an_activation_gave(
    first: type[Gemm], second: type[Gemm], activation: str, hidden: int
) -> None:
    """All pairs that there are in a tower; Bf16Gemm gives columns of zeros up to a multiple, and Int8Gemm none."""
    generator = torch.Generator().manual_seed(0)
    rows = hidden * (2 if activation == "silu_gate" else 1)
    x, above, below = (torch.randn(shape, generator=generator) / 6 for shape in ((9, 36), (rows, 36), (20, hidden)))
    dtype = torch.bfloat16 if second is Bf16Gemm else torch.float32
    given = first(above, torch.zeros(rows), activation)(x.to(dtype))
    layer, out = second(below, torch.zeros(20), "none"), torch.zeros(9, 20)
    layer.add_to(out, given)
    exact = reference.packed_linear(x, above, torch.zeros(rows), activation) @ below.double().T
    assert relative_l2(out, exact) < 2e-2
    assert relative_l2(layer(given).float(), exact) < 2e-2


def test_the_fastest_backend_is_the_one_with_the_shortest_trial() -> None:
    """By a clock that the backends move."""
    now = 0.0

    def takes(seconds: float) -> Attention:
        def run(qkv: Tensor, rotary: RotaryTable, segments: Segments) -> Tensor:
            nonlocal now
            now += seconds
            return qkv[:, 0]

        return run

    def choose(name: str, **seconds: float) -> str:
        table = {backend: takes(s) for backend, s in seconds.items()}
        return choose_attention(name, torch.float32, torch.device("cpu"), table=table, clock=lambda: now)

    assert choose("fastest", flash=0.1, packed=3.0, sdpa=2.0) == "sdpa"  # flash cannot run here
    assert choose("fastest", packed=1.0, sdpa=2.0) == "packed"
    assert choose("auto", packed=3.0, sdpa=2.0) == "packed", "auto must not depend on a measurement"


def test_a_forced_backend_that_cannot_run_is_refused() -> None:
    with pytest.raises(StartError, match=r"MM_ATTENTION=flash cannot run .* usable: packed, sdpa"):
        choose_attention("flash", torch.float32, torch.device("cpu"))


@pytest.mark.parametrize(
    ("source", "choice"),
    [
        ("def flash_attn_varlen_func(): ...", "flash"),
        ("", "torch"),  # another generation's package
        ("raise ImportError('undefined symbol: _ZN3c10')", "torch"),  # built for another torch
        ("import flash_attn_2_cuda", "torch"),  # built without its kernels
    ],
)
def test_a_flash_attn_that_cannot_be_used_is_left_alone(
    source: str, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "flash_attn.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    monkeypatch.setattr(attention_backends, "_has_flash", attention_backends._has_flash.__wrapped__)  # asks anew
    try:
        assert choose_attention("auto", torch.bfloat16, torch.device("cuda")) == choice
    finally:
        sys.modules.pop("flash_attn", None)


class EmulatedFp8Gemm(PackedGemm):
    """What `Fp8Gemm` computes on a GPU, but for the order of its sums."""

    def __init__(self, weight: Tensor, bias: Tensor, activation: str) -> None:
        super().__init__(as_e4m3(weight.float()), bias, activation)

    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(as_e4m3(x))

    def add_to(self, residual: Tensor, x: Tensor) -> None:
        super().add_to(residual, as_e4m3(x))


def as_e4m3(x: Tensor) -> Tensor:
    scale = x.abs().amax(1, keepdim=True).clamp(min=1e-30) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def test_fp8_costs_some_percent_and_no_more(
    tiny_checkpoint: Path, peer: HuggingFace, images: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rtp_mm.vit.tower_base.choose_gemm", lambda *_, **__: EmulatedFp8Gemm)
    part: Any = load_model(load_settings(checkpoint_path=tiny_checkpoint, act_type="fp32", device="cpu")).mm_part
    errors = [relative_l2(part.mm_process(as_patches(peer, i))[0], peer.embed(i)) for i in images]
    assert 1e-2 < np.mean(errors) < 8e-2, errors


def test_int8_is_some_thousandths_off_and_not_for_delicate_layers(
    tiny_checkpoint: Path, peer: HuggingFace, images: list[NDArray[np.uint8]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the native code has no VNNI to use: the portable kernel gives the same bits."""
    monkeypatch.setattr(_core, "multiplies_bytes", lambda: True)
    settings = load_settings(checkpoint_path=tiny_checkpoint, act_type="fp32", device="cpu", mm_quantization="int8")
    part: Any = load_model(settings).mm_part
    items = [as_patches(peer, image) for image in images]
    errors = [relative_l2(part.mm_process(item)[0], peer.embed(i)) for item, i in zip(items, images, strict=True)]
    assert 1e-3 < np.mean(errors) < 2e-2, errors
    check_batching_is_invisible(part, items)
    is_int8 = {n: isinstance(m._gemm, Int8Gemm) for n, m in part.tower.named_modules() if isinstance(m, Linear)}
    assert {n.rsplit(".", 2)[-2] + "." + n.rsplit(".", 1)[-1] for n, yes in is_int8.items() if yes} in (
        {"attn.qkv", "attn.proj", "mlp.fc1"},
        {"attn.qkv", "attn.proj", "mlp.gate_up_proj"},
    )


def test_int8_takes_and_gives_bf16_where_the_tower_computes_in_it() -> None:
    x, weight = torch.randn(5, 40).bfloat16(), torch.randn(12, 40)
    gemm = Int8Gemm(weight, torch.zeros(12), "none")
    out = gemm(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, gemm(x.float()).bfloat16())
    assert torch.equal(gemm.in_blocks(x, 3).flatten(1), out)
    residual = torch.zeros(5, 12)
    gemm.add_to(residual, x)
    assert torch.equal(residual, gemm(x.float()))


def test_int8_is_refused_where_it_gains_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_core, "multiplies_bytes", lambda: False)
    for is_delicate in (False, True):
        with pytest.raises(StartError, match=r"MM_QUANTIZATION=int8 needs a CPU with AVX-512 VNNI or ARM's i8mm"):
            choose_gemm(torch.device("cpu"), torch.float32, quantization="int8", is_delicate=is_delicate)
    with pytest.raises(StartError, match=r"MM_QUANTIZATION=int8 needs a CPU, and the tower is on cuda"):
        choose_gemm(torch.device("cuda"), torch.bfloat16, quantization="int8")


def test_fp8_without_a_gpu_is_refused() -> None:
    with pytest.raises(StartError, match=r"MM_QUANTIZATION=fp8 needs a GPU, and the tower is on cpu"):
        choose_gemm(torch.device("cpu"), torch.float32, quantization="fp8")
