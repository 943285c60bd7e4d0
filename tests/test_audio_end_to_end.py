"""A real server of Qwen2-Audio, sounds by URL: what the wire says equals Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface import relative_l2
from running_server import RunningServer, running_server
from sounds import encode, speech

from rtp_mm.cli.hugging_face_audio import HuggingFaceAudioPeer
from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.server.client import RemoteEngine
from rtp_mm.types import MMUrlType


@pytest.fixture(scope="module")
def server(tiny_qwen2_audio: Path) -> Iterator[RunningServer]:
    with running_server(tiny_qwen2_audio, act_type="fp32", device="cpu", mm_preprocess_max_workers=1) as server:
        yield server


@pytest.fixture(scope="module")
def engine(server: RunningServer) -> Iterator[RemoteEngine]:
    engine = RemoteEngine(server.address)
    yield engine
    engine.close()


def test_sounds_over_the_wire_equal_hugging_face(engine: RemoteEngine, tiny_qwen2_audio: Path, tmp_path: Path) -> None:
    """By type and told from the bytes, as a file, as the sound of a video, and as samples."""
    samples = speech(20000)
    path, film = tmp_path / "speech.wav", tmp_path / "speech.mkv"
    path.write_bytes(encode(samples, 16000, codec="pcm_f32le"))
    film.write_bytes(encode(samples, 16000, "matroska", "pcm_f32le", video=True))
    types = [MMUrlType.AUDIO, MMUrlType.DEFAULT, MMUrlType.DEFAULT, MMUrlType.TENSOR]
    tensors = [None, None, None, torch.from_numpy(samples)]
    result = engine.submit([str(path), str(path), str(film), ""], types, tensors)
    peer = HuggingFaceAudioPeer(tiny_qwen2_audio, torch.float32, torch.device("cpu"))
    assert relative_l2(result.embeddings[0], peer.embed(samples)) <= 1e-5
    for embedding in result.embeddings[1:]:
        assert torch.equal(embedding, result.embeddings[0])
    assert result.position_ids is None
    assert not any(result.cut_s)


def test_a_sound_over_30_s_is_cut_and_the_reply_says_so(engine: RemoteEngine) -> None:
    long, short = (torch.from_numpy(speech(n)) for n in (480001, 480000))
    for _ in range(2):  # the second time from the cache
        result = engine.submit(["", ""], [MMUrlType.TENSOR] * 2, [long, short])
        assert result.cut_s == [30.0, None]
        assert torch.equal(*result.embeddings)
        assert len(result.embeddings[0]) == 750


def test_images_and_broken_sounds_are_refused_by_name(engine: RemoteEngine, photo_path: Path, tmp_path: Path) -> None:
    with pytest.raises(NotSupportedError, match=r"item 0 .*this model takes sound only, not images"):
        engine.submit([str(photo_path)], [MMUrlType.IMAGE])
    with pytest.raises(NotSupportedError, match="the tensor is pixels"):
        engine.submit([""], [MMUrlType.TENSOR], [torch.zeros(4, 4, 3, dtype=torch.int32)])
    broken = tmp_path / "broken.flac"
    broken.write_bytes(b"fLaC" + bytes(1000))
    with pytest.raises(WrongFormatError, match=r"item 0 \(.*broken\.flac\): broken sound"):
        engine.submit([str(broken)], [MMUrlType.AUDIO])
    with pytest.raises(WrongFormatError, match="too short"):
        engine.submit([""], [MMUrlType.TENSOR], [torch.from_numpy(np.zeros(100, np.float32))])
