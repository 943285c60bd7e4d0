"""A third party's model file, written against the documented interface, is registered, served, batched and cached."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from running_server import running_server
from safetensors.torch import save_file
from torch import Tensor

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.library import load_engine
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.models.multimodal_mixin import BaseVitWeights, MultimodalMixin
from rtp_mm.models.registry import load_model, register_model
from rtp_mm.server.client import RemoteEngine
from rtp_mm.types import MMPreprocessConfig

MODEL = Path(__file__).parent / "data" / "third_party_model.py"
WEIGHT = torch.arange(12, dtype=torch.float32).view(4, 3) / 8
BIAS = torch.tensor([1.0, -1.0, 0.5, 0.0])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "quarter_means"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["QuarterMeansForConditionalGeneration"]}))
    tensors = {"vision.weight": WEIGHT, "vision.bias": BIAS, "language.weight": torch.ones(2)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def expected(photo: NDArray[np.uint8]) -> Tensor:
    quarters = np.array(Image.fromarray(photo).resize((2, 2), Image.Resampling.BOX)).reshape(4, 3)
    return torch.from_numpy(quarters).float() @ WEIGHT.T + BIAS


@pytest.fixture
def urls(photos: dict[str, NDArray[np.uint8]], tmp_path: Path) -> list[str]:
    for name, pixels in photos.items():
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    return [str(tmp_path / f"{name}.png") for name in photos]


def test_its_part_knows_the_servers_device(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though its `__init__` may not call ours, and the machine may have a GPU."""
    settings = load_settings(checkpoint_path=checkpoint, mm_model_module=str(MODEL), act_type="fp32", device="cpu")
    engine = load_engine(settings).engine
    assert isinstance(engine, MMProcessEngine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert engine._items._mm_part._device == torch.device("cpu")
    engine.close()


def test_it_answers_in_process(checkpoint: Path, urls: list[str], photos: dict[str, NDArray[np.uint8]]) -> None:
    settings = load_settings(checkpoint_path=checkpoint, mm_model_module=str(MODEL), act_type="fp32", device="cpu")
    loaded = load_engine(settings)
    assert loaded.model == "quarter_means"
    engine = loaded.engine
    result = engine.submit(urls)
    assert result.position_ids is None
    for embedding, photo in zip(result.embeddings, photos.values(), strict=True):
        torch.testing.assert_close(embedding, expected(photo))
    assert "forward" not in engine.submit(urls).timings_ms  # cached
    engine.close()


def test_its_own_interface_answers_too(checkpoint: Path, urls: list[str], photos: dict[str, NDArray[np.uint8]]) -> None:
    """`mm_embedding`, as an engine of RTP-LLM's would call it."""
    from rtp_mm import compat

    compat.install()
    model = load_model(
        load_settings(checkpoint_path=checkpoint, mm_model_module=str(MODEL), act_type="fp32", device="cpu")
    )
    embedding, position_ids = model.mm_part.mm_embedding(urls[0])
    assert position_ids is None
    torch.testing.assert_close(embedding, expected(next(iter(photos.values()))))


def test_it_is_served(checkpoint: Path, urls: list[str], photos: dict[str, NDArray[np.uint8]]) -> None:
    with running_server(checkpoint, mm_model_module=MODEL, act_type="fp32", device="cpu") as server:
        engine = RemoteEngine(server.address)
        result = engine.submit(urls)
        for embedding, photo in zip(result.embeddings, photos.values(), strict=True):
            torch.testing.assert_close(embedding, expected(photo))
        assert engine.model() == "quarter_means"
        engine.close()
        assert server.terminate() == 0


class Odd(MultiModalEmbeddingInterface):
    """Calls no `super().__init__`, and is no module."""

    def __init__(self, config: GptInitModelParameters) -> None:
        self.shared = torch.nn.Parameter(torch.zeros(4, 3))
        self.layers = [torch.nn.Linear(3, 4)]
        self.layers[0].weight = self.shared
        self.seen: list[MMPreprocessConfig] = []

    def _mm_preprocess(self, data: Any, **kwargs: Any) -> MMPreprocessConfig:
        self.seen.append(kwargs["configs"])
        return kwargs["configs"]

    def mm_process(self, mm_input: Any, **kwargs: Any) -> Tensor:
        tokens = self.layers[0](torch.ones(2, 5, 3, dtype=self._data_type))
        assert not tokens.requires_grad
        return tokens


class OddWeights(BaseVitWeights):
    def _set_weight_prefix(self) -> None:
        self._ckpt_prefix = "vision."
        self._ft_prefix = "self.mm_part.layers.0."


class OddModel(MultimodalMixin):
    def __init__(self, config: GptInitModelParameters) -> None:
        pass

    def _init_multimodal(self, config: GptInitModelParameters) -> None:
        self.mm_part = Odd(config)
        config.mm_related_params.vit_weights = OddWeights({"layer": self.mm_part.layers[0]})


def test_a_class_of_several_names_is_called_by_the_first_not_by_what_the_checkpoint_says(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "a_training_run"}')
    for name in ("odd", "odd_instruct"):
        register_model(name, OddModel)
    for name in ("odd", "odd_instruct"):
        model = load_model(load_settings(checkpoint_path=checkpoint, model_type=name, device="cpu"))
        assert model.config.model_type == "odd"


@pytest.fixture
def odd_engine(checkpoint: Path) -> Iterator[MMProcessEngine]:
    register_model("odd", OddModel)
    settings = load_settings(checkpoint_path=checkpoint, model_type="odd", act_type="fp32", device="cpu")
    engine = load_engine(settings).engine
    assert isinstance(engine, MMProcessEngine)
    yield engine
    engine.close()


def test_a_part_that_calls_no_super_has_the_servers_dtype_and_shares_its_weights(
    odd_engine: MMProcessEngine, urls: list[str]
) -> None:
    """A tensor that is shared with another attribute is filled in place; [2, 5, 4] is ten tokens."""
    part = odd_engine._items._mm_part
    assert isinstance(part, Odd)
    assert part._data_type == torch.float32
    assert torch.equal(part.shared, WEIGHT)
    assert torch.equal(odd_engine.submit(urls[:1]).embeddings[0], (WEIGHT.sum(1) + BIAS).expand(10, 4))


def test_a_part_sees_of_a_config_what_the_cache_key_says(odd_engine: MMProcessEngine, urls: list[str]) -> None:
    """A width without a height is no option, so two of them are one request."""
    configs = [MMPreprocessConfig(width=w, fps=3, crop_positions=[0, 0, 0.5, 1], mm_timeout_ms=60000) for w in (1, 2)]
    for config in configs:
        odd_engine.submit(urls[:1], preprocess_configs=[config])
    part = odd_engine._items._mm_part
    assert isinstance(part, Odd)
    assert part.seen == [MMPreprocessConfig(fps=3, crop_positions=[0, 0, 0.5, 1])]
