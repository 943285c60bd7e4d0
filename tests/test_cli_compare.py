"""`rtp-mm compare`: what it compares is the same on both sides, and what it finds is so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import encode, moving
from numpy.typing import NDArray
from PIL import Image

import rtp_mm
from rtp_mm.cli import main
from rtp_mm.cli.compare import Comparison, Run, Task, compare, table
from rtp_mm.cli.hugging_face import ANY, HuggingFacePeer
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

SMALL = PreprocessOptions(max_pixels=60000)


def test_float32_agrees_with_hugging_face(tiny_checkpoint: Path, photo_path: Path) -> None:
    comparison = compare(Task(str(photo_path), tiny_checkpoint, SMALL, act_type="fp32", device="cpu"))
    assert comparison.relative_error(comparison.ours) < 1e-5
    assert comparison.token_cosines().min() > 1 - 1e-6
    assert comparison.max_error() < 1e-4


def test_bf16_is_no_further_from_float32_than_hugging_face(tiny_checkpoint: Path, photo_path: Path) -> None:
    task = Task(str(photo_path), tiny_checkpoint, SMALL, device="cpu")
    comparison = compare(task)
    assert 0 < comparison.relative_error(comparison.ours) <= comparison.relative_error(comparison.peer)
    assert table(comparison, task).row_count == 5


def test_every_timed_run_does_all_of_its_work(
    tiny_qwen2_vl: Path, photo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that finds the one before in a cache would be no run."""
    engines: list[Any] = []
    create = rtp_mm.create_engine
    monkeypatch.setattr(rtp_mm, "create_engine", lambda **options: engines.append(create(**options)) or engines[-1])
    compare(Task(str(photo_path), tiny_qwen2_vl, SMALL, repeat=3, act_type="fp32", device="cpu"))
    stats = engines[0].stats()
    assert stats.batches == 1 + 3  # the warm-up
    assert stats.caches["patches"].hits == 0


@pytest.fixture(scope="module")
def clip_path(tmp_path_factory: pytest.TempPathFactory, photos: dict[str, NDArray[np.uint8]]) -> Path:
    """2 s at 24 a second, of which both rules take 4 frames."""
    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    path.write_bytes(encode(moving(photos["coffee"])))
    return path


def test_clips_are_compared_with_hugging_face(tiny_checkpoint: Path, clip_path: Path) -> None:
    exact = compare(Task(str(clip_path), tiny_checkpoint, act_type="fp32", device="cpu"))
    assert exact.relative_error(exact.ours) < 1e-5
    assert exact.token_cosines().min() > 1 - 1e-6
    task = Task(str(clip_path), tiny_checkpoint, device="cpu")
    rounded = compare(task)
    assert 0 < rounded.relative_error(rounded.ours) <= rounded.relative_error(rounded.peer)
    title = table(rounded, task).title
    assert title is not None
    assert title.startswith("4 frames, grid 2 x ")
    assert ", 1 s per grid, " in title


@pytest.mark.parametrize("rule", ["qwen", "hf"])
def test_a_clip_that_hugging_face_gets_is_ours(
    rule: str, tiny_qwen2_5_vl: Path, clip_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pixel by pixel, in the same order; three frames make two pairs, the last of one frame twice."""
    monkeypatch.setenv("MM_VIDEO_RULE", rule)
    peer = HuggingFacePeer(tiny_qwen2_5_vl, torch.float32, torch.device("cpu"))
    inputs = peer.preprocess(clip_path.read_bytes(), ANY)
    blob = Blob(clip_path.read_bytes(), b"", "")
    patches = peer.video(blob, MMUrlType.VIDEO, ANY)
    assert inputs["image_grid_thw"].tolist() == [[*patches.grid_thw]]
    mean, std = (torch.tensor(v)[:, None] for v in (peer.processor.image_mean, peer.processor.image_std))
    values = inputs["pixel_values"].view(len(patches.rows), 3, -1)
    assert np.array_equal(((values * std + mean) * 255).round().flatten(1).numpy(), patches.rows)

    three = [Image.new("RGB", (28, 28), (shade, 0, 0)) for shade in (10, 20, 30)]
    inputs = peer.clip(iter(three))
    assert (inputs["frames"], inputs["image_grid_thw"].tolist()) == (3, [[2, 2, 2]])
    red = inputs["pixel_values"].view(2, 4, 3, 2, 196)[:, :, 0] * std[0] + mean[0]
    assert (red * 255).round().mean(dim=(1, 3)).tolist() == [[10, 20], [30, 30]]


def test_sounds_are_compared_with_hugging_face(tiny_qwen2_audio: Path, sound_path: Path) -> None:
    exact = compare(Task(str(sound_path), tiny_qwen2_audio, act_type="fp32", device="cpu"))
    assert exact.relative_error(exact.ours) < 1e-5
    assert exact.token_cosines().min() > 1 - 1e-6
    rounded = compare(Task(str(sound_path), tiny_qwen2_audio, device="cpu"))
    assert 0 < rounded.relative_error(rounded.ours) <= rounded.relative_error(rounded.peer)


def test_a_comparison_of_the_wrong_kind_is_one_line(
    tiny_qwen2_audio: Path,
    tiny_qwen2_5_vl: Path,
    photo_path: Path,
    sound_path: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for file, checkpoint, reason in [
        (photo_path, tiny_qwen2_audio, f"{photo_path}: broken sound"),
        (sound_path, tiny_qwen2_5_vl, f"{sound_path}: this model takes images and videos, not audio"),
        (sound_path, tmp_path, "no comparison for llama; there is one for qwen2_vl, qwen2_5_vl, qwen2_audio"),
        (sound_path, tmp_path / "none", "config.json is missing"),
    ]:
        assert main(["compare", str(file), "--checkpoint", str(checkpoint), "--device", "cpu"]) == 1
        message = capsys.readouterr().err
        assert reason in message
        assert message.strip().count("\n") == 0


def test_comparison_finds_one_wrong_token() -> None:
    right = torch.eye(4)
    wrong = right.clone()
    wrong[2] = -wrong[2]
    comparison = Comparison(Run(wrong, 1, 1), Run(right, 1, 1), right)
    assert comparison.token_cosines().tolist() == [1, 1, -1, 1]
    assert comparison.max_error() == 2
    assert comparison.relative_error(comparison.ours) == 1
    assert comparison.relative_error(comparison.peer) == 0
