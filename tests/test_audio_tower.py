"""The audio tower against Hugging Face's on the same checkpoint, and against itself in other company."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface import relative_l2
from sounds import speech
from towers import Load, check_batching_is_invisible, loader, multiplying_bf16

from rtp_mm.cli.hugging_face_audio import HuggingFaceAudioPeer
from rtp_mm.config import load_settings
from rtp_mm.errors import ProcessError, StartError
from rtp_mm.models.registry import load_model
from rtp_mm.random_checkpoint import checkpoint_tensors, model_config, write_checkpoint
from rtp_mm.types import Blob, LogMel, MMUrlType, PreprocessOptions

CPU = torch.device("cpu")
# 1, 1, 1, 2, 3 and 5 tokens, odd and even steps, then seconds, and the edges of 30 s.
LENGTHS = [321, 640, 961, 1281, 2000, 3333, 16001, 479999]


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def model(request: pytest.FixtureRequest, tiny_qwen2_audio: Path) -> Load:
    """The tiny checkpoint's `mm_part` in a dtype, loaded once."""
    return loader(tiny_qwen2_audio, request.param)


@pytest.fixture(scope="module")
def peer(tiny_qwen2_audio: Path) -> HuggingFaceAudioPeer:
    return HuggingFaceAudioPeer(tiny_qwen2_audio, torch.float32, CPU)


def prepare(part: Any, length: int, seed: int = 0) -> LogMel:
    prepared = part.preprocessor(Blob(speech(length, seed), b"", ""), MMUrlType.TENSOR, PreprocessOptions())
    assert isinstance(prepared, LogMel)
    return prepared


def test_float32_equals_hugging_face(model: Load, peer: HuggingFaceAudioPeer) -> None:
    part = model()
    errors = [relative_l2(part.mm_process(prepare(part, n)), peer.embed(speech(n))) for n in LENGTHS]
    assert max(errors) <= 1e-5, errors


def test_tokens_follow_the_published_rule(model: Load) -> None:
    part = model()
    for length in LENGTHS:
        frames = -(-length // 160)
        steps = (frames - 1) // 2 + 1
        prepared = prepare(part, length)
        assert part.patches(prepared) == prepared.steps == steps
        assert len(part.mm_process(prepared)) == (steps - 2) // 2 + 1


def test_bf16_is_at_least_as_close_to_float32_as_hugging_face_bf16(
    model: Load, peer: HuggingFaceAudioPeer, tiny_qwen2_audio: Path
) -> None:
    peer_bf16 = HuggingFaceAudioPeer(tiny_qwen2_audio, torch.bfloat16, CPU)
    part = model("bf16")
    ours, theirs = [], []
    for seed, length in enumerate([*LENGTHS[:7], 12345]):
        exact = peer.embed(speech(length, seed))
        ours.append(relative_l2(part.mm_process(prepare(part, length, seed)), exact))
        theirs.append(relative_l2(peer_bf16.embed(speech(length, seed)), exact))
    assert np.mean(ours) <= np.mean(theirs)
    assert all(o <= 1.1 * t for o, t in zip(ours, theirs, strict=True))


def test_bf16_products_are_as_close_to_float32_as_hugging_face_bf16_whatever_the_company(
    peer: HuggingFaceAudioPeer, tiny_qwen2_audio: Path
) -> None:
    peer_bf16 = HuggingFaceAudioPeer(tiny_qwen2_audio, torch.bfloat16, CPU)
    part = multiplying_bf16(tiny_qwen2_audio)
    exact = [peer.embed(speech(n)) for n in LENGTHS]
    ours = [relative_l2(part.mm_process(prepare(part, n)), e) for n, e in zip(LENGTHS, exact, strict=True)]
    theirs = [relative_l2(peer_bf16.embed(speech(n)), e) for n, e in zip(LENGTHS, exact, strict=True)]
    assert 2e-3 < np.mean(ours) <= 0.9 * np.mean(theirs)  # rounding the answer alone costs 1.7e-3
    check_batching_is_invisible(part, [prepare(part, n, seed) for seed, n in enumerate(LENGTHS[:6])])


def test_fp16_keeps_its_own_precision(model: Load, peer: HuggingFaceAudioPeer) -> None:
    part = model("fp16")
    embedding = part.mm_process(prepare(part, 50000))
    assert embedding.dtype == torch.float16
    assert relative_l2(embedding, peer.embed(speech(50000))) < 2e-3  # fp16 rounds to 2^-11


@pytest.mark.parametrize("act_type", ["fp32", "bf16", "fp16"])
def test_batching_is_invisible(act_type: str, model: Load) -> None:
    part = model(act_type)
    check_batching_is_invisible(part, [prepare(part, length, seed) for seed, length in enumerate(LENGTHS[:8])])


def test_rows_that_no_preprocessor_makes_are_refused_before_the_device(model: Load) -> None:
    part = model()
    for shape in ((6, 64), (5, 128), (2, 128), (3004, 128)):
        with pytest.raises(ProcessError, match="log-mel rows must be"):
            part.mm_process(LogMel(np.zeros(shape, np.float32)))


def test_published_shapes_are_what_transformers_expects(tmp_path: Path) -> None:
    from transformers import AutoConfig
    from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioForConditionalGeneration

    (tmp_path / "config.json").write_text(json.dumps(model_config("qwen2_audio", "7b")))
    with torch.device("meta"):
        theirs = Qwen2AudioForConditionalGeneration(AutoConfig.from_pretrained(tmp_path))
    expected = {name: tuple(tensor.shape) for name, tensor in theirs.state_dict().items()}
    tower, language = checkpoint_tensors("qwen2_audio", "7b", prefix="model.")
    assert {spec.name: spec.shape for spec in [*tower, *language]} == expected
    assert sum(spec.nbytes for spec in tower if ".audio_tower." in spec.name) // 2 == 636_968_960
    assert len(tower) == 487 + 2


def test_a_checkpoint_as_saved_by_transformers_5_loads(tiny_qwen2_audio: Path, model: Load, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen2_audio", "tiny", prefix="model.", sparse_llm=True)
    part = load_model(load_settings(checkpoint_path=tmp_path, act_type="fp32", device="cpu")).mm_part
    assert part.mm_process(prepare(part, 5000)).isfinite().all()


def test_a_checkpoint_with_a_missing_or_an_extra_tensor_is_refused(tiny_qwen2_audio: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_qwen2_audio / "model.safetensors")
    for change, message in (
        ({"audio_tower.layers.0.self_attn.k_proj.bias": torch.zeros(64)}, r"no place for: .*k_proj\.bias"),
        ({"multi_modal_projector.linear.bias": None}, r"lacks multi_modal_projector\.linear\.bias"),
    ):
        folder = tmp_path / str(len(message))
        shutil.copytree(tiny_qwen2_audio, folder)
        changed = {name: tensor for name, tensor in (tensors | change).items() if tensor is not None}
        save_file(changed, folder / "model.safetensors")
        with pytest.raises(StartError, match=message):
            load_model(load_settings(checkpoint_path=folder, act_type="fp32", device="cpu"))


def test_a_tower_that_does_not_fit_its_feature_extractor_is_refused(tiny_qwen2_audio: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_qwen2_audio, folder)
    (folder / "preprocessor_config.json").write_text('{"feature_size": 80}')
    with pytest.raises(StartError, match=r"\(128, 3000\) in its config\.json, \(80, 3000\) for its sounds"):
        load_model(load_settings(checkpoint_path=folder, act_type="fp32", device="cpu"))
