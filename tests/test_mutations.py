"""Damaged files of every format: the image that Pillow makes of them, or a word of ours, and a probe that agrees.

RTP_MM_MUTATIONS is how many of each seed file, 40 by default.
"""

from __future__ import annotations

import io
import os
import zlib

import numpy as np
import pytest
from image_seeds import seeds
from mutations import mutated
from PIL import Image

from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.image import FORMATS, decode
from rtp_mm.media.probe import probe

SEEDS = dict(seeds())
COUNT = int(os.environ.get("RTP_MM_MUTATIONS", "40"))
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
