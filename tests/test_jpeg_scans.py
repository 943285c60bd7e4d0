"""Our JPEG decoder on files that no usual encoder writes: libjpeg-turbo's bytes, and silence where it would guess."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import simplejpeg
from jpeg_encoder import (
    JpegWriter,
    Picture,
    Sampling,
    Scan,
    approximations,
    random_jpeg,
    random_picture,
)
from test_jpeg import by_ours, by_pillow

from rtp_mm import _core

SAMPLINGS: list[Sampling] = [None, (1, 1), (2, 1), (1, 2), (2, 2)]
FILES = 40  # of each kind: 10 ms each
FIRST = Scan((0, 1, 2), 0, 0)
CHROMA = [Scan((c,), 1, 63) for c in (1, 2)]


def assert_pixels_are_libjpegs(data: bytes) -> None:
    ours = by_ours(data)
    assert ours is not None
    np.testing.assert_array_equal(ours, by_pillow(data))
    np.testing.assert_array_equal(ours, simplejpeg.decode_jpeg(data, "RGB"))


@pytest.mark.parametrize("is_progressive", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_pixels_of_any_code_and_scans_are_libjpegs(sampling: Sampling, is_progressive: bool) -> None:
    for seed in range(FILES):
        rng = np.random.default_rng(seed)
        width, height = rng.integers(1, 61, 2).tolist()
        data = random_jpeg(rng, width, height, sampling, is_progressive)
        if sampling is not None and sampling[0] == 2 and width <= 4:
            assert _core.Jpeg.read(data) is None
        else:
            assert_pixels_are_libjpegs(data)


def test_as_many_blocks_end_at_once_as_one_symbol_tells() -> None:
    """And some more."""
    rng = np.random.default_rng(0)
    blocks = np.zeros((182, 182, 64), np.int64)
    blocks[..., 0] = rng.integers(-1000, 1000, blocks.shape[:2])
    picture = Picture(8 * 182, 8 * 182, None, [blocks], [bytes([1] * 64)])
    assert_pixels_are_libjpegs(JpegWriter(rng, picture, [Scan((0,), 0, 0), Scan((0,), 1, 63)]).file())


@pytest.mark.parametrize("sampling", SAMPLINGS[1:])
@pytest.mark.parametrize(
    ("ahead", "chain", "behind"),
    [
        ([FIRST, *CHROMA], approximations((0,), 1, 63, 3), []),
        ([FIRST, *CHROMA, Scan((0,), 1, 6)], approximations((0,), 7, 63, 3), []),
        ([FIRST, Scan((0,), 1, 63), CHROMA[1]], approximations((1,), 1, 63, 3), []),
        ([], approximations((0, 1, 2), 0, 0, 3), [Scan((0,), 1, 63), *CHROMA]),
    ],
    ids=["luma", "luma, upper half", "chroma", "first coefficients"],
)
def test_no_bit_comes_ahead_of_a_coarser_one(
    ahead: list[Scan], chain: list[Scan], behind: list[Scan], sampling: Sampling
) -> None:
    for order in itertools.permutations(chain):
        rng = np.random.default_rng(0)
        data = JpegWriter(rng, random_picture(rng, 40, 30, sampling), [*ahead, *order, *behind]).file()
        if list(order) == chain:
            assert_pixels_are_libjpegs(data)
        else:
            assert _core.Jpeg.read(data) is None


@pytest.mark.parametrize("high", [0, 1])
@pytest.mark.parametrize(("first", "last"), [(1, 1), (6, 9), (32, 32), (63, 63)])
def test_no_coefficient_is_left_out(first: int, last: int, high: int) -> None:
    """high: whether it is its last bit, or all of it."""
    rng = np.random.default_rng(0)
    picture = random_picture(rng, 40, 30, (2, 2))
    rest = [Scan((0,), begin, end) for begin, end in ((1, first - 1), (last + 1, 63)) if begin <= end]
    script = [FIRST, *CHROMA, *rest, *([Scan((0,), first, last, 0, 1)] if high else [])]
    assert _core.Jpeg.read(JpegWriter(rng, picture, script).file()) is None
    script.append(Scan((0,), first, last, high, 0))
    assert_pixels_are_libjpegs(JpegWriter(rng, picture, script).file())


@pytest.mark.parametrize("is_progressive", [False, True])
@pytest.mark.parametrize("spare", [(0, 1), (1, 0)], ids=["first coefficients", "others"])
def test_a_code_with_a_word_of_ones_alone_is_refused(spare: tuple[int, int], is_progressive: bool) -> None:
    """As libjpeg refuses it, whether the word is in use or not."""
    for seed in range(10):
        rng = np.random.default_rng(seed)
        picture = random_picture(rng, 40, 30, (2, 2))
        script = [FIRST, Scan((0,), 1, 63), *CHROMA] if is_progressive else [Scan((0, 1, 2))]
        data = JpegWriter(rng, picture, script, spare).file()
        with pytest.raises(OSError, match="broken data stream"):
            by_pillow(data)
        assert by_ours(data) is None
        assert_pixels_are_libjpegs(JpegWriter(rng, picture, script).file())
