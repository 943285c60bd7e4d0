"""The native code that knows no torch compiled for aarch64, as CMakeLists.txt compiles it, and run in emulation."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC, CPP = ROOT / "csrc", ROOT / "tests" / "cpp"
PACKAGES = "g++-aarch64-linux-gnu and qemu-user"  # Debian's and Ubuntu's names
TOOLS = "aarch64-linux-gnu-"
FLAGS = ["-std=c++20", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}", f"-I{CPP}"]


def emulator() -> str | None:
    return shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")


def is_available() -> bool:
    return shutil.which(f"{TOOLS}g++") is not None and emulator() is not None


def own_options() -> dict[str, list[str]]:
    """What CMakeLists.txt compiles single files with, by path."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.findall(r'set_source_files_properties\((.*?)PROPERTIES COMPILE_OPTIONS "(.*?)"', text, re.DOTALL)
    assert found
    return {path: options.split(";") for paths, options in found for path in paths.split()}


def compile_objects(folder: Path) -> list[Path]:
    """An object of every algorithm file, in `folder`."""
    options = own_options()
    sources = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if not path.stem.endswith("_op")]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [
            pool.submit(compile_object, path, folder, *options.get(str(path.relative_to(ROOT)), [])) for path in sources
        ]
        return [job.result() for job in jobs]


def compile_object(source: Path, folder: Path, *options: str) -> Path:
    target = folder / f"{source.stem}.o"
    subprocess.run([f"{TOOLS}g++", *FLAGS, "-O3", *options, "-c", source, "-o", target], check=True)
    return target


def link(program: Path, source: Path, objects: Sequence[Path]) -> Path:
    """Statically, so that no aarch64 libraries are needed where it runs."""
    subprocess.run([f"{TOOLS}g++", *FLAGS, "-O1", "-static", source, *objects, "-o", program], check=True)
    return program


def run(cpu: str, program: Path, *arguments: str, questions: bytes = b"") -> bytes:
    """What the program answers on stdout; `cpu`: one of qemu's names."""
    command = [emulator() or "", "-cpu", cpu, program, *arguments]
    result = subprocess.run(command, input=questions, capture_output=True, check=False)
    assert result.returncode == 0, result.stderr.decode()
    return result.stdout
