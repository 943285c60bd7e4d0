"""Sizes: the rule of the reference, integer for integer, and crops that lose no pixel."""

from __future__ import annotations

import random

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

from rtp_mm.errors import WrongFormatError
from rtp_mm.preprocess.sizes import crop_pixels, smart_resize
from rtp_mm.types import CropBox


def random_side(rng: random.Random) -> int:
    """Mostly small, where rounding bites; sometimes a camera's or a scanner's."""
    return rng.choice([rng.randint(1, 60), rng.randint(1, 700), rng.randint(1, 9000)])


def test_smart_resize_is_the_reference() -> None:
    rng = random.Random(20240918)
    compared = 0
    while compared < 5000:
        height, width, factor = random_side(rng), random_side(rng), rng.choice([28, 32, 14, 1])
        low, high = sorted((rng.randint(1, 60) * factor**2, rng.randint(1, 20000) * factor**2 + rng.randint(0, 99)))
        if max(height, width) > 200 * min(height, width):
            continue
        sizes = smart_resize(height, width, factor, low, high)
        assert sizes == reference(height, width, factor, low, high)
        assert all(type(side) is int and side >= factor and side % factor == 0 for side in sizes)
        compared += 1


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (487, 730, (476, 728)),
        (10, 1000, (28, 560)),  # a side that rounds to 0 takes the way of a small image
        (1, 1, (56, 56)),
        (1, 200, (28, 812)),
        (9000, 9000, (3584, 3584)),
        (42, 98, (56, 112)),  # 1.5 and 3.5 factors: halves go to the even neighbour
    ],
)
def test_sizes_of_published_limits(height: int, width: int, expected: tuple[int, int]) -> None:
    assert smart_resize(height, width, 28, 3136, 12845056) == expected


def test_aspect_ratio_of_200_is_the_last_admitted() -> None:
    assert smart_resize(2, 400, 28, 3136, 12845056)
    with pytest.raises(WrongFormatError, match="401x2 has an aspect ratio over the limit of 200"):
        smart_resize(2, 401, 28, 3136, 12845056)
    with pytest.raises(WrongFormatError, match="at least one pixel"):
        smart_resize(0, 10, 28, 3136, 12845056)


@pytest.mark.parametrize(
    ("crop", "expected"),
    [
        (None, (0, 0, 487, 730)),
        (CropBox(0, 0, 1, 1), (0, 0, 487, 730)),
        (CropBox(0.25, 0.5, 0.75, 1), (243, 182, 487, 548)),  # 182.5 and 243.5 outwards
        (CropBox(0.5, 0.5, 0.5000001, 0.5000001), (243, 365, 244, 366)),
        (CropBox(0.9999999999999999, 0, 1, 1e-12), (0, 729, 1, 730)),
    ],
)
def test_crop_takes_every_pixel_that_it_touches(crop: CropBox | None, expected: tuple[int, int, int, int]) -> None:
    box = crop_pixels(487, 730, crop)
    assert box == expected
    assert box.size == (box.bottom - box.top, box.right - box.left)


def test_no_crop_is_empty_or_outside() -> None:
    rng = random.Random(7)
    for _ in range(5000):
        height, width = random_side(rng), random_side(rng)
        x1, x2 = sorted((rng.random(), rng.random()))
        y1, y2 = sorted((rng.random(), rng.random()))
        top, left, bottom, right = crop_pixels(height, width, CropBox(x1, y1, x2, y2))
        assert 0 <= top < bottom <= height
        assert 0 <= left < right <= width
