"""Random checkpoints are what the published ones are, for everybody who reads them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoConfig, AutoImageProcessor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from rtp_mm.errors import StartError
from rtp_mm.random_checkpoint import checkpoint_tensors, model_config, write_checkpoint

HF_TOWERS = {"qwen2_vl": Qwen2VisionTransformerPretrainedModel, "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel}
PUBLISHED = [("qwen2_vl", "2b"), ("qwen2_vl", "7b"), ("qwen2_5_vl", "3b"), ("qwen2_5_vl", "7b")]


def hf_tower(folder: Path) -> Any:
    """Hugging Face's tower of a single-file checkpoint, every tensor loaded by its name, strictly."""
    config = AutoConfig.from_pretrained(folder)
    tower = HF_TOWERS[config.model_type]._from_config(config.vision_config, dtype=torch.float32)
    tensors = load_file(folder / "model.safetensors")
    tower.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in tensors.items()}, strict=True)
    return tower.eval()


def test_transformers_loads_every_tensor_by_name(tiny_checkpoint: Path) -> None:
    tower = hf_tower(tiny_checkpoint)
    assert tower.config.depth == 4
    assert tower.merger.mlp[2].out_features == AutoConfig.from_pretrained(tiny_checkpoint).text_config.hidden_size


@pytest.mark.parametrize(("family", "size"), PUBLISHED)
def test_published_sizes_have_the_shapes_transformers_expects(family: str, size: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config(family, size)))
    with torch.device("meta"):
        tower = HF_TOWERS[family]._from_config(AutoConfig.from_pretrained(tmp_path).vision_config)
    expected = {f"visual.{name}": tuple(tensor.shape) for name, tensor in tower.state_dict().items()}
    assert {spec.name: spec.shape for spec in checkpoint_tensors(family, size)[0]} == expected


@pytest.mark.parametrize(
    ("family", "size", "tower", "total"),
    [
        ("qwen2_vl", "2b", 665_271_296, None),
        ("qwen2_vl", "7b", 675_759_104, 8_291_375_616),
        ("qwen2_5_vl", "3b", 668_684_288, None),
        ("qwen2_5_vl", "7b", 676_550_144, 8_292_166_656),
    ],
)
def test_parameter_counts_are_the_published_ones(family: str, size: str, tower: int, total: int | None) -> None:
    ours, language = (sum(spec.nbytes for spec in specs) // 2 for specs in checkpoint_tensors(family, size))
    assert ours == tower
    assert total in (None, ours + language)


def test_transformers_reads_the_preprocessor_config(tiny_checkpoint: Path) -> None:
    processor = AutoImageProcessor.from_pretrained(tiny_checkpoint)
    assert type(processor).__name__ == "Qwen2VLImageProcessorPil"
    assert (processor.patch_size, processor.merge_size, processor.temporal_patch_size) == (14, 2, 2)
    assert (processor.size["shortest_edge"], processor.size["longest_edge"]) == (3136, 12845056)


@torch.inference_mode()
def test_activations_stay_near_one(tiny_checkpoint: Path) -> None:
    """Unit noise gives embeddings of about unit size that differ from token to token."""
    pixels = torch.randn(256, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    embedding = hf_tower(tiny_checkpoint)(pixels, grid_thw=torch.tensor([[1, 16, 16]])).pooler_output
    assert embedding.shape == (64, 48)
    assert 0.2 < embedding.std() < 2
    assert embedding.std(dim=0).mean() > 0.1


def test_the_seed_alone_decides_the_weights(tmp_path: Path) -> None:
    """Not the shards, and not the language model beside the tower."""
    write_checkpoint(tmp_path / "whole", "qwen2_vl", "tiny", seed=1)
    write_checkpoint(tmp_path / "shards", "qwen2_vl", "tiny", seed=1, shard_bytes=200_000, sparse_llm=True)
    write_checkpoint(tmp_path / "other", "qwen2_vl", "tiny", seed=2)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    other = load_file(tmp_path / "other" / "model.safetensors")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    for name, tensor in whole.items():
        with safe_open(tmp_path / "shards" / index[name], "pt") as shard:
            assert torch.equal(shard.get_tensor(name), tensor)
        assert not torch.equal(other[name], tensor)


def test_sparse_language_model_takes_no_disk(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2_5_vl", "tiny", sparse_llm=True, shard_bytes=1_000_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    tower, language = checkpoint_tensors("qwen2_5_vl", "tiny")
    assert index["weight_map"].keys() == {spec.name for spec in [*tower, *language]}
    assert index["metadata"]["total_size"] == sum(spec.nbytes for spec in [*tower, *language])
    files = [file.stat() for file in tmp_path.glob("*.safetensors")]
    assert sum(file.st_size for file in files) > index["metadata"]["total_size"]
    assert sum(file.st_blocks * 512 for file in files) < 2 * sum(spec.nbytes for spec in tower)
    with safe_open(tmp_path / index["weight_map"]["model.embed_tokens.weight"], "pt") as shard:
        assert shard.get_tensor("model.embed_tokens.weight").count_nonzero() == 0


def test_new_prefix_renames_tower_and_language_model() -> None:
    tower, language = checkpoint_tensors("qwen2_5_vl", "7b", prefix="model.visual.")
    assert all(spec.name.startswith("model.visual.") for spec in tower)
    assert {spec.name.split(".layers")[0] for spec in language} == {
        "model.language_model", "model.language_model.embed_tokens.weight", "model.language_model.norm.weight",
        "lm_head.weight",
    }  # fmt: skip


def test_progress_ends_at_the_whole_tower(tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    write_checkpoint(tmp_path, "qwen2_vl", "tiny", sparse_llm=True, progress=lambda *call: calls.append(call))
    total = sum(spec.nbytes for spec in checkpoint_tensors("qwen2_vl", "tiny")[0])
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)


def test_missing_model_names_those_that_exist() -> None:
    with pytest.raises(StartError, match=r"no qwen2_5_vl 2b.*qwen2_vl 2b.*qwen2_5_vl 3b"):
        checkpoint_tensors("qwen2_5_vl", "2b")


def test_existing_checkpoint_is_left_alone(tiny_checkpoint: Path) -> None:
    before = {file: os.stat(file).st_mtime_ns for file in tiny_checkpoint.iterdir()}
    with pytest.raises(StartError, match="already holds a checkpoint"):
        write_checkpoint(tiny_checkpoint, "qwen2_vl", "tiny", seed=1)
    assert before == {file: os.stat(file).st_mtime_ns for file in tiny_checkpoint.iterdir()}
