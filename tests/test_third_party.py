"""A third party's model file, written against the documented interface, is registered, served, batched and cached."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from running_server import running_server
from safetensors.torch import save_file
from torch import Tensor

from rtp_mm.config import load_settings
from rtp_mm.library import load_engine
from rtp_mm.server.client import RemoteEngine

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


def test_it_answers_in_process(checkpoint: Path, urls: list[str], photos: dict[str, NDArray[np.uint8]]) -> None:
    settings = load_settings(checkpoint_path=checkpoint, mm_model_module=str(MODEL), act_type="fp32", device="cpu")
    engine = load_engine(settings).engine
    result = engine.submit(urls)
    assert result.position_ids is None
    for embedding, photo in zip(result.embeddings, photos.values(), strict=True):
        torch.testing.assert_close(embedding, expected(photo))
    assert "forward" not in engine.submit(urls).timings_ms  # cached
    engine.close()


def test_its_own_interface_answers_too(checkpoint: Path, urls: list[str], photos: dict[str, NDArray[np.uint8]]) -> None:
    """`mm_embedding`, as an engine of RTP-LLM's would call it."""
    from rtp_mm import compat
    from rtp_mm.models.registry import load_model

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
        engine.close()
        assert server.terminate() == 0
