"""Decode on the device, resize and cut there, tower: with stand-ins for the decoders, and the CPU for the device."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.errors import BadItemsError, NotSupportedError, ProcessError, WrongFormatError
from rtp_mm.models import device_preprocessor
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.models.registry import load_model
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, CropBox, DevicePatches, MMPreprocessConfig, MMUrlType, Patches, PreprocessOptions
from rtp_mm.vit.packing import packed_rows
from tests.clips import encode, moving
from tests.stand_in_decoder import CPU, RefusingDecoder, StandInDecoder, decoders, engine_with, on_device

IMAGE, VIDEO, DEFAULT = MMUrlType.IMAGE, MMUrlType.VIDEO, MMUrlType.DEFAULT


@pytest.fixture(scope="module")
def media() -> MediaPreprocessor:
    return MediaPreprocessor.from_checkpoint(Path("no folder"), PUBLISHED_PROCESSOR, load_settings(device="cpu"))


@pytest.fixture(scope="module")
def clip(photos: dict[str, NDArray[np.uint8]]) -> bytes:
    return encode(moving(photos["chelsea"]), options={"bf": "2"})


def blob(data: bytes | NDArray[Any]) -> Blob:
    return Blob(data, b"", "test")


def assert_same(ours: DevicePatches | None, expected: Patches) -> None:
    assert ours is not None
    np.testing.assert_array_equal(ours.rows.numpy(), expected.rows)
    assert (ours.grid_thw, ours.seconds_per_grid) == (expected.grid_thw, expected.seconds_per_grid)


OPTIONS = {
    "none": PreprocessOptions(),
    "crop": PreprocessOptions(crop=CropBox(0.1, 0.2, 0.7, 0.9)),
    "size": PreprocessOptions(width=201, height=333),
    "pixels": PreprocessOptions(max_pixels=28 * 28 * 20, min_pixels=28 * 28 * 4),
    "frames": PreprocessOptions(fps=8, max_frames=10),
    "all": PreprocessOptions(crop=CropBox(0.5, 0, 1, 0.5), max_pixels=28 * 28 * 30, min_pixels=28 * 28, fps=6),
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_images_get_the_rows_that_the_cpu_makes(
    options: PreprocessOptions, media: MediaPreprocessor, photo: bytes
) -> None:
    ours = on_device(media)
    assert_same(ours(blob(photo), DEFAULT, options), media(blob(photo), DEFAULT, options))
    assert (ours.decodes, ours.cpu_decodes) == (1, {})


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_clips_get_the_rows_that_the_cpu_makes(
    options: PreprocessOptions, media: MediaPreprocessor, clip: bytes
) -> None:
    ours = on_device(media, "auto")
    assert_same(ours(blob(clip), DEFAULT, options), media(blob(clip), DEFAULT, options))
    assert (ours.decodes, ours.cpu_decodes) == (1, {})


def test_a_clip_of_one_frame_fills_its_patch(media: MediaPreprocessor, photos: dict[str, NDArray[np.uint8]]) -> None:
    data = encode(moving(photos["chelsea"], 1))
    made: list[StandInDecoder] = []
    ours = on_device(media, make_decoder=lambda stream: made.append(StandInDecoder(stream)) or made[-1])
    assert_same(ours(blob(data), VIDEO, PreprocessOptions()), media(blob(data), VIDEO, PreprocessOptions()))
    assert made[0].calls == [[0, 0]]


def test_a_long_clip_is_decoded_in_chunks(
    media: MediaPreprocessor, clip: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds whole temporal patches, and together they are the same."""
    options = PreprocessOptions(fps=9, max_frames=18)
    expected = media(blob(clip), VIDEO, options)
    frame = 112 * 80 * 3
    for budget, sizes in ((18 * frame, [18]), (18 * frame - 1, [16, 2]), (5 * frame, [4, 4, 4, 4, 2]), (1, [2] * 9)):
        monkeypatch.setattr(device_preprocessor, "CHUNK_BYTES", budget)
        made: list[StandInDecoder] = []
        ours = on_device(media, make_decoder=lambda stream, made=made: made.append(StandInDecoder(stream)) or made[-1])
        assert_same(ours(blob(clip), VIDEO, options), expected)
        assert [len(call) for call in made[0].calls] == sizes


def test_what_the_decoder_refuses_is_left_to_the_cpu_and_counted(
    media: MediaPreprocessor, photo: bytes, clip: bytes
) -> None:
    ours = on_device(media, make_decoder=RefusingDecoder)
    assert ours(blob(photo), IMAGE, PreprocessOptions()) is None
    assert ours(blob(clip), VIDEO, PreprocessOptions()) is None
    assert (ours.decodes, ours.cpu_decodes) == (0, {"refused": 2})


class OtherSize(StandInDecoder):
    def image(self, data: bytes) -> Any:
        return super().image(data)[1:].copy()

    def frames(self, data: bytes, indices: Any) -> Any:
        return super().frames(data, indices)[1:].copy()


def test_pixels_of_another_shape_are_not_believed(media: MediaPreprocessor, photo: bytes, clip: bytes) -> None:
    ours = on_device(media, make_decoder=OtherSize)
    assert ours(blob(photo), IMAGE, PreprocessOptions()) is None
    assert ours(blob(clip), VIDEO, PreprocessOptions()) is None
    assert ours.cpu_decodes == {"refused": 2}


def test_only_what_the_setting_sends_is_asked_for(media: MediaPreprocessor, photo: bytes, clip: bytes) -> None:
    pixels = np.zeros((1, 28, 28, 3), np.uint8)
    auto, gpu = on_device(media, "auto"), on_device(media, "gpu")
    assert not auto.may_take(blob(photo), DEFAULT)
    assert auto.may_take(blob(clip), DEFAULT)
    assert gpu.may_take(blob(photo), DEFAULT)
    for ours in (auto, gpu):
        assert not ours.may_take(blob(pixels), MMUrlType.TENSOR)


def test_animations_and_other_codecs_are_counted(media: MediaPreprocessor, clip: bytes) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "green", "blue")]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    ours = on_device(media, "auto", takes=decoders("hevc"))
    assert ours(blob(file.getvalue()), VIDEO, PreprocessOptions()) is None
    assert ours(blob(clip), VIDEO, PreprocessOptions()) is None
    assert ours.cpu_decodes == {"format": 1, "codec": 1}


def test_limits_hold_before_anything_is_decoded(media: MediaPreprocessor, photo: bytes, clip: bytes) -> None:
    narrow = replace(media, image=replace(media.image, max_image_pixels=100))
    narrow = replace(narrow, video=replace(media.video, image=narrow.image))
    few = replace(media, video=replace(media.video, max_patches=8))
    for limited, data in ((narrow, photo), (narrow, clip), (few, clip)):
        made: list[StandInDecoder] = []
        ours = on_device(
            limited, make_decoder=lambda stream, made=made: made.append(StandInDecoder(stream)) or made[-1]
        )
        with pytest.raises(WrongFormatError, match="over the limit of"):
            ours(blob(data), DEFAULT, PreprocessOptions())
        assert not made


def test_broken_containers_fail_as_on_the_cpu(media: MediaPreprocessor, clip: bytes) -> None:
    for data in (clip[:200], b"\0\0\0\x18ftypisom" + bytes(100)):
        errors = []
        for preprocess in (media, on_device(media)):
            with pytest.raises((WrongFormatError, NotSupportedError)) as raised:
                preprocess(blob(data), VIDEO, PreprocessOptions())
            errors.append((raised.type, str(raised.value)))
        assert errors[0] == errors[1]


def test_each_thread_has_a_decoder_of_its_own(media: MediaPreprocessor, photo: bytes) -> None:
    """The stand-in checks its thread."""
    made: list[StandInDecoder] = []
    ours = on_device(media, make_decoder=lambda stream: made.append(StandInDecoder(stream)) or made[-1])
    everybody = threading.Barrier(3)

    def decode(_: int) -> Any:
        everybody.wait(30)
        return [ours(blob(photo), IMAGE, PreprocessOptions()) for _ in range(4)]

    with ThreadPoolExecutor(3) as threads:
        results = [patches for batch in threads.map(decode, range(3)) for patches in batch]
    expected = media(blob(photo), IMAGE, PreprocessOptions())
    for patches in results:
        assert_same(patches, expected)
    assert len(made) == 3
    assert ours.decodes == 12


def test_device_and_host_rows_share_a_batch(
    tiny_checkpoint: Path, media: MediaPreprocessor, photo: bytes, clip: bytes
) -> None:
    """Stills and clips of both kinds, in any order, give the bits that they give alone."""
    part = load_model(load_settings(checkpoint_path=tiny_checkpoint, device="cpu", act_type="fp32")).mm_part
    ours = on_device(media)
    small = PreprocessOptions(max_pixels=28 * 28 * 16, min_pixels=28 * 28)
    host = [media(blob(data), DEFAULT, small) for data in (photo, clip)]
    device = [ours(blob(data), DEFAULT, small) for data in (photo, clip)]
    alone = [part.mm_process(item)[0] for item in host]
    together = part.mm_process_batch([device[1], host[0], device[0], host[1]], [], [])
    for (embedding, _), expected in zip(together, (alone[1], alone[0], alone[0], alone[1]), strict=True):
        assert torch.equal(embedding, expected)


def test_rows_on_the_device_are_packed_beside_arrays() -> None:
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    packed = packed_rows([torch.from_numpy(array) + 10, array, torch.from_numpy(array) + 20], CPU)
    assert packed.tolist() == np.concatenate([array + 10, array, array + 20]).tolist()


# --- through the engine


def submitted(engine: MMProcessEngine, *paths: Path, **config: int) -> Any:
    try:
        return engine.submit([*map(str, paths)], preprocess_configs=[MMPreprocessConfig(**config)] * len(paths))
    finally:
        engine.close()


@pytest.mark.parametrize("local", [0, 1])
def test_answers_are_the_same_on_either_path(
    local: int, tiny_qwen2_5_vl: Path, photo_path: Path, clip: bytes, tmp_path: Path
) -> None:
    """Through worker processes and threads; given the same pixels, which DALI's GPU decoders do not give."""
    clip_path = tmp_path / "clip.mp4"
    clip_path.write_bytes(clip)
    grey_alpha = tmp_path / "alpha.png"
    Image.new("LA", (60, 70), (90, 128)).save(grey_alpha)
    paths = (photo_path, clip_path, grey_alpha)
    options: dict[str, Any] = {"use_local_preprocess": local, "mm_preprocess_max_workers": 1}
    found, decodes = {}, {}
    for setting in ("cpu", "auto", "gpu"):
        engine = engine_with(tiny_qwen2_5_vl, setting, **options)
        found[setting] = submitted(engine, *paths, max_pixels=28 * 28 * 16, min_pixels=28 * 28)
        decodes[setting] = (engine.stats().device_decodes, engine.stats().cpu_decodes)
    assert decodes == {"cpu": (0, {}), "auto": (1, {}), "gpu": (2, {"pixels": 1})}
    for setting in ("auto", "gpu"):
        assert found[setting].seconds_per_grid == found["cpu"].seconds_per_grid
        for ours, expected in zip(found[setting].embeddings, found["cpu"].embeddings, strict=True):
            assert torch.equal(ours, expected)


def test_what_is_refused_is_answered_by_a_worker(tiny_qwen2_5_vl: Path, photo_path: Path) -> None:
    engine = engine_with(tiny_qwen2_5_vl, make_decoder=RefusingDecoder, mm_preprocess_max_workers=1)
    assert len(submitted(engine, photo_path).embeddings[0]) > 0
    assert engine.stats().cpu_decodes == {"refused": 1}


class BrokenDevice(StandInDecoder):
    def image(self, data: bytes) -> Any:
        raise ProcessError("the device's decoder failed: out of memory")


def test_a_device_that_fails_is_no_reason_for_other_bits(tiny_qwen2_5_vl: Path, photo_path: Path) -> None:
    """The item fails: what another call would get from the CPU is not what this one's key stands for."""
    engine = engine_with(tiny_qwen2_5_vl, make_decoder=BrokenDevice, mm_preprocess_max_workers=1)
    with pytest.raises(BadItemsError, match="out of memory") as raised:
        submitted(engine, photo_path)
    assert raised.value.status == "INTERNAL"
    assert engine.stats().cpu_decodes == {}


def test_the_backend_stands_in_every_cache_key(tiny_qwen2_5_vl: Path) -> None:
    engines = [engine_with(tiny_qwen2_5_vl, setting) for setting in ("cpu", "auto", "gpu")]
    other = on_device(engines[0]._items._mm_part.preprocessor, "gpu", takes=decoders("hevc"))  # type: ignore[arg-type]
    keys = [engine._items.answers._preprocess_key for engine in engines]
    for engine in engines:
        engine.close()
    assert len({*keys, (*keys[2][:-2], *other.cache_key)}) == 4
    assert all("stand-in 1" in repr(key) for key in keys)


def test_dali_is_imported_when_a_decoder_is_made_and_no_sooner() -> None:
    code = "import rtp_mm.models.qwen2_vl, sys; print('nvidia.dali' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
