"""Loading: strict, from every published layout, and only what is needed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.registry import load_model
from rtp_mm.types import Patches
from rtp_mm.vit.checkpoint import Checkpoint
from rtp_mm.vit.weights import WeightPlan, find_prefix

Rewrite = Callable[[Callable[[dict[str, Tensor]], dict[str, Tensor]]], Path]


def load(folder: Path, **options: Any) -> Any:
    return load_model(load_settings(checkpoint_path=folder, device="cpu", **{"act_type": "fp32", **options}))


def embedding_of(model: Any) -> Tensor:
    rows = torch.arange(8 * 8 * 588).remainder(251).to(torch.uint8).view(64, 588).numpy()
    embedding: Tensor = model.mm_part.mm_process(Patches(rows, (1, 8, 8)))[0]
    return embedding


@pytest.fixture
def rewrite(tiny_qwen2_5_vl: Path, tmp_path: Path) -> Rewrite:
    """The tiny checkpoint with its tensors changed, as one safetensors file."""

    def write(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
        folder = tmp_path / "checkpoint"
        shutil.copytree(tiny_qwen2_5_vl, folder)
        tensors: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors*"):
            tensors |= load_file(file) if file.suffix == ".safetensors" else {}
            file.unlink()
        save_file(change(tensors), folder / "model.safetensors")
        return folder

    return write


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "options",
    [{"act_type": "fp32"}, {"act_type": "bf16"}, {"act_type": "fp16"}, {"act_type": "bf16", "mm_compute_type": "bf16"}],
    ids=["fp32", "bf16", "fp16", "bf16 products"],
)
def test_a_model_outlives_its_checkpoint(options: dict[str, Any], dtype: torch.dtype, rewrite: Rewrite) -> None:
    """Weights that are packed are read from the mapped file, which somebody may then write anew."""
    folder = rewrite(lambda tensors: {name: t.to(dtype) for name, t in tensors.items()})
    model = load(folder, **options)
    before = embedding_of(model).clone()
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert torch.equal(embedding_of(model), before)


@pytest.mark.parametrize("prefix", ["model.visual.", "thinker.visual."])
def test_every_published_prefix_loads(prefix: str, rewrite: Rewrite, tiny_qwen2_5_vl: Path) -> None:
    renamed = rewrite(lambda tensors: {name.replace("visual.", prefix, 1): t for name, t in tensors.items()})
    model = load(renamed)
    assert torch.equal(embedding_of(model), embedding_of(load(tiny_qwen2_5_vl)))
    assert model.weights_fingerprint == load(tiny_qwen2_5_vl).weights_fingerprint


def test_pytorch_bin_equals_safetensors(rewrite: Rewrite, tiny_qwen2_5_vl: Path) -> None:
    folder = rewrite(lambda tensors: tensors)
    file = folder / "model.safetensors"
    expected, tensors = embedding_of(load(tiny_qwen2_5_vl)), load_file(file)
    file.unlink()
    for kind in (Tensor, torch.nn.Parameter):  # a module's own state_dict(keep_vars=True)
        torch.save({name: kind(tensor) for name, tensor in tensors.items()}, folder / "pytorch_model.bin")
        assert torch.equal(embedding_of(load(folder)), expected)


def test_one_changed_weight_changes_the_fingerprint(rewrite: Rewrite, tiny_qwen2_5_vl: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["visual.merger.ln_q.weight"][0] += 1
        return tensors

    assert load(rewrite(change)).weights_fingerprint != load(tiny_qwen2_5_vl).weights_fingerprint


def test_missing_tensors_are_named(rewrite: Rewrite) -> None:
    gone = ("visual.blocks.2.attn.proj.bias", "visual.merger.mlp.2.weight")
    folder = rewrite(lambda tensors: {name: t for name, t in tensors.items() if name not in gone})
    with pytest.raises(StartError, match=f"lacks {gone[0]}, {gone[1]}"):
        load(folder)


def test_extra_tensors_are_named_but_computed_buffers_are_not(rewrite: Rewrite) -> None:
    extra = {"visual.blocks.9.norm1.weight": torch.ones(64), "visual.rotary_pos_emb.inv_freq": torch.ones(8)}
    with pytest.raises(StartError, match=r"no place for: visual\.blocks\.9\.norm1\.weight$"):
        load(rewrite(lambda tensors: {**tensors, **extra}))


def test_misshapen_tensors_are_named_with_both_shapes(rewrite: Rewrite) -> None:
    name = "visual.blocks.1.mlp.up_proj.weight"
    folder = rewrite(lambda tensors: {**tensors, name: tensors[name][:-1].clone()})
    with pytest.raises(StartError, match=r"up_proj\.weight \[171, 64\], but the configuration asks for \[344, 64\]"):
        load(folder)


def test_weights_beyond_fp16_are_refused_for_fp16_alone(rewrite: Rewrite) -> None:
    name = "visual.blocks.0.attn.qkv.weight"
    folder = rewrite(lambda tensors: {**tensors, name: tensors[name] + 1e5})
    load(folder, act_type="bf16")
    with pytest.raises(StartError, match=f"{name}: too large for fp16"):
        load(folder, act_type="fp16")


def test_a_broken_file_is_named(rewrite: Rewrite) -> None:
    folder = rewrite(lambda tensors: tensors)
    (folder / "model.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(StartError, match=r"cannot read .*model\.safetensors"):
        load(folder)
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n")
    with pytest.raises(StartError, match=r"cannot read .*model\.safetensors: a pointer of Git LFS.*git lfs pull"):
        load(folder)


def test_a_folder_without_weights_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"no weights in .*\*\.safetensors"):
        Checkpoint(tmp_path)


def test_shards_without_the_tower_are_not_opened(rewrite: Rewrite) -> None:
    folder = rewrite(lambda tensors: tensors)
    first = "model-00001-of-00002.safetensors"
    (folder / "model.safetensors").rename(folder / first)
    names = dict.fromkeys(load_file(folder / first), first)
    names["model.layers.0.mlp.up_proj.weight"] = "model-00002-of-00002.safetensors"  # there is no such file
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    load(folder)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        ({"visual.a.w", "visual.b.w"}, "visual."),
        ({"model.visual.a.w", "model.visual.b.w", "a.w"}, "model.visual."),
        ({"x.a.w", "x.b.w", "visual.a.w", "visual.b.w"}, "visual."),
    ],
)
def test_the_prefix_is_the_one_that_has_everything(names: set[str], found: str) -> None:
    plan = WeightPlan({"a": ("a.w",), "b": ("b.w",)}, "visual.", owned=("",))
    assert find_prefix(frozenset(names), plan) == found


def test_a_plan_that_owns_nothing_takes_its_own_prefix_alone() -> None:
    plan = WeightPlan({"a": ("weight",)}, "vision.projector.")
    with pytest.raises(StartError, match=r"lacks vision\.projector\.weight"):
        find_prefix(frozenset({"visual.projector.weight"}), plan)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(dtype: torch.dtype, rewrite: Rewrite) -> None:
    name = "visual.blocks.0.attn.proj.weight"
    with pytest.raises(StartError, match=f"{name} is {dtype}: quantised"):
        load(rewrite(lambda tensors: {**tensors, name: tensors[name].to(dtype)}))


def test_what_transformers_saves_loads_as_it_is(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`save_pretrained` of current transformers: nested config, defaults dropped, other prefix."""
    config = AutoConfig.from_pretrained(tiny_checkpoint)
    text = config.text_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size = 48, 64, 1, 160
    text.num_attention_heads, text.num_key_value_heads = 2, 1
    text.rope_parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 5, 5]}
    peer = AutoModelForImageTextToText.from_config(config)
    peer.model.visual.load_state_dict(
        {name.split("visual.")[1]: t for name, t in load_file(tiny_checkpoint / "model.safetensors").items()}
    )
    peer.save_pretrained(tmp_path)
    assert "vision_config" in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(embedding_of(load(tmp_path)), embedding_of(load(tiny_checkpoint)))


def test_parameters_are_the_same_from_flat_and_nested_config(tiny_checkpoint: Path, tmp_path: Path) -> None:
    flat = GptInitModelParameters.from_checkpoint(tiny_checkpoint)
    AutoConfig.from_pretrained(tiny_checkpoint).save_pretrained(tmp_path)
    nested = GptInitModelParameters.from_checkpoint(tmp_path)
    compared = ("head_num", "head_num_kv", "size_per_head", "layer_num", "hidden_size", "inter_size", "vocab_size")
    for name in (*compared, "max_seq_len", "mrope_section", "mm_position_ids_style", "model_type"):
        assert getattr(flat, name) == getattr(nested, name), name
    assert flat.mm_position_ids_style == 2
