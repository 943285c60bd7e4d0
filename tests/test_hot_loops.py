"""Loops as this machine's compiler leaves them, also for CPUs that are not here: matrix products, JPEGs."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from arm_compiled import own_options
from machine_code import X86_64, Loop, loops

ROOT = Path(__file__).resolve().parent.parent
MULTIPLY, JPEG = "csrc/cpu/multiply.cpp", "csrc/cpu/jpeg_rows.cpp"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="test_arm.py looks at the loops for ARM")


def loops_of(source: str, folder: Path) -> list[Loop]:
    target = folder / "object.o"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    options = ["-std=c++20", "-O3", "-fPIC", *own_options()[source], f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, "-c", ROOT / source, "-o", target], check=True)
    return loops(target, X86_64)


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> list[Loop]:
    return loops_of(MULTIPLY, tmp_path_factory.mktemp("products"))


@pytest.fixture(scope="module")
def of_jpegs(tmp_path_factory: pytest.TempPathFactory) -> list[Loop]:
    return loops_of(JPEG, tmp_path_factory.mktemp("jpegs"))


@pytest.mark.parametrize(
    ("arch", "product", "instruction", "most"),
    [
        ("Avx512Bf16", "Multiply<unsigned int, false>", "vdpbf16ps", 28),
        ("Avx512Bf16", "Multiply<unsigned int, true>", "vdpbf16ps", 28),
        ("Avx512Vnni", "Multiply<int, false>", "vpdpbusd", 28),
        ("Avx512,", "Multiply<float, false>", "vfmadd231ps", 28),
    ],
)
def test_a_product_keeps_its_sums_in_registers(
    products: list[Loop], arch: str, product: str, instruction: str, most: int
) -> None:
    """The widest strips: most of a loop's instructions are products, and no vector goes through the stack."""
    ours = [loop for loop in products if f"<rtp_mm::{arch}" in loop.function and product in loop.function]
    largest = max(ours, key=lambda loop: loop.instructions[instruction])
    assert largest.instructions[instruction] == most, largest
    assert most >= 0.5 * largest.instructions.total(), largest
    assert all(loop.spills == 0 for loop in ours if loop.instructions[instruction]), ours


@pytest.mark.parametrize("arch", ["on_avx2", "on_avx512"])
@pytest.mark.parametrize(
    ("kernel", "instruction", "others"),
    [
        ("DecodeMcus", "vpmaddwd", {"vpackssdw": 16, "vpunpcklwd": 18}),  # the inverse DCT
        ("WriteRow", "vpshufb", {"vpmaddwd": 2, "vpmulhw": 2}),  # colours
        ("WriteRow", "vpsrlw", {"vpaddw": 3}),  # chroma between its samples
    ],
)
def test_a_jpegs_samples_are_worked_at_in_vectors(
    of_jpegs: list[Loop], arch: str, kernel: str, instruction: str, others: dict[str, int]
) -> None:
    ours = [loop for loop in of_jpegs if arch in loop.function and kernel in loop.function]
    loop = max(
        (loop for loop in ours if all(loop.instructions[name] >= count for name, count in others.items())),
        key=lambda loop: loop.instructions[instruction] / loop.instructions.total(),
    )
    assert loop.instructions[instruction] >= 2, loop
    vectors = sum(count for name, count in loop.instructions.items() if name.startswith("v"))
    assert vectors >= 0.75 * loop.instructions.total(), loop
