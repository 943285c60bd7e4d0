"""Clips to patch rows and on to embeddings: Pillow's resize, Hugging Face's cut, tower and position ids."""

from __future__ import annotations

import pickle
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from clips import FRAMES, decode_all, encode, moving, sound_only, spliced
from huggingface import HuggingFace, relative_l2
from numpy.typing import NDArray
from PIL import Image

from rtp_mm.config import load_settings
from rtp_mm.errors import NotSupportedError, StartError, WrongFormatError
from rtp_mm.models.multimodal_common import VideoEmbeddingInterface
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR, _in_time
from rtp_mm.models.registry import load_model
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, CropBox, MMPreprocessConfig, MMUrlType, Patches, PreprocessOptions
from tests import reference

Pixels = NDArray[np.uint8]
ANY = PreprocessOptions()
VIDEO = MMUrlType.VIDEO


@pytest.fixture(scope="module")
def frames(photos: dict[str, Pixels]) -> list[Pixels]:
    return moving(photos["chelsea"])


@pytest.fixture(scope="module")
def clip(frames: list[Pixels]) -> bytes:
    """2 s at 24 a second: 4 frames by either rule."""
    return encode(frames)


def preprocessor(tmp_path: Path, **options: Any) -> MediaPreprocessor:
    return MediaPreprocessor.from_checkpoint(tmp_path, PUBLISHED_PROCESSOR, load_settings(None, **options))


def blob(data: bytes | NDArray[Any]) -> Blob:
    return Blob(data, b"", "test")


def pillow_rows(frames: list[Pixels], height: int, width: int) -> Pixels:
    resized = [Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC) for frame in frames]
    return reference.patchify(np.stack([np.asarray(image) for image in resized]), 14, 2, 2)


@pytest.mark.parametrize(
    ("options", "indices"),
    [
        (ANY, [0, 16, 31, 47]),
        (PreprocessOptions(fps=4), [0, 7, 13, 20, 27, 34, 40, 47]),
        (PreprocessOptions(max_frames=2), [0, 47]),
        (PreprocessOptions(max_pixels=40_000, min_pixels=30_000), [0, 16, 31, 47]),
        (PreprocessOptions(width=140, height=84), [0, 16, 31, 47]),
    ],
)
def test_rows_are_pillows_resize_of_the_chosen_frames(
    options: PreprocessOptions, indices: list[int], clip: bytes, tmp_path: Path
) -> None:
    preprocess = preprocessor(tmp_path)
    patches = preprocess(blob(clip), VIDEO, options)
    t, h, w = patches.grid_thw
    everything = decode_all(clip)
    assert t == len(indices) // 2
    assert np.array_equal(patches.rows, pillow_rows([everything[i] for i in indices], h * 14, w * 14))
    assert patches.seconds_per_grid == pytest.approx(2 / (len(indices) / 2.0))
    assert np.array_equal(patches.rows, preprocess(blob(clip), MMUrlType.DEFAULT, options).rows)


def test_frames_that_change_their_size_are_resized_to_the_size_of_the_first(
    frames: list[Pixels], tmp_path: Path
) -> None:
    small, large = (encode([frame[:height] for frame in frames[:2]], "mpeg4", "avi") for height in (40, 80))
    patches = preprocessor(tmp_path)(blob(spliced(small, [small, large], "avi")), VIDEO, ANY)
    t, h, w = patches.grid_thw
    assert (t, w > 2 * h) == (2, True)
    assert np.array_equal(patches.rows, pillow_rows([*decode_all(small), *decode_all(large)], h * 14, w * 14))


def test_hugging_faces_rule_chooses_other_frames(clip: bytes, tmp_path: Path) -> None:
    patches = preprocessor(tmp_path, mm_video_rule="hf")(blob(clip), VIDEO, ANY)
    _, h, w = patches.grid_thw
    everything = decode_all(clip)
    assert np.array_equal(patches.rows, pillow_rows([everything[i] for i in (0, 12, 24, 36)], h * 14, w * 14))


def test_the_rule_and_its_limits_are_in_the_cache_key(tmp_path: Path) -> None:
    options = [{}, {"mm_video_rule": "hf"}, {"mm_max_frames": 10}]
    keys = {preprocessor(tmp_path, **option).cache_key for option in options}
    assert len(keys) == len(options)


def test_a_preprocessor_goes_to_worker_processes(clip: bytes, tmp_path: Path) -> None:
    preprocess = preprocessor(tmp_path)
    copy = pickle.loads(pickle.dumps(preprocess))
    assert np.array_equal(copy(blob(clip), VIDEO, ANY).rows, preprocess(blob(clip), VIDEO, ANY).rows)


def test_decoded_frames_are_a_clip_whose_odd_last_frame_is_repeated(frames: list[Pixels], tmp_path: Path) -> None:
    preprocess = preprocessor(tmp_path)
    three = np.stack(frames[:3])
    patches = preprocess(blob(three), MMUrlType.TENSOR, PreprocessOptions(fps=1))
    t, h, w = patches.grid_thw
    assert (t, patches.seconds_per_grid) == (2, 2.0)
    assert np.array_equal(patches.rows, pillow_rows([*frames[:3], frames[2]], h * 14, w * 14))
    assert preprocess.predict(blob(three), MMUrlType.TENSOR, ANY) == (patches.rows.shape, patches.grid_thw)
    still = preprocess(blob(three[:1]), MMUrlType.TENSOR, ANY)
    assert (still.grid_thw[0], still.rows.shape[1], still.seconds_per_grid) == (1, 588, None)


def test_one_frame_is_a_clip(frames: list[Pixels], tmp_path: Path) -> None:
    patches = preprocessor(tmp_path)(blob(encode(frames[:1])), VIDEO, ANY)
    still = patches.rows.reshape(-1, 3, 2, 196)
    assert patches.grid_thw[0] == 1
    assert np.array_equal(still[:, :, 0], still[:, :, 1])


def test_crops_are_cut_from_every_frame(clip: bytes, tmp_path: Path) -> None:
    patches = preprocessor(tmp_path)(blob(clip), VIDEO, PreprocessOptions(crop=CropBox(0.25, 0.0, 0.75, 0.5)))
    _, h, w = patches.grid_thw
    cut = [decode_all(clip)[i][:40, 28:84] for i in (0, 16, 31, 47)]
    assert np.array_equal(patches.rows, pillow_rows(cut, h * 14, w * 14))


def test_limits_hold(clip: bytes, frames: list[Pixels], tmp_path: Path) -> None:
    with pytest.raises(WrongFormatError, match="MM_MAX_PATCHES_PER_ITEM"):
        preprocessor(tmp_path, mm_max_patches_per_item=100)(blob(clip), VIDEO, ANY)
    with pytest.raises(WrongFormatError, match="MM_MAX_FRAMES"):
        preprocessor(tmp_path, mm_max_frames=2)(blob(np.stack(frames[:3])), MMUrlType.TENSOR, ANY)
    with pytest.raises(WrongFormatError, match="MM_MAX_FRAMES"):
        preprocessor(tmp_path, mm_max_frames=2)(blob(clip), VIDEO, PreprocessOptions(max_frames=4))
    with pytest.raises(WrongFormatError, match="MM_MAX_VIDEO_SECONDS"):
        preprocessor(tmp_path, mm_max_video_seconds=1)(blob(clip), VIDEO, ANY)
    with pytest.raises(WrongFormatError, match="no video"):
        preprocessor(tmp_path)(blob(sound_only()), VIDEO, ANY)


def test_default_is_told_from_the_bytes(photo: bytes, clip: bytes, tmp_path: Path) -> None:
    preprocess = preprocessor(tmp_path)
    for data, mm_type in ((photo, MMUrlType.IMAGE), (clip, VIDEO)):
        told, asked = (preprocess(blob(data), each, ANY) for each in (MMUrlType.DEFAULT, mm_type))
        assert told.grid_thw == asked.grid_thw
        assert np.array_equal(told.rows, asked.rows)
    with pytest.raises(WrongFormatError, match="no image in a supported format"):
        preprocess(blob(b"neither"), MMUrlType.DEFAULT, ANY)


@pytest.mark.parametrize(
    ("data", "mm_type", "reason"),
    [
        (b"", MMUrlType.AUDIO, "this model takes images and videos, not audio"),
        (b"ID3" + bytes(100), MMUrlType.DEFAULT, "this model takes images and videos, not audio"),
        (b"ID3" + bytes(100), MMUrlType.IMAGE, "expected an image, got audio"),
        (b"\0\0\0\x18ftypisom" + bytes(64), MMUrlType.IMAGE, "expected an image, got video"),
        (b"ID3" + bytes(100), VIDEO, "expected a video, got audio"),
        (np.zeros(16000, np.float32), MMUrlType.TENSOR, r"this model takes images and videos, the tensor is \[16000\]"),
    ],
)
def test_what_is_neither_image_nor_video_is_refused_by_name(
    data: bytes | NDArray[Any], mm_type: MMUrlType, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(NotSupportedError, match=reason):
        preprocessor(tmp_path)(blob(data), mm_type, ANY)


# --- tower and positions


def normalised(rows: Pixels) -> torch.Tensor:
    """[N, 1176] float32, as Hugging Face's processors write it."""
    mean = torch.tensor(PUBLISHED_PROCESSOR.image_mean).view(1, 3, 1)
    std = torch.tensor(PUBLISHED_PROCESSOR.image_std).view(1, 3, 1)
    values = torch.from_numpy(rows.copy()).float().view(len(rows), 3, -1) / 255
    return ((values - mean) / std).flatten(1)


def test_embeddings_of_clips_are_hugging_faces(tiny_checkpoint: Path, clip: bytes) -> None:
    model = load_model(load_settings(None, checkpoint_path=tiny_checkpoint, act_type="fp32", device="cpu"))
    assert model.mm_part.preprocessor is not None
    patches = model.mm_part.preprocessor(blob(clip), VIDEO, PreprocessOptions(fps=3))
    assert patches.grid_thw[0] > 1
    embedding, ids = model.mm_part.mm_process(patches)
    peer = HuggingFace(tiny_checkpoint)
    grid = torch.tensor([patches.grid_thw])
    expected = peer.forward({"pixel_values": normalised(patches.rows), "image_grid_thw": grid})
    assert relative_l2(embedding, expected) < 1e-5
    t, h, w = patches.grid_thw
    assert ids.tolist() == [[i, y, x] for i in range(t) for y in range(h // 2) for x in range(w // 2)]

    swapped = patches.rows.reshape(len(patches.rows), 3, 2, -1)[:, :, ::-1].reshape(len(patches.rows), -1)
    wrong, _ = model.mm_part.mm_process(Patches(np.ascontiguousarray(swapped), patches.grid_thw))
    assert relative_l2(wrong, expected) > 1e-3


@pytest.mark.parametrize("seconds", [1.0, 0.5005005, 2 / 3, 7.33, 0.1])
@pytest.mark.parametrize("scale", [2, 4, 25])
def test_scaled_t_is_get_rope_index(seconds: float, scale: int) -> None:
    """Of transformers' Qwen2.5-VL, on a prompt that is one video."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel

    t, h, w = 40, 4, 6
    vision = SimpleNamespace(spatial_merge_size=2, tokens_per_second=scale)
    fake = SimpleNamespace(config=SimpleNamespace(vision_config=vision))
    fake.get_vision_position_ids = Qwen2_5_VLModel.get_vision_position_ids.__get__(fake)
    tokens = t * h * w // 4
    expected, _ = Qwen2_5_VLModel.get_rope_index(
        fake,
        torch.zeros(1, tokens, dtype=torch.long),
        torch.full((1, tokens), 2),
        video_grid_thw=torch.tensor([[t, h, w]]),
        second_per_grid_ts=[seconds],
    )
    ids = torch.tensor([[i, y, x] for i in range(t) for y in range(h // 2) for x in range(w // 2)], dtype=torch.int32)
    clip = Patches(np.empty((0, 1176), np.uint8), (t, h, w), seconds)
    assert torch.equal(_in_time(ids, clip, scale).long(), expected[:, 0].T)
    assert torch.equal(_in_time(ids, Patches(clip.rows, clip.grid_thw), scale), ids)


def test_scaled_t_needs_a_model_that_counts_time(tiny_qwen2_vl: Path, tiny_qwen2_5_vl: Path) -> None:
    options = {"act_type": "fp32", "device": "cpu", "mm_pos_t": "scaled"}
    with pytest.raises(StartError, match="tokens_per_second"):
        load_model(load_settings(None, checkpoint_path=tiny_qwen2_vl, **options))
    load_model(load_settings(None, checkpoint_path=tiny_qwen2_5_vl, **options))


def test_a_third_partys_video_model_gets_frames(clip: bytes) -> None:
    """`VideoEmbeddingInterface` decodes by itself: the chosen frames, as they come, in RGB."""

    class Model(VideoEmbeddingInterface):
        def video_embedding(self, video: Any) -> torch.Tensor:
            return torch.tensor([np.asarray(frame).mean() for frame in video])

    model = Model()
    frames = model._mm_preprocess(BytesIO(clip), configs=MMPreprocessConfig(max_frames=2))
    expected = [decode_all(clip)[i] for i in (0, FRAMES - 1)]
    assert all(np.array_equal(frame, e) for frame, e in zip(frames, expected, strict=True))
    assert model.mm_process(frames).tolist() == pytest.approx([e.mean() for e in expected])
