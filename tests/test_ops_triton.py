"""The Triton kernels against plain PyTorch, interpreted and on a GPU, and compiled for a GPU that need not be here.

The interpreter must be chosen before triton is imported, so both run in processes of their own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import require

HERE = Path(__file__).parent
KERNELS = HERE / "triton_kernels.py"
COMPILED = HERE / "triton_compiled.py"


def run(script: Path, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, str(script)], env=os.environ | environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_kernels_are_as_exact_as_pytorch_in_the_interpreter() -> None:
    require("triton")
    run(KERNELS, TRITON_INTERPRET="1")


def test_kernels_are_as_exact_as_pytorch_on_a_gpu() -> None:
    require("cuda")
    run(KERNELS)


@pytest.mark.parametrize("capability", ["80", "90"])
def test_kernels_compile_without_spills(capability: str) -> None:
    require("triton")
    run(COMPILED, CAPABILITY=capability)
