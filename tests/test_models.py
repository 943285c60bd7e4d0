"""What a family makes of a `config.json`, and which class serves which checkpoint."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch_threads import torch_threads

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.models.qwen2_5_vl import Qwen2_5VL
from rtp_mm.models.qwen2_audio import Qwen2Audio
from rtp_mm.models.qwen2_vl import Qwen2VL
from rtp_mm.models.registry import load_model
from rtp_mm.vit.tower import window_lengths


def test_a_resaved_qwen2_vl_without_defaults_is_the_7b() -> None:
    """A real fine-tune's `vision_config` holds three keys; the rest are class defaults."""
    config = Qwen2VL.tower_config({"in_chans": 3, "model_type": "qwen2_vl", "spatial_patch_size": 14})
    assert (config.depth, config.hidden_size, config.head_dim) == (32, 1280, 80)
    assert (config.intermediate_size, config.out_hidden_size) == (5120, 3584)
    assert (config.activation, config.window) == ("quick_gelu", 0)


def test_hidden_size_means_the_language_model_in_one_family_and_the_tower_in_the_other() -> None:
    qwen2 = Qwen2VL.tower_config({"embed_dim": 1280, "hidden_size": 1536})
    qwen2_5 = Qwen2_5VL.tower_config({"hidden_size": 1280, "out_hidden_size": 2048})
    assert (qwen2.hidden_size, qwen2.out_hidden_size) == (1280, 1536)
    assert (qwen2_5.hidden_size, qwen2_5.out_hidden_size) == (1280, 2048)


def test_a_window_is_counted_in_merged_cells() -> None:
    config = Qwen2_5VL.tower_config({})
    assert config.window == 4
    assert config.full_attention_blocks == {7, 15, 23, 31}
    assert window_lengths([(1, 20, 12)], merge=2, window=4) == [64, 32, 64, 32, 32, 16]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    return tmp_path


def test_an_unknown_model_says_what_is_known(folder: Path) -> None:
    with pytest.raises(StartError, match=r"'llama'.*known: qwen2_5_vl, qwen2_audio, qwen2_vl.*MM_MODEL_MODULE"):
        load_model(load_settings(checkpoint_path=folder))


def test_an_unknown_model_type_says_what_is_known(folder: Path) -> None:
    with pytest.raises(StartError, match=r"MODEL_TYPE=llava is unknown; known: qwen2_5_vl, qwen2_audio, qwen2_vl"):
        load_model(load_settings(checkpoint_path=folder, model_type="llava"))


def test_a_folder_without_config_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"config\.json is missing: CHECKPOINT_PATH must be a model's folder"):
        load_model(load_settings(checkpoint_path=tmp_path))


def test_no_folder_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="is no folder"):
        load_model(load_settings(checkpoint_path=tmp_path / "absent"))


@pytest.mark.parametrize("device", ["tpu9", "cuda:99"])
def test_a_device_that_is_not_there_is_named(device: str, tiny_qwen2_vl: Path) -> None:
    with pytest.raises(StartError, match=f"DEVICE={device}"):
        load_model(load_settings(checkpoint_path=tiny_qwen2_vl, device=device))


@pytest.mark.parametrize("module", ["no_such_module_anywhere", "/no/such/file.py"])
def test_a_third_party_module_that_is_not_there_is_named(module: str, tiny_qwen2_vl: Path) -> None:
    with pytest.raises(StartError, match=f"MM_MODEL_MODULE={module}"):
        load_model(load_settings(checkpoint_path=tiny_qwen2_vl, mm_model_module=module))


def test_a_model_type_may_force_a_family(tiny_qwen2_vl: Path) -> None:
    with pytest.raises(StartError, match=r"MODEL_TYPE=qwen2_5_vl, but config\.json says qwen2_vl: .*lacks"):
        load_model(load_settings(checkpoint_path=tiny_qwen2_vl, model_type="qwen2_5_vl", device="cpu"))


def test_rtp_llms_name_of_qwen2_audio_is_one(tiny_qwen2_audio: Path, tiny_qwen2_vl: Path) -> None:
    """Its MODEL_TYPE serves the same class, which is called by the checkpoint's own name."""
    model = load_model(load_settings(checkpoint_path=tiny_qwen2_audio, model_type="qwen_v2_audio", device="cpu"))
    assert isinstance(model, Qwen2Audio)
    assert model.config.model_type == "qwen2_audio"
    with pytest.raises(StartError, match=r"MODEL_TYPE=qwen_v2_audio, but config\.json says qwen2_vl: .*lacks"):
        load_model(load_settings(checkpoint_path=tiny_qwen2_vl, model_type="qwen_v2_audio", device="cpu"))


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        ({"depth": None}, "depth must be a positive integer, got None"),
        ({"num_heads": 0}, "num_heads must be a positive integer, got 0"),
        ({"num_heads": 3}, "1280 channels cannot be 3 heads"),
        ({"patch_size": 0}, "patch_size must be a positive integer"),
        ({"window_size": -112}, "window must not be negative"),
    ],
)
def test_a_tower_that_cannot_be_is_refused(vision: dict[str, object], text: str) -> None:
    with pytest.raises(StartError, match=text):
        Qwen2_5VL.tower_config(vision)


@pytest.mark.parametrize("config", [{"vision_config": [1]}, {"text_config": "x"}, {"rope_scaling": "yarn"}])
def test_a_nested_value_that_is_no_object_is_named(config: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", **config}))
    with pytest.raises(StartError, match=f"{next(iter(config))} must be an object"):
        load_model(load_settings(checkpoint_path=tmp_path))


def with_text_width(checkpoint: Path, folder: Path, width: int | None, *, nested: bool) -> Path:
    """A copy whose language model has that `hidden_size`, or none, in the flat `config.json` or nested."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config.pop("hidden_size", None)
    text = config.setdefault("text_config", {}) if nested else config
    text |= {"hidden_size": width}
    if width is None:
        del text["hidden_size"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("nested", [False, True])
def test_a_tower_of_another_width_than_the_language_model_is_refused(
    nested: bool, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    wrong = with_text_width(tiny_checkpoint, tmp_path / "wrong", 64, nested=nested)
    with pytest.raises(
        StartError, match=r"48 of its tower \(merger\.mlp\.2\), 64 of its language model \(hidden_size\)"
    ):
        load_model(load_settings(checkpoint_path=wrong, device="cpu"))
    for name, width in (("right", 48), ("unknown", None)):
        folder = with_text_width(tiny_checkpoint, tmp_path / name, width, nested=nested)
        load_model(load_settings(checkpoint_path=folder, device="cpu"))


def test_a_sounds_projector_of_another_width_than_the_language_model_is_refused(
    tiny_qwen2_audio: Path, tmp_path: Path
) -> None:
    """The projector's width is the language model's own, as nothing else in `config.json` says it."""
    wrong = with_text_width(tiny_qwen2_audio, tmp_path / "wrong", 64, nested=True)
    with pytest.raises(StartError, match=r"multi_modal_projector\.linear\.weight \[48, 64\], .* asks for \[64, 64\]"):
        load_model(load_settings(checkpoint_path=wrong, device="cpu"))


@pytest.mark.parametrize(
    ("family", "vision", "text"),
    [
        (Qwen2VL, {"embed_dim": 1280, "hidden_size": 1536}, {"hidden_size": 1536}),  # 2B
        (Qwen2VL, {"in_chans": 3, "spatial_patch_size": 14}, {"hidden_size": 3584}),  # a fine-tuned 7B, saved again
        (Qwen2VL, {"hidden_size": 8192}, {}),  # a 72B saved again: the language model's class default
        (Qwen2_5VL, {"hidden_size": 1280, "out_hidden_size": 2048}, {"hidden_size": 2048}),  # 3B
        (Qwen2_5VL, {"hidden_size": 1280}, {"hidden_size": 3584}),  # a 7B saved again
        (Qwen2_5VL, {"hidden_size": 1280, "out_hidden_size": 5120}, {"hidden_size": 5120}),  # 32B
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_what_is_published_agrees_on_the_width_of_embeddings(
    nested: bool, family: type[Qwen2VL], vision: dict[str, object], text: dict[str, int], tmp_path: Path
) -> None:
    """Or does not say the language model's."""
    config = {"vision_config": vision, **({"text_config": text} if nested else text)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    parameters = family._create_config(str(tmp_path))
    width = family.tower_config(parameters.mm_related_params.config).out_hidden_size
    assert parameters.hidden_size == (width if text else 0)


def test_a_tower_of_nan_does_not_start(tiny_qwen2_vl: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_qwen2_vl, tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["visual.blocks.1.attn.proj.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    with pytest.raises(StartError, match="NaN or infinite values of a grey image"):
        load_model(load_settings(checkpoint_path=tmp_path / "nan", device="cpu"))


def test_torch_threads_count_for_the_thread_that_runs_the_tower(tiny_qwen2_vl: Path) -> None:
    with torch_threads():
        for threads in (1, 3):
            load_model(load_settings(checkpoint_path=tiny_qwen2_vl, mm_torch_threads=threads))
            with ThreadPoolExecutor(1) as another:
                assert another.submit(torch.get_num_threads).result() == threads
        load_model(load_settings(checkpoint_path=tiny_qwen2_vl))
        assert torch.get_num_threads() == 3
