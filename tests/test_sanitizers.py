"""The algorithm files, which know no torch, under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLAGS = ["-std=c++20", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
STRICT = ["-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]


def compile_and_run(folder: Path, *sources: Path) -> subprocess.CompletedProcess[str]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "the extension was built, so there is a C++ compiler"
    program = folder / "program"
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp'}"]
    subprocess.run([compiler, *FLAGS, *STRICT, *includes, *map(str, sources), "-o", str(program)], check=True)
    environment = {key: value for key, value in os.environ.items() if key != "LD_PRELOAD"}
    return subprocess.run([str(program)], capture_output=True, text=True, env=environment)


def test_algorithms_are_clean(tmp_path: Path) -> None:
    algorithms = [path for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")) if not path.stem.endswith("_op")]
    result = compile_and_run(tmp_path, ROOT / "tests" / "cpp" / "test_algorithms.cpp", *algorithms)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("body", "report"),
    [
        ("std::vector<char> block(8); return block.data()[argc + 8];", "heap-buffer-overflow"),
        ("return argc + 0x7fffffff;", "signed integer overflow"),
    ],
)
def test_the_sanitizers_see_a_planted_bug(tmp_path: Path, body: str, report: str) -> None:
    source = tmp_path / "planted.cpp"
    source.write_text(f"#include <vector>\nint main(int argc, char**) {{ {body} }}\n")
    result = compile_and_run(tmp_path, source)
    assert result.returncode != 0
    assert report in result.stderr
