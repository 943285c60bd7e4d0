"""The loops of the matrix products as this machine's compiler leaves them, also for CPUs that are not here."""

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
MULTIPLY = "csrc/cpu/multiply.cpp"

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="test_arm.py looks at the loops for ARM")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Loop]:
    target = tmp_path_factory.mktemp("loops") / "multiply.o"
    compiler = os.environ.get("CXX") or shutil.which("g++") or "c++"
    options = ["-std=c++20", "-O3", "-fPIC", *own_options()[MULTIPLY], f"-I{ROOT / 'csrc'}"]
    subprocess.run([compiler, *options, "-c", ROOT / MULTIPLY, "-o", target], check=True)
    return loops(target, X86_64)


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
    found: list[Loop], arch: str, product: str, instruction: str, most: int
) -> None:
    """The widest strips: most of a loop's instructions are products, and no vector goes through the stack."""
    ours = [loop for loop in found if f"<rtp_mm::{arch}" in loop.function and product in loop.function]
    largest = max(ours, key=lambda loop: loop.instructions[instruction])
    assert largest.instructions[instruction] == most, largest
    assert most >= 0.5 * largest.instructions.total(), largest
    assert all(loop.spills == 0 for loop in ours if loop.instructions[instruction]), ours
