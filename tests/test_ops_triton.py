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
SCRIPTS = ("triton_kernels.py", "triton_linear.py", "kernels_once.py")


def run(script: str, *arguments: object, **environment: str) -> None:
    result = subprocess.run(
        [sys.executable, HERE / script, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("script", SCRIPTS)
def test_kernels_are_as_exact_as_pytorch_in_the_interpreter(script: str) -> None:
    require("triton_interpreter")
    run(script, TRITON_INTERPRET="1")


@pytest.mark.parametrize("script", SCRIPTS)
def test_kernels_are_as_exact_as_pytorch_on_a_gpu(script: str) -> None:
    require("cuda")
    run(script)


def test_towers_through_triton_equal_those_of_a_cpu(tiny_qwen2_vl: Path, tiny_qwen2_5_vl: Path) -> None:
    require("triton_interpreter")
    run("triton_tower.py", tiny_qwen2_vl, tiny_qwen2_5_vl, TRITON_INTERPRET="1")


@pytest.mark.parametrize("capability", ["80", "89", "90", "100"])
def test_kernels_compile_without_spills(capability: str) -> None:
    require("triton")
    run("triton_compiled.py", CAPABILITY=capability)
