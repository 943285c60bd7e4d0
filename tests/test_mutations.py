"""Damaged files of every format: the image that Pillow makes of them, or a word of ours, and a probe that agrees; of
clips their frames, or a word of ours, from the workers that the server has.

RTP_MM_MUTATIONS is how many of each seed file: 40 images and 60 clips by default.
"""

from __future__ import annotations

import asyncio
import io
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from clips import KINDS, encode, moving
from conftest import require
from image_seeds import encode as encode_image
from image_seeds import seeds
from mutations import mutated
from PIL import Image

from rtp_mm.config import load_settings
from rtp_mm.cores import CoreShare
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.image import FORMATS, decode
from rtp_mm.media.probe import probe
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, MMUrlType, Patches, PreprocessOptions

SEEDS = dict(seeds())
LEAST, LEAST_CLIPS = 40, 60  # so many show both outcomes
COUNT = int(os.environ.get("RTP_MM_MUTATIONS", LEAST))
CLIP_COUNT = int(os.environ.get("RTP_MM_MUTATIONS", LEAST_CLIPS))
CLIPS = (
    "h264 mp4, B-frames", "hevc mp4", "av1 mp4", "h264 mov, no B-frames", "mjpeg mov", "h264 mkv",
    "hevc mkv, closed groups", "vp9 webm", "av1 webm", "h264 avi", "mpeg4 avi",
)  # fmt: skip
INDEX_FIRST = {container: {"moov_size": "4096"} for container in ("mp4", "mov")}  # where damage is likely
CLIP_HEAD = 1000  # bytes that hold a small clip's headers
HANGS_S = 60
MAX_PIXELS = 10**6
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def test_a_thousand_files_are_damaged() -> None:
    assert len(SEEDS) * 40 > 1000


@pytest.mark.parametrize("name", SEEDS)
def test_damage_gives_the_image_or_a_clear_error(name: str) -> None:
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    refused = 0
    for number in range(COUNT):
        data = mutated(SEEDS[name], rng)
        try:
            pixels = decode(data, max_pixels=MAX_PIXELS, allow_truncated=False, exif_transpose=False)
        except (WrongFormatError, NotSupportedError):
            refused += 1
            continue
        header = probe(data)
        if header is None:  # Pillow reads a directory of tags that ends early as far as it goes
            assert name.endswith("tiff"), number
        else:
            assert (header.height, header.width, 3) == pixels.shape, number
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            if "A" not in image.getbands() and "transparency" not in image.info:
                np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    assert refused


def test_damage_to_heic_gives_the_image_or_a_clear_error() -> None:
    require("heif", "pillow-heif")
    from pillow_heif import register_heif_opener

    register_heif_opener()
    rng = np.random.default_rng(0)
    whole = encode_image(Image.linear_gradient("L").resize((64, 48)).convert("RGB"), "HEIF")
    outcomes = set()
    for number in range(5 * COUNT):  # nearly all of such a small file is header
        data = mutated(whole, rng)
        try:
            pixels = decode(data, max_pixels=MAX_PIXELS, allow_truncated=False, exif_transpose=False)
        except (WrongFormatError, NotSupportedError):
            outcomes.add("refused")
            continue
        with Image.open(io.BytesIO(data), formats=["HEIF"]) as image:
            np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")), err_msg=str(number))
        outcomes.add("decoded")
    assert outcomes == {"decoded", "refused"} or COUNT < LEAST


@pytest.fixture
def one_worker(tmp_path: Path) -> Iterator[WorkerPool]:
    """As a server of four cores has them, for small pictures: it is with threads that decoders fail worst."""
    settings = load_settings(None, mm_max_pixels=MAX_PIXELS)
    preprocess = MediaPreprocessor.from_checkpoint(tmp_path, PUBLISHED_PROCESSOR, settings)
    pool = WorkerPool(count=1, memory_mb=512, slab_mb=64, inbox_bytes=1 << 20, cores=CoreShare(4))
    pool.open(preprocess)
    yield pool
    pool.close()


@pytest.mark.parametrize("kind", CLIPS)
async def test_a_damaged_clip_gives_its_frames_or_a_clear_error(
    kind: str, one_worker: WorkerPool, photos: dict[str, Any]
) -> None:
    """No worker crashes over it or hangs, and none raises what is not ours."""
    codec, container, options = KINDS[kind]
    frames = moving(photos["chelsea"], 12, 64, 48)
    whole = encode(frames, codec, container, options, muxer=INDEX_FIRST.get(container))
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    outcomes = set()
    for _ in range(CLIP_COUNT):
        blob = Blob(mutated(whole, rng, CLIP_HEAD), b"", kind)
        try:
            async with asyncio.timeout(HANGS_S):
                patches = await one_worker.run(blob, MMUrlType.VIDEO, PreprocessOptions())
        except (WrongFormatError, NotSupportedError):
            outcomes.add("refused")
        else:
            assert isinstance(patches, Patches)
            outcomes.add("answered")
    assert outcomes == {"answered", "refused"} or CLIP_COUNT < LEAST_CLIPS
    assert not one_worker.restarts


async def test_a_decoder_that_fails_with_its_threads_at_work_is_closed(
    one_worker: WorkerPool, photos: dict[str, Any]
) -> None:
    """dav1d tells of what is behind a picture while a thread is at the picture."""
    codec, container, options = KINDS["av1 webm"]
    whole = encode(moving(photos["chelsea"], 12, 64, 48), codec, container, options)
    with av.open(io.BytesIO(whole)) as source:
        size = whole.index(bytes(next(source.demux(video=0)))) - 6  # of the block that holds the first picture
    assert whole[size] == 0x41
    blob = Blob(whole[:size] + b"\x45" + whole[size + 1 :], b"", "a block that swallows others")
    async with asyncio.timeout(HANGS_S):
        for _ in range(300):
            with pytest.raises(WrongFormatError, match="broken video"):
                await one_worker.run(blob, MMUrlType.VIDEO, PreprocessOptions())


def test_an_animation_whose_clock_stands_still_is_broken() -> None:
    data = SEEDS["animated.avif"]
    at = data.index(b"mdhd") + 4
    time_scale = at + (12 if data[at] == 0 else 20)
    with pytest.raises(WrongFormatError, match="broken image"):
        decode(
            data[:time_scale] + bytes(4) + data[time_scale + 4 :],
            max_pixels=MAX_PIXELS,
            allow_truncated=False,
            exif_transpose=False,
        )
