"""The native code on ARM, in emulation: the bytes that this CPU gives, and loops that are NEON.

Emulation says nothing about speed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import arm_compiled
import numpy as np
import pytest
from conftest import require
from image_seeds import seeds
from machine_code import AARCH64, Loop, loops
from mutations import mutated
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray
from test_resize import EDGES, FILTERS, PATCHES

from rtp_mm import _core

# qemu's name of a CPU, and how many levels the resize has there: with the int8 matrix extension, as Graviton 3 and
# Grace have it, and without, as Graviton 2.
CPUS = {"max": 2, "neoverse-n1": 1}
UNWRITTEN = 7  # what answers.cpp fills rows with


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    require("arm", arm_compiled.PACKAGES)
    return arm_compiled.compile_objects(tmp_path_factory.mktemp("arm"))


@pytest.fixture(scope="module")
def program(objects: list[Path]) -> Callable[[str], Path]:
    """Compiles a program of tests/cpp, or takes it from before."""

    def compiled(name: str) -> Path:
        path = objects[0].parent / name
        return path if path.exists() else arm_compiled.link(path, arm_compiled.CPP / f"{name}.cpp", objects)

    return compiled


@dataclass(frozen=True)
class Resize:
    """In the order of answers.cpp."""

    height: int
    width: int
    row_stride: int
    pixel_stride: int
    out_height: int
    out_width: int
    patch: int
    merge: int
    temporal: int = 1
    slot: int = 0
    filter: int = FILTERS.index("bicubic")
    is_vertical_first: int = 0

    def pixels(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        size = (self.height - 1) * self.row_stride + (self.width - 1) * self.pixel_stride + 3
        return rng.integers(0, 256, size, dtype=np.uint8)

    def rows(self, pixels: NDArray[np.uint8]) -> bytes:
        """As this machine computes them; `test_resize.py` shows that they are Pillow's."""
        out = np.full(
            (self.out_height * self.out_width // self.patch**2, 3 * self.temporal * self.patch**2), UNWRITTEN, np.uint8
        )
        return _core.resize_patchify(
            as_strided(pixels, (self.height, self.width, 3), (self.row_stride, self.pixel_stride, 1)),
            self.out_height,
            self.out_width,
            self.patch,
            self.merge,
            order="vertical" if self.is_vertical_first else "horizontal",
            filter=FILTERS[self.filter],
            temporal_patch_size=self.temporal,
            slot=self.slot,
            out=out,
        ).tobytes()


def numbers(*values: int) -> bytes:
    return np.array(values, np.int64).tobytes()


def edge_resizes() -> Iterator[Resize]:
    for (height, width), (out_height, out_width) in EDGES:
        for is_vertical_first in (0, 1):
            yield Resize(height, width, 3 * width, 3, out_height, out_width, 14, 2, is_vertical_first=is_vertical_first)


def random_resizes(rng: np.random.Generator, count: int) -> Iterator[Resize]:
    def side() -> int:
        return int(rng.integers(1, 2 ** rng.integers(1, 9)))

    for _ in range(count):
        patch, merge = PATCHES[rng.integers(len(PATCHES))]
        height, width, block, pixel_stride = side(), side(), patch * merge, int(rng.integers(3, 5))
        temporal = int(rng.integers(1, 3))
        yield Resize(
            height,
            width,
            width * pixel_stride + int(rng.integers(2)) * int(rng.integers(50)),  # a crop's rows are further apart
            pixel_stride,
            height if height % block == 0 else block * (1 + side() // block),
            block * (1 + side() // block),
            patch,
            merge,
            temporal,
            int(rng.integers(temporal)),
            int(rng.integers(len(FILTERS))),
            int(rng.integers(2)),
        )


@pytest.mark.parametrize("cpu", CPUS)
def test_the_rows_of_every_level_are_those_of_this_machine(program: Callable[[str], Path], cpu: str) -> None:
    rng = np.random.default_rng(5)
    asked = [(resize, resize.pixels(rng)) for resize in (*edge_resizes(), *random_resizes(rng, 400))]
    questions = b"".join(numbers(*vars(resize).values()) + pixels.tobytes() for resize, pixels in asked)
    answers = arm_compiled.run(cpu, program("answers"), "resize", questions=questions)
    for resize, pixels in asked:
        expected = resize.rows(pixels) * CPUS[cpu]
        assert answers[: len(expected)] == expected, resize
        answers = answers[len(expected) :]
    assert not answers
    # Which these questions would have told from the passes in the wrong order.
    assert any(
        replace(resize, is_vertical_first=1 - resize.is_vertical_first).rows(pixels) != resize.rows(pixels)
        for resize, pixels in asked
    )


def test_a_png_has_the_same_pixels(program: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(6)
    questions, expected = b"", b""
    for _ in range(200):
        height, width, channels = (int(number) for number in rng.integers(1, (20, 70, 5)))
        filtered = rng.integers(0, 256, (height, 1 + width * channels), dtype=np.uint8)
        filtered[:, 0] = rng.integers(0, 5 if rng.random() < 0.9 else 6, height)
        questions += numbers(height, width * channels, channels) + filtered.tobytes()
        pixels = _core.unfilter_png(filtered.tobytes(), height, width, channels)
        expected += b"\0" + bytes(height * width * channels) if pixels is None else b"\1" + pixels.tobytes()
    assert arm_compiled.run("max", program("answers"), "png", questions=questions) == expected


def test_a_jpeg_has_the_same_pixels(program: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(8)
    whole = [file for name, file in seeds((37, 29)) if name.endswith(".jpeg")]
    files = [file for data in whole for file in (data, *(mutated(data, rng, head=len(data)) for _ in range(30)))]
    expected = b""
    for file in files:
        jpeg = _core.Jpeg.read(file)
        pixels = None if jpeg is None else jpeg.pixels()
        expected += b"\0" if pixels is None else b"\1" + pixels.tobytes()
    questions = b"".join(numbers(len(file)) + file for file in files)
    assert arm_compiled.run("max", program("answers"), "jpeg", questions=questions) == expected


def test_every_colour_over_white_is_the_same(program: Callable[[str], Path]) -> None:
    colours, alphas = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    rgba = np.stack([colours, colours[::-1], colours.T, alphas], axis=2)
    answers = arm_compiled.run("max", program("answers"), "white", questions=numbers(256 * 256) + rgba.tobytes())
    assert answers == _core.over_white(rgba).tobytes()


def test_the_probe_reads_the_same_headers(program: Callable[[str], Path]) -> None:
    rng = np.random.default_rng(7)
    files = [file for _, whole in seeds() for file in (whole, *(mutated(whole, rng) for _ in range(60)))]
    questions = b"".join(numbers(len(file)) + file for file in files)
    answers = arm_compiled.run("max", program("answers"), "probe", questions=questions).decode().splitlines()
    for file, answer in zip(files, answers, strict=True):
        match _core.probe(file):
            case None:
                expected = "unknown"
            case int(more):
                expected = f"more {more}"
            case format, width, height, frames:
                expected = f"{format} {width} {height} {frames or 0}"
        assert answer == expected


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("name", ["test_algorithms", "test_resize"])
def test_the_tests_of_the_algorithms_pass(program: Callable[[str], Path], name: str, cpu: str) -> None:
    """Floats against naive loops in float64, int8 products to the bit, levels of the resize within protected pages."""
    arm_compiled.run(cpu, program(name))


def largest_loop(objects: list[Path], stem: str, function: str, instruction: str) -> Loop:
    """Of the functions with that word in their name, the innermost loop with most of these instructions."""
    compiled = next(path for path in objects if path.stem == stem)
    found = [loop for loop in loops(compiled, AARCH64) if function in loop.function]
    return max(found, key=lambda loop: loop.instructions[instruction])


@pytest.mark.parametrize(
    ("stem", "function", "instruction", "share"),
    [
        ("multiply", "on_portable<rtp_mm::(anonymous namespace)::Multiply<float, false>", "fmla", 0.5),
        ("multiply", "on_portable<rtp_mm::(anonymous namespace)::Multiply<float, true>", "fmla", 0.5),
        ("multiply", "on_neon_i8mm<rtp_mm::(anonymous namespace)::Multiply<int", "usdot", 0.5),
        ("resize_neon", "horizontal", "usdot", 0.5),
        ("resize_neon", "vertical", "usdot", 0.5),
        ("resize_neon", "gather_columns", "tbl", 0.2),
        ("resize_portable", "horizontal", "mla", 0.2),
        ("resize_portable", "vertical", "mla", 0.2),
        ("centre_rows", "centre_rows", "scvtf", 0.1),
        ("packed_linear", "PackedLinear<rtp_mm::BFloat16", "uxtl2", 0.05),
        ("pointwise", "AddNorm<float, float>", "fmla", 0.1),
        ("pointwise", "RotateQk<float>", "fmla", 0.05),
        ("pointwise", "SiluGate<float>", "fmla", 0.2),
        ("pointwise", "SiluGate<rtp_mm::BFloat16>", "fmla", 0.15),
        ("png_rows", "unfilter<3>", "zip1", 0.05),
    ],
)
def test_hot_loops_are_vectors(objects: list[Path], stem: str, function: str, instruction: str, share: float) -> None:
    """The share of a loop's instructions that the work takes; a loop that does it a number at a time has none."""
    loop = largest_loop(objects, stem, function, instruction)
    assert loop.instructions[instruction] >= share * loop.instructions.total(), loop
    assert instruction not in ("fmla", "usdot", "mla") or loop.spills == 0, loop


def test_a_loop_of_single_numbers_is_told_from_vectors(objects: list[Path], tmp_path: Path) -> None:
    """Adding up floats in order is no work for vectors."""
    source = tmp_path / "planted.cpp"
    source.write_text(
        "float dot(const float* a, const float* b, long n) {\n"
        "  float sum = 0;\n  for (long i = 0; i < n; ++i) sum += a[i] * b[i];\n  return sum;\n}\n"
    )
    found = loops(arm_compiled.compile_object(source, tmp_path, "-ffp-contract=fast"), AARCH64)
    assert found
    assert all(loop.function.startswith("dot(") and loop.instructions["fmla"] == 0 for loop in found)
