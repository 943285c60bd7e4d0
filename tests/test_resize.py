"""`_core.resize_patchify` against Pillow itself, byte for byte, on every instruction set that this CPU has."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import pytest
import reference
from numpy.typing import NDArray
from PIL import Image

from rtp_mm import _core
from rtp_mm.preprocess.resize_order import ResizeRule, installed_rule, resize_order

Pixels = NDArray[np.uint8]
Order = Literal["horizontal", "vertical"]

LEVELS = _core.resize_levels()
PATCHES = [(14, 2), (16, 2), (14, 1), (12, 2), (7, 3), (1, 1), (32, 1), (5, 4)]  # patch and merge sizes
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
# (height, width) -> (height, width) where something is special, in patches of 14 merged by 2.
EDGES = [
    ((1, 1), (28, 28)),
    ((1, 1), (28, 56)),
    ((1, 200), (28, 2800)),
    ((200, 1), (2800, 28)),
    ((3000, 15), (2996, 28)),
    ((15, 3000), (28, 2996)),
    ((28, 56), (28, 56)),  # no pass
    ((28, 300), (28, 140)),  # one pass
    ((300, 28), (140, 28)),
    ((768, 1024), (756, 1036)),  # near 1:1, where some outputs have five taps and most have four
    ((28, 458), (28, 448)),  # as above, of an image's last rows as well
    ((28, 125), (28, 112)),  # on both sides of the scale up to which VBMI finds 16 columns in 64 bytes
    ((28, 128), (28, 112)),
    ((16, 16), (28, 28)),
    ((2000, 1500), (28, 28)),  # 285 taps
    ((4, 4), (840, 840)),
]


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def generator(*names: object) -> np.random.Generator:
    """One of its own for these names."""
    return np.random.default_rng([*repr(names).encode()])


def drawn_side(rng: np.random.Generator, least: int, most: int) -> int:
    """Evenly on a logarithmic scale."""
    return int(least * ((most + 1) / least) ** rng.random())


def drawn_output(rng: np.random.Generator, most: int) -> tuple[int, int, int, int]:
    """Patch and merge size, height and width."""
    patch, merge = PATCHES[rng.integers(len(PATCHES))]
    height, width = (max(1, round(drawn_side(rng, 1, most) / (patch * merge))) * patch * merge for _ in range(2))
    return patch, merge, height, width


def pixels(rng: np.random.Generator, height: int, width: int) -> Pixels:
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    if rng.random() < 0.3:
        return np.where(image > 127, np.uint8(255), np.uint8(0))  # overshoots at every edge: clamped
    return image


def pillow(image: Pixels, height: int, width: int, order: Order, filter: str = "bicubic") -> Pixels:
    """One axis after the other, so that the order is what is asked for, whatever Pillow's own rule is."""
    resample = Image.Resampling[filter.upper()]
    between = (image.shape[1], height) if order == "vertical" else (width, image.shape[0])
    return np.asarray(Image.fromarray(image).resize(between, resample).resize((width, height), resample))


def patch_rows(image: Pixels, patch: int, merge: int) -> Pixels:
    return reference.patchify(image[None], patch, merge, 1)


def assert_is_pillows(
    image: Pixels, size: tuple[int, int], patch: int, merge: int, order: Order, level: str, filter: Any = "bicubic"
) -> None:
    ours = _core.resize_patchify(image, *size, patch, merge, order=order, filter=filter, level=level)
    np.testing.assert_array_equal(ours, patch_rows(pillow(image, *size, order, filter), patch, merge))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
@pytest.mark.parametrize("seed", range(4))
def test_any_size_is_pillows(level: str, order: Order, seed: int) -> None:
    """Other sizes for each level and order: thousands in all."""
    rng = generator("any", level, order, seed)
    seen = set()
    for _ in range(350):
        image = pixels(rng, drawn_side(rng, 1, 250), drawn_side(rng, 1, 250))
        patch, merge, *size = drawn_output(rng, 250)
        assert_is_pillows(image, (size[0], size[1]), patch, merge, order, level)
        seen.add((*image.shape, *size))
    assert len(seen) > 340


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
def test_long_sides_are_pillows(level: str, order: Order) -> None:
    """Of 1000 to 4000 pixels, the other up to 200 times shorter."""
    rng = generator("long", level, order)
    for _ in range(25):
        long = drawn_side(rng, 1000, 4000)
        short = drawn_side(rng, -(-long // 200), min(long, 4_000_000 // long))
        image = pixels(rng, *rng.permutation([long, short]).tolist())
        patch, merge, *size = drawn_output(rng, 2000)
        assert_is_pillows(image, (size[0], size[1]), patch, merge, order, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
def test_one_pixel_wide_is_pillows(level: str, order: Order) -> None:
    rng = generator(level, order, 4)
    for _ in range(60):
        image = pixels(rng, *rng.permutation([1, drawn_side(rng, 1, 200)]).tolist())
        patch, merge, *size = drawn_output(rng, 1400)
        assert_is_pillows(image, (size[0], size[1]), patch, merge, order, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("bytes_per_pixel", [3, 4])
def test_any_crop_is_pillows(level: str, bytes_per_pixel: int) -> None:
    """As Pillow cuts and resizes in one go; ours is given a view of the whole image."""
    rng = generator(level, str(bytes_per_pixel), 5)
    orders = set()
    for _ in range(100):
        image = pixels(rng, drawn_side(rng, 1, 1500), drawn_side(rng, 1, 1500))
        (top, bottom), (left, right) = (np.sort(rng.choice(side + 1, 2, replace=False)) for side in image.shape[:2])
        patch, merge, height, width = drawn_output(rng, 500)
        order = resize_order(bottom - top, right - left, height, width, installed_rule())
        crop = Image.fromarray(image).crop((left, top, right, bottom))
        expected = np.asarray(crop.resize((width, height), Image.Resampling.BICUBIC))
        view = (image if bytes_per_pixel == 3 else in_four_bytes(image))[top:bottom, left:right]
        ours = _core.resize_patchify(view, height, width, patch, merge, order=order, level=level)
        np.testing.assert_array_equal(ours, patch_rows(expected, patch, merge))
        orders.add(order)
    assert len(orders) == (1 if installed_rule() == "pillow-12.1" else 2)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
@pytest.mark.parametrize(("size", "out"), EDGES, ids=str)
def test_special_sizes_are_pillows(level: str, order: Order, size: tuple[int, int], out: tuple[int, int]) -> None:
    assert_is_pillows(noise(*size), out, 14, 2, order, level)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("filter", FILTERS)
def test_every_filter_is_pillows(level: str, filter: str) -> None:
    rng = np.random.default_rng(2)
    for _ in range(40):
        size, out = rng.integers(1, 120, 2), rng.integers(1, 8, 2) * 16
        order: Order = "vertical" if rng.random() < 0.5 else "horizontal"
        assert_is_pillows(noise(*size), tuple(out.tolist()), 16, 1, order, level, filter)


def test_photographs_are_pillows_in_its_own_order(photos: dict[str, Pixels]) -> None:
    for image in photos.values():
        for height, width in [(308, 448), (504, 504), (84, 700), (700, 84)]:
            order = resize_order(*image.shape[:2], height, width, installed_rule())
            expected = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
            ours = _core.resize_patchify(image, height, width, 14, 2, order=order)
            np.testing.assert_array_equal(ours, patch_rows(expected, 14, 2))


def test_the_installed_rule_is_pillows() -> None:
    """Sizes on both sides of every rule's border, where the other order would give other bytes."""
    rng = np.random.default_rng(3)
    orders = set()
    for _ in range(300):
        height, width = (int(np.exp(rng.uniform(1, 5))) for _ in range(2))
        out_height, out_width = (max(1, round(side * np.exp(rng.uniform(-1, 0.7)))) for side in (height, width))
        image = noise(height, width)
        order = resize_order(height, width, out_height, out_width, installed_rule())
        direct = np.asarray(Image.fromarray(image).resize((out_width, out_height), Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(direct, pillow(image, out_height, out_width, order))
        orders.add(order)
    assert len(orders) == (1 if installed_rule() == "pillow-12.1" else 2)


@pytest.mark.parametrize(
    ("size", "out", "vertical_first"),
    [
        ((768, 1024), (756, 1036), {"pillow-13.0"}),
        ((2160, 3840), (2156, 3836), set()),  # the height shrinks by 4, the width too
        ((110, 100), (99, 95), {"pillow-13.0"}),
        ((110, 100), (100, 95), set()),  # 10 is not over twice 5
        ((3000, 20), (2996, 28), {"pillow-12.2", "pillow-13.0"}),
        ((3000, 30), (2996, 28), set()),  # 100:1 is not over 100:1, nor 4 over twice 2
        ((3000, 20), (3024, 28), set()),
    ],
)
def test_rules_of_the_pass_order(size: tuple[int, int], out: tuple[int, int], vertical_first: set[str]) -> None:
    rules: tuple[ResizeRule, ...] = ("pillow-12.1", "pillow-12.2", "pillow-13.0")
    assert {rule for rule in rules if resize_order(*size, *out, rule) == "vertical"} == vertical_first


@pytest.mark.parametrize(
    ("version", "rule"),
    [("11.3.0", "pillow-12.1"), ("12.1.1", "pillow-12.1"), ("12.2.0", "pillow-12.2"), ("12.3.0", "pillow-12.2"),
     ("13.0.0", "pillow-13.0"), ("13.1.0.dev0", "pillow-13.0")],
)  # fmt: skip
def test_rules_by_release(monkeypatch: pytest.MonkeyPatch, version: str, rule: str) -> None:
    monkeypatch.setattr("PIL.__version__", version)
    assert installed_rule() == rule


def test_another_order_or_filter_would_be_seen() -> None:
    image = noise(300, 451)
    ours = _core.resize_patchify(image, 280, 448, 14, 2, order="horizontal")
    for wrong in (
        _core.resize_patchify(image, 280, 448, 14, 2, order="vertical"),
        _core.resize_patchify(image, 280, 448, 14, 2, filter="lanczos"),
        _core.resize_patchify(image[:, :, ::-1].copy(), 280, 448, 14, 2),
    ):
        assert (wrong != ours).mean() > 0.1


def test_what_one_float32_pass_gives_would_be_seen() -> None:
    """Pillow's two roundings to bytes show: a resize that does without them is another."""
    image = noise(300, 451)
    planes = [Image.fromarray(image[..., c].astype(np.float32)) for c in range(3)]
    exact = np.stack([np.asarray(plane.resize((448, 280), Image.Resampling.BICUBIC)) for plane in planes], axis=-1)
    wrong = patch_rows(np.clip(np.rint(exact), 0, 255).astype(np.uint8), 14, 2)
    assert (wrong != _core.resize_patchify(image, 280, 448, 14, 2)).mean() > 0.05


def in_four_bytes(image: Pixels) -> Pixels:
    return np.dstack([image, noise(*image.shape[:2], seed=9)[..., :1]])[..., :3]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
def test_views_are_read_as_they_lie_in_memory(level: str, order: Order) -> None:
    image = noise(97, 133)
    crops = [(0, 0, 97, 133), (0, 0, 1, 1), (96, 132, 97, 133), (5, 7, 90, 131), (40, 0, 41, 133), (0, 50, 97, 51)]
    for top, left, bottom, right in crops:
        expected = _core.resize_patchify(image[top:bottom, left:right].copy(), 56, 84, 14, 2, order=order, level=level)
        for parent in (image, in_four_bytes(image)):
            view = parent[top:bottom, left:right]
            ours = _core.resize_patchify(view, 56, 84, 14, 2, order=order, level=level)
            np.testing.assert_array_equal(ours, expected)
    every_other_row = _core.resize_patchify(image[::2], 56, 84, 14, 2, order=order, level=level)
    np.testing.assert_array_equal(every_other_row, _core.resize_patchify(image[::2].copy(), 56, 84, 14, 2, order=order))


@pytest.mark.parametrize("level", LEVELS)
def test_frames_of_a_clip_go_side_by_side_into_one_array(level: str) -> None:
    frames = [noise(50, 70, seed) for seed in range(2)]
    clip = np.empty((2 * 3 * 4, 3 * 2 * 14 * 14), np.uint8)
    for slot, frame in enumerate(frames):
        _core.resize_patchify(frame, 56, 84, 14, 2, temporal_patch_size=2, slot=slot, level=level, out=clip)
    resized = np.stack([pillow(frame, 56, 84, "horizontal") for frame in frames])
    np.testing.assert_array_equal(clip, reference.patchify(resized, 14, 2, 2))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("patch", [14, 16, 7])
def test_writes_into_the_memory_it_is_given_and_nowhere_else(level: str, patch: int) -> None:
    image = noise(50, 70)
    expected = _core.resize_patchify(image, 2 * patch, 4 * patch, patch, 2)
    slab = np.full(expected.size + 64, 7, dtype=np.uint8)
    out = slab[32:-32].reshape(expected.shape)
    assert _core.resize_patchify(image, 2 * patch, 4 * patch, patch, 2, level=level, out=out) is out
    np.testing.assert_array_equal(out, expected)
    assert (slab[:32] == 7).all()
    assert (slab[-32:] == 7).all()


def test_reads_memory_it_may_not_write() -> None:
    assert _core.resize_patchify(read_only(noise(28, 28)), 28, 28, 14, 2).shape == (4, 588)


def test_threads_do_not_disturb_each_other() -> None:
    """Each has its own scratch memory; coefficients are shared."""
    jobs = [(noise(40 + 7 * i, 300 - 9 * i, i), 28 * (1 + i % 3), 28 * (1 + i % 5)) for i in range(24)]
    expected = [_core.resize_patchify(image, height, width, 14, 2) for image, height, width in jobs]
    with ThreadPoolExecutor(4) as pool:
        ours = pool.map(lambda job: _core.resize_patchify(*job, 14, 2), jobs * 5)
        for i, rows in enumerate(ours):
            np.testing.assert_array_equal(rows, expected[i % len(jobs)])


def read_only(array: Pixels) -> Pixels:
    array.flags.writeable = False
    return array


STILL = noise(28, 56)
FITTING = np.empty((8, 588), dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "arguments", "options", "message"),
    [
        (STILL[None], (28, 56, 14, 2), {}, r"image must be \[H, W, 3\] uint8 .*, got \(1, 28, 56, 3\) uint8"),
        (STILL.astype(np.int32), (28, 56, 14, 2), {}, r"got \(28, 56, 3\) int32"),
        (STILL[:0], (28, 56, 14, 2), {}, r"not empty, got \(0, 56, 3\)"),
        (np.zeros((28, 28, 4), np.uint8), (28, 28, 14, 2), {}, r"got \(28, 28, 4\)"),
        (STILL[:, ::2], (28, 28, 14, 2), {}, r"strides .*, got \(28, 28, 3\) uint8 with strides \(168, 6, 1\)"),
        (STILL[::-1], (28, 28, 14, 2), {}, r"with strides \(-168, 3, 1\)"),
        (STILL[..., ::-1], (28, 28, 14, 2), {}, r"with strides \(168, 3, -1\)"),
        (STILL, (28, 50, 14, 2), {}, r"multiples of patch_size \* merge_size = 14 \* 2, got 28 and 50"),
        (STILL, (0, 56, 14, 2), {}, "multiples of .*, got 0 and 56"),
        (STILL, (28, 56, 0, 2), {}, "must be positive, got 0 and 2"),
        (STILL, (28, 56, 14, -2), {}, "must be positive, got 14 and -2"),
        (STILL, (28, 56, 14, 2), {"order": "both"}, "order must be one of horizontal, vertical, got both"),
        (STILL, (28, 56, 14, 2), {"filter": "cubic"}, "filter must be one of nearest, .*, got cubic"),
        (STILL, (28, 56, 14, 2), {"level": "mmx"}, "level must be one of portable, .*, got mmx"),
        (STILL, (28, 56, 14, 2), {"temporal_patch_size": 2}, "out must be given"),
        (STILL, (28, 56, 14, 2), {"slot": 1}, "slot must be within temporal_patch_size 1, got 1"),
        (STILL, (28, 56, 14, 2), {"out": FITTING[:7]}, r"out must be .* \[8, 588\] uint8, got \(7, 588\)"),
        (STILL, (28, 56, 14, 2), {"out": FITTING.astype(np.int8)}, r"got \(8, 588\) int8"),
        (STILL, (28, 56, 14, 2), {"out": np.empty((588, 8), np.uint8).T}, r"with strides \(1, 8\)"),
        (STILL, (28, 56, 14, 2), {"out": read_only(FITTING.copy())}, "out must be writeable"),
    ],
)
def test_a_bad_argument_is_refused_with_what_came(
    image: Pixels, arguments: tuple[int, int, int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^resize_patchify: .*{message}"):
        _core.resize_patchify(image, *arguments, **options)


def test_needs_no_torch() -> None:
    code = (
        "import sys, numpy; from rtp_mm import _core; "
        "_core.resize_patchify(numpy.zeros((28, 28, 3), numpy.uint8), 28, 28, 14, 2); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
