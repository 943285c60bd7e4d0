"""Our CUDA kernels compiled for architectures that are not here: what ptxas reports and the instructions it chose.

Kept under build/, by what was compiled and how.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
PTX_ARCH = "compute_80"
FOLDER = ROOT / "build" / "cuda-evidence"
FLAGS = ("-std=c++20", "-O3", "-Werror=all-warnings", "-Xptxas=-v", f"-I{CSRC}")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One .cu file for one architecture."""

    code: Path  # cubin, or PTX
    report: str  # of ptxas

    def instructions(self) -> dict[str, Counter[str]]:
        """By kernel: how often each SASS instruction stands there, as in "LDG.E.128.CONSTANT"."""
        return _instructions(self.code)


def compiled(stem: str, arch: str) -> Compiled:
    """The first call starts compiling all of them, as many at once as there are cores."""
    return _started()[stem, arch].result()


def tool(name: str) -> str:
    """Of the CUDA toolkit's, or of those that triton brings along."""
    found = importlib.util.find_spec("triton")
    bundled = [Path(found.origin).parent / "backends" / "nvidia" / "bin"] if found and found.origin else []
    path = shutil.which(name, path=os.pathsep.join([*map(str, bundled), os.environ["PATH"]]))
    assert path, f"{name} comes with triton and with the CUDA toolkit"
    return path


@functools.cache
def _started() -> dict[tuple[str, str], Future[Compiled]]:
    pool = ThreadPoolExecutor(os.cpu_count())
    jobs = [(source, arch) for arch in (*ARCHS, PTX_ARCH) for source in KERNELS]
    return {(source.stem, arch): pool.submit(_compile, source, arch) for source, arch in jobs}


def _compile(source: Path, arch: str) -> Compiled:
    key = _environment().copy()
    key.update(source.read_bytes())
    FOLDER.mkdir(parents=True, exist_ok=True)
    code = FOLDER / f"{source.stem}.{arch}.{key.hexdigest()[:16]}"
    report = code.with_name(code.name + ".txt")
    if not report.exists():
        for stale in FOLDER.glob(f"{source.stem}.{arch}.*"):
            stale.unlink()
        kind = "-ptx" if arch == PTX_ARCH else "-cubin"
        command = ["nvcc", *FLAGS, kind, f"-arch={arch}", source, "-o", code]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{source.name} for {arch}:\n{done.stderr}"
        report.write_text(done.stdout + done.stderr)
    return Compiled(code, report.read_text())


@functools.cache
def _environment() -> hashlib._Hash:
    """Of all that the code depends on but the source itself."""
    version = subprocess.run(["nvcc", "--version"], capture_output=True, check=True).stdout
    headers = sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.h"), CSRC / "cpu" / "resize_windows.h"])
    return hashlib.sha256(b"".join((version, " ".join(FLAGS).encode(), *(h.read_bytes() for h in headers))))


@functools.cache
def _instructions(cubin: Path) -> dict[str, Counter[str]]:
    environment = os.environ | {"PATH": f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [tool("cuobjdump"), "-sass", cubin]
    sass = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    kernels: dict[str, Counter[str]] = {}
    for line in sass.splitlines():
        if name := re.search(r"Function : (\S+)", line):
            kernels[name[1]] = Counter()
        elif instruction := re.search(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            kernels[next(reversed(kernels))][instruction[1]] += 1
    return kernels
