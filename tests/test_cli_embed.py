"""`rtp-mm embed`: what it saves, what it asks a server for."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rtp_mm
from rtp_mm.cli import main
from rtp_mm.cli.embed import save_result
from rtp_mm.cli.outputs import writing
from rtp_mm.errors import StartError
from rtp_mm.types import MMEmbeddingRes


@pytest.mark.parametrize("name", ["a.safetensors", "a.npz"])
def test_a_save_on_a_full_disk_is_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.symlink_to("/dev/full")
    with pytest.raises(StartError, match=f"{name} cannot be written: .*No space"), writing(path):
        save_result(path, MMEmbeddingRes([torch.zeros(1 << 16, 1)]))


def test_a_bad_image_is_one_line(
    tiny_qwen2_5_vl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], photo_path: Path
) -> None:
    (tmp_path / "no.jpg").write_bytes(b"no image")
    urls = [str(photo_path), str(tmp_path / "no.jpg")]
    assert main(["embed", *urls, "--checkpoint", str(tiny_qwen2_5_vl), "--device", "cpu"]) == 1
    message = capsys.readouterr().err
    assert "item 1" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("suffix", [".safetensors", ".npz"])
@pytest.mark.parametrize("act_type", ["bf16", "fp32"])
def test_embed_saves_what_the_engine_gives(
    tiny_qwen2_5_vl: Path, photo_path: Path, tmp_path: Path, suffix: str, act_type: str
) -> None:
    model = ["--checkpoint", str(tiny_qwen2_5_vl), "--device", "cpu", "--act-type", act_type]
    limits = ["--max-pixels", "40000"]
    saved = tmp_path / f"out{suffix}"
    assert main(["embed", str(photo_path), str(photo_path), *model, *limits, "--save", str(saved)]) == 0

    engine = rtp_mm.create_engine(
        vit_separation=0, checkpoint_path=tiny_qwen2_5_vl, act_type=act_type, device="cpu", mm_embedding_cache_mb=0
    )
    config = rtp_mm.MMPreprocessConfig(max_pixels=40000)
    result = engine.submit([str(photo_path)], preprocess_configs=[config])
    engine.close()
    if suffix == ".npz":
        with np.load(saved) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    else:
        tensors = load_file(saved)
    assert tensors.keys() == {"embedding.0", "embedding.1", "position_ids.0", "position_ids.1"}
    expected = result.embeddings[0].float() if suffix == ".npz" else result.embeddings[0]
    assert result.position_ids is not None
    for item in "01":
        assert torch.equal(tensors[f"embedding.{item}"], expected)
        assert torch.equal(tensors[f"position_ids.{item}"], result.position_ids[0])


def test_a_server_wins_over_the_environments_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    engine = SimpleNamespace(submit=lambda urls, **_: MMEmbeddingRes([torch.zeros(4, 8)]), close=lambda: None)
    monkeypatch.setattr(rtp_mm, "create_engine", lambda **options: asked.update(options) or engine)
    monkeypatch.setenv("CHECKPOINT_PATH", "/models/ours")
    assert main(["embed", "http://host/a.jpg", "--server", "localhost:5"]) == 0
    assert asked == {"vit_separation": 2, "remote_vit_server_ip": "localhost:5"}


def test_embed_asks_a_server_for_absolute_paths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The server has another working directory. What has a scheme is the server's to judge."""
    asked: dict[str, Any] = {}

    def submit(urls: list[str], **options: Any) -> MMEmbeddingRes:
        asked["urls"] = urls
        return MMEmbeddingRes([torch.zeros(4, 8)] * len(urls), None, None, {"forward": 1.0})

    def create_engine(**options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(submit=submit, close=lambda: asked.update(closed=True))

    monkeypatch.setattr(rtp_mm, "create_engine", create_engine)
    monkeypatch.chdir(tmp_path)
    others = ["http://host/b.jpg", "data:,c", "DATA:,c", "S3://bucket/b.jpg"]
    files = ["file:a%20%C3%A4.jpg", "FILE:/b/c.jpg", "file://localhost/b/c.jpg"]
    urls = ["a.jpg", *others, *files]
    assert main(["embed", *urls, "--server", "1.2.3.4:5"]) == 0
    assert asked == {
        "vit_separation": 2,
        "remote_vit_server_ip": "1.2.3.4:5",
        "urls": [str(tmp_path / "a.jpg"), *others, f"{tmp_path.as_uri()}/a%20%C3%A4.jpg", *["file:///b/c.jpg"] * 2],
        "closed": True,
    }


@pytest.mark.parametrize(("name", "dtype"), [("BF16", "bf16"), ("float16", "fp16"), ("int8", None)])
def test_a_dtype_has_the_names_that_a_server_takes(
    name: str, dtype: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {}
    result = MMEmbeddingRes([torch.zeros(4, 8)], None, None, {"forward": 1.0})
    engine = SimpleNamespace(submit=lambda urls, **options: result, close=lambda: None)
    monkeypatch.setattr(rtp_mm, "create_engine", lambda **options: (asked.update(options), engine)[1])
    monkeypatch.setenv("ACT_TYPE", name)
    status = main(["embed", "a.jpg", "--checkpoint", str(tmp_path)])
    assert (asked.get("act_type"), status == 0) == (dtype, dtype is not None)
    assert ("a long name" in capsys.readouterr().err) == (dtype is None)
