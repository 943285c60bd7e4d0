"""The documented steps of a shipped model: there by their names, and a subclass's own instead of ours."""

from __future__ import annotations

import asyncio
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.models import registry
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.multimodal_common import Embedding
from rtp_mm.models.multimodal_mixin import TowerWeights
from rtp_mm.models.qwen2_5_vl import Qwen2_5VL
from rtp_mm.models.qwen2_vl import Qwen2VLEmbedding
from rtp_mm.types import Blob, MMPreprocessConfig, MMUrlType, MultimodalInput, Patches


class Inverted(Qwen2VLEmbedding):
    def _mm_preprocess(self, data: Any, **kwargs: Any) -> Patches:
        patches = super()._mm_preprocess(data, **kwargs)
        return Patches(255 - patches.rows, patches.grid_thw)


class Doubled(Qwen2VLEmbedding):
    def mm_process(self, mm_input: Any, **kwargs: Any) -> Embedding:
        embedding, ids = super().mm_process(mm_input, **kwargs)
        return 2 * embedding, ids


def embed(part: type[Qwen2VLEmbedding], checkpoint: Path, photo: Path, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Two of the photograph, by an engine around a model with this part."""

    class Model(Qwen2_5VL):
        def _init_multimodal(self, config: GptInitModelParameters) -> None:
            self.mm_part = part(config, self.tower_config(config.mm_related_params.config))
            config.mm_related_params.vit_weights = TowerWeights(self.mm_part.tower)

    monkeypatch.setattr(registry, "_class_for", lambda folder, model_type: Model)
    monkeypatch.setitem(registry._classes, "qwen2_5_vl", Model)
    settings = load_settings(checkpoint_path=checkpoint, device="cpu", act_type="fp32", mm_embedding_cache_mb=0)

    async def ask() -> list[Tensor]:
        engine = MMProcessEngine(registry.load_model(settings), settings, asyncio.get_running_loop())
        try:
            kinds = (MMUrlType.IMAGE, MMUrlType.DEFAULT)
            answer = await engine.embed([MultimodalInput(str(photo), kind) for kind in kinds])
        finally:
            await engine.aclose()
        return answer.embeddings

    return asyncio.run(ask())


def test_a_subclass_prepares_and_processes_by_its_own_steps(
    tiny_qwen2_5_vl: Path, photo: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(photo)
    ours, inverted, doubled = (
        embed(part, tiny_qwen2_5_vl, file, monkeypatch) for part in (Qwen2VLEmbedding, Inverted, Doubled)
    )
    assert all(torch.equal(each, ours[0]) for each in ours)
    assert all(torch.equal(each, 2 * ours[0]) for each in doubled)
    assert all(each.shape == ours[0].shape and not torch.allclose(each, ours[0], atol=1e-2) for each in inverted)


def test_the_first_step_can_be_had_by_its_name(tiny_qwen2_5_vl: Path, photo: bytes) -> None:
    part = registry.load_model(load_settings(checkpoint_path=tiny_qwen2_5_vl, device="cpu", act_type="fp32")).mm_part
    config = MMPreprocessConfig(width=56, height=84)
    patches = part._mm_preprocess(BytesIO(photo), mm_type=MMUrlType.IMAGE, configs=config)
    assert part.preprocessor is not None
    expected = part.preprocessor(Blob(photo, b"", ""), MMUrlType.IMAGE, config.options())
    assert patches.grid_thw == expected.grid_thw == (1, 6, 4)
    np.testing.assert_array_equal(patches.rows, expected.rows)
    frame = np.full((1, 56, 56, 3), 9, np.uint8)
    assert part._mm_preprocess(torch.from_numpy(frame), mm_type=MMUrlType.TENSOR).grid_thw == (1, 4, 4)


def test_a_clips_bound_counts_for_the_familys_step_too(tiny_qwen2_5_vl: Path) -> None:
    """Which a subclass's own calls."""
    part = registry.load_model(load_settings(checkpoint_path=tiny_qwen2_5_vl, device="cpu", act_type="fp32")).mm_part
    assert isinstance(part, Qwen2VLEmbedding)
    unbounded = part._family_preprocessor
    part.bound_clips(10)
    assert part._family_preprocessor == part.preprocessor != unbounded


def test_types_may_be_the_numbers_that_the_documentation_uses(
    tiny_qwen2_5_vl: Path, photo: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "photo.jpg"
    file.write_bytes(photo)
    part = registry.load_model(load_settings(checkpoint_path=tiny_qwen2_5_vl, device="cpu", act_type="fp32")).mm_part
    by_number, by_name = (part.mm_embedding(str(file), kind) for kind in (1, MMUrlType.IMAGE))
    assert torch.equal(by_number[0], by_name[0])
    assert MultimodalInput("a", 2).mm_type is MMUrlType.VIDEO
