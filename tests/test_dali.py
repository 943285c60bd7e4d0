"""DALI's decoders for the CPU: Pillow's bytes of stills, and PyAV's frames of VP9 within a bound. What its GPU decoders
give is measured by `benchmarks.gpu_session`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from numpy.typing import NDArray
from PIL import Image

from rtp_mm.config import load_settings
from rtp_mm.media import dali
from rtp_mm.media.dali import DaliDecoder
from rtp_mm.media.decode_backend import DecoderRefusedError, DeviceDecoders
from rtp_mm.media.image import decode
from rtp_mm.media.plain_pixels import is_plain
from rtp_mm.media.probe import probe
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions
from tests.clips import decode_all, encode, moving
from tests.stand_in_decoder import LIMITS, engine_with, on_device
from tests.test_decode_backend import NOT_PLAIN, PLAIN

VP9 = ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"})
# DALI asks libswscale for another, faster conversion than PyAV does: the same planes, chroma rounded otherwise.
MAX_DIFFERENCE, MEAN_DIFFERENCE = 16, 1.5  # of 255


@pytest.fixture(scope="module")
def decoder() -> DaliDecoder:
    require("dali")
    return DaliDecoder(None)


@pytest.fixture(scope="module")
def frames(photos: dict[str, NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    return moving(photos["chelsea"], 40)


@pytest.fixture(scope="module")
def image(photos: dict[str, NDArray[np.uint8]]) -> Image.Image:
    return Image.fromarray(photos["rocket"])


def by_pillow(data: bytes) -> NDArray[np.uint8]:
    return decode(data, max_pixels=1 << 28, allow_truncated=False, exif_transpose=False)


def by_dali(decoder: DaliDecoder, data: bytes) -> NDArray[np.uint8]:
    return np.from_dlpack(decoder.image(data))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PLAIN)
def test_plain_images_have_pillows_bytes(kind: str, decoder: DaliDecoder, image: Image.Image) -> None:
    """EXIF turns nothing; grey and palettes become RGB."""
    data = PLAIN[kind](image)
    np.testing.assert_array_equal(by_dali(decoder, data), by_pillow(data))


DIFFERENT = (
    *("png, alpha", "png, grey and alpha", "png, transparent grey", "png, transparent in palette", "png, 16 bits"),
    *("webp, alpha", "webp, lossless, alpha", "tiff, alpha", "tiff, palette"),
)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_the_rule_is_needed(kind: str, decoder: DaliDecoder, image: Image.Image) -> None:
    """DALI gives another answer for these, which the header's rule leaves to Pillow."""
    data = NOT_PLAIN[kind](image)
    header = probe(data)
    assert header is not None
    assert not is_plain(data, header.format)
    try:
        ours = by_dali(decoder, data)
    except DecoderRefusedError:
        return
    assert not np.array_equal(ours, by_pillow(data))


def test_broken_images_are_refused(decoder: DaliDecoder, photo: bytes) -> None:
    for data in (photo[:2000], b"no image at all", b""):
        with pytest.raises(DecoderRefusedError):
            decoder.image(data)
    np.testing.assert_array_equal(by_dali(decoder, photo), by_pillow(photo))  # and the decoder lives


@pytest.mark.parametrize("indices", [[0], [39], [3, 4, 11, 39, 39], [*range(0, 40, 7)]], ids=str)
def test_vp9_frames_are_those_of_a_full_decode(
    indices: list[int], decoder: DaliDecoder, frames: list[NDArray[np.uint8]]
) -> None:
    data = encode(frames, *VP9)
    every = decode_all(data)
    ours = np.from_dlpack(decoder.frames(data, indices))  # type: ignore[arg-type]
    assert ours.shape == (len(indices), 80, 112, 3)
    difference = np.abs(ours.astype(int) - np.stack([every[index] for index in indices]))
    assert difference.max() <= MAX_DIFFERENCE
    assert difference.mean(axis=(1, 2, 3)).max() <= MEAN_DIFFERENCE
    neighbour = np.abs(ours[0].astype(int) - every[indices[0] - 1 if indices[0] else 1])
    assert neighbour.mean() > MEAN_DIFFERENCE  # the bound tells one frame from the next


def test_frames_that_are_not_there_are_refused(decoder: DaliDecoder, frames: list[NDArray[np.uint8]]) -> None:
    """By default DALI makes black ones of them."""
    data = encode(frames, *VP9)
    for broken, indices in ((data, [40]), (data, [0, 400]), (data[:300], [0]), (b"", [0])):
        with pytest.raises(DecoderRefusedError):
            decoder.frames(broken, indices)


def test_codecs_of_nvdec_alone_are_refused_on_a_cpu(decoder: DaliDecoder, frames: list[NDArray[np.uint8]]) -> None:
    with pytest.raises(DecoderRefusedError):
        decoder.frames(encode(frames), [0])


def takes() -> DeviceDecoders:
    return DeviceDecoders(dali.library(), dali.FORMATS, (("vp9", LIMITS), ("h264", LIMITS)))


def new_decoder(_: object) -> DaliDecoder:
    return DaliDecoder(None)


def test_stills_get_the_rows_that_the_cpu_makes(decoder: DaliDecoder, image: Image.Image) -> None:
    media = MediaPreprocessor.from_checkpoint(Path("no folder"), PUBLISHED_PROCESSOR, load_settings(device="cpu"))
    ours = on_device(media, make_decoder=new_decoder, takes=takes())
    for kind in ("jpeg", "png, palette", "webp", "tiff", "jpeg 2000"):
        blob = Blob(PLAIN[kind](image), b"", "test")
        patches = ours(blob, MMUrlType.IMAGE, PreprocessOptions(max_pixels=28 * 28 * 64))
        assert patches is not None
        expected = media(blob, MMUrlType.IMAGE, PreprocessOptions(max_pixels=28 * 28 * 64))
        np.testing.assert_array_equal(patches.rows.numpy(), expected.rows)
    assert ours.decodes == 5


def test_an_engine_decodes_by_dali(
    decoder: DaliDecoder,
    tiny_qwen2_5_vl: Path,
    photo_path: Path,
    frames: list[NDArray[np.uint8]],
    tmp_path: Path,
) -> None:
    """A still has the bits that the CPU path gives it; VP9 comes close; H.264, which needs NVDEC, goes to a worker."""
    paths = [photo_path, tmp_path / "clip.webm", tmp_path / "clip.mp4"]
    paths[1].write_bytes(encode(frames, *VP9))
    paths[2].write_bytes(encode(frames))
    found = []
    make: list[Callable[..., Any]] = [new_decoder, new_decoder]
    for setting, maker in zip(("cpu", "gpu"), make, strict=True):
        engine = engine_with(tiny_qwen2_5_vl, setting, maker, mm_preprocess_max_workers=1)
        try:
            found.append(engine.submit([*map(str, paths)]).embeddings)
            stats = engine.stats()
        finally:
            engine.close()
    assert (stats.device_decodes, stats.cpu_decodes) == (2, {"refused": 1})
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][2], found[1][2])
    assert found[0][1].shape == found[1][1].shape
    assert 0 < (found[0][1] - found[1][1]).norm() / found[0][1].norm() < 0.1
