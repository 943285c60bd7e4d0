"""`_core.patchify` against its slow twin; without torch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import reference
from numpy.typing import NDArray

from rtp_mm import _core


def random_frames(frames: int, height: int, width: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(
    ("frames", "rows", "columns", "patch", "merge", "temporal"),
    [(1, 3, 4, 14, 2, 1), (4, 2, 3, 14, 2, 2), (2, 1, 1, 16, 2, 2), (3, 2, 2, 5, 3, 1), (1, 7, 2, 14, 1, 1)],
)
def test_equals_the_slow_twin(frames: int, rows: int, columns: int, patch: int, merge: int, temporal: int) -> None:
    image = random_frames(frames, rows * patch * merge, columns * patch * merge)
    ours = _core.patchify(image, patch, merge, temporal)
    expected = reference.patchify(image, patch, merge, temporal)
    np.testing.assert_array_equal(ours, expected)
    assert not np.array_equal(ours, reference.patchify(image[..., ::-1], patch, merge, temporal))  # BGR is another


def test_a_still_image_is_the_first_frame_of_its_clip() -> None:
    image = random_frames(1, 56, 84)
    clip = _core.patchify(np.repeat(image, 2, axis=0), 14, 2, 2).reshape(-1, 3, 2, 14 * 14)
    still = _core.patchify(image, 14, 2, 1).reshape(-1, 3, 14 * 14)
    np.testing.assert_array_equal(clip[:, :, 0], still)
    np.testing.assert_array_equal(clip[:, :, 1], still)


def test_writes_into_the_memory_it_is_given_and_nowhere_else() -> None:
    image = random_frames(1, 56, 84)
    expected = reference.patchify(image, 14, 2, 1)
    slab = np.full(expected.size + 64, 7, dtype=np.uint8)
    out = slab[32:-32].reshape(expected.shape)
    assert _core.patchify(image, 14, 2, 1, out) is out
    np.testing.assert_array_equal(out, expected)
    assert (slab[:32] == 7).all()
    assert (slab[-32:] == 7).all()


def test_reads_memory_it_may_not_write() -> None:
    image = random_frames(1, 28, 28)
    image.flags.writeable = False
    assert _core.patchify(image, 14, 2, 1).shape == (4, 588)


def read_only(array: NDArray[np.uint8]) -> NDArray[np.uint8]:
    array.flags.writeable = False
    return array


STILL = random_frames(1, 28, 56)
FITTING = np.empty((8, 588), dtype=np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((STILL[0], 14, 2, 1), r"frames must be .*, got \(28, 56, 3\) uint8"),
        ((STILL.astype(np.int32), 14, 2, 1), r"got \(1, 28, 56, 3\) int32"),
        ((STILL[:, :, ::2], 14, 2, 1), r"got \(1, 28, 28, 3\) uint8 not contiguous"),
        ((np.zeros((1, 28, 28, 4), np.uint8), 14, 2, 1), r"got \(1, 28, 28, 4\)"),
        ((STILL, 14, 2, 2), r"F must be divisible by temporal_patch_size 2, got \(1, 28, 56, 3\)"),
        ((STILL, 14, 3, 1), r"divisible by patch_size \* merge_size = 14 \* 3, got \(1, 28, 56, 3\)"),
        ((STILL, 0, 2, 1), "must be positive"),
        ((STILL, 14, -2, 1), "must be positive"),
        ((STILL, 14, 2, 1, FITTING[:7]), r"out must be .* \[8, 588\] uint8, got \(7, 588\)"),
        ((STILL, 14, 2, 1, FITTING.astype(np.int8)), r"got \(8, 588\) int8"),
        ((STILL, 14, 2, 1, np.empty((588, 8), np.uint8).T), "not contiguous"),
        ((STILL, 14, 2, 1, read_only(FITTING.copy())), r"out must be writeable"),
    ],
)
def test_a_bad_argument_is_refused_with_what_came(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^patchify: .*{message}"):
        _core.patchify(*arguments)  # type: ignore[arg-type]


def test_needs_no_torch() -> None:
    code = (
        "import sys, numpy; from rtp_mm import _core; "
        "_core.patchify(numpy.zeros((1, 28, 28, 3), numpy.uint8), 14, 2, 1); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
