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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
ARCHS = ("sm_80", "sm_89", "sm_90a", "sm_100a")
PTX_ARCH = "compute_80"
FLAGS = ("-std=c++20", "-O3", "-Werror=all-warnings", "-Xptxas=-v", f"-I{CSRC}")


@dataclass(frozen=True, slots=True)
class Compiled:
    """One .cu file for one architecture."""

    code: Path  # cubin, or PTX
    report: str  # of ptxas

    def instructions(self) -> dict[str, Counter[str]]:
        """By kernel: how often each SASS instruction stands there, as in "LDG.E.128.CONSTANT"."""
        kernels: dict[str, Counter[str]] = {}
        for line in _sass(self.code).splitlines():
            if name := re.search(r"Function : (\S+)", line):
                kernels[name[1]] = Counter()
            elif instruction := re.search(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
                kernels[next(reversed(kernels))][instruction[1]] += 1
        return kernels


def tool(name: str) -> str:
    """Of the CUDA toolkit's, or of those that triton brings along."""
    found = importlib.util.find_spec("triton")
    bundled = [Path(found.origin).parent / "backends" / "nvidia" / "bin"] if found and found.origin else []
    path = shutil.which(name, path=os.pathsep.join([*map(str, bundled), os.environ["PATH"]]))
    assert path, f"{name} comes with triton and with the CUDA toolkit"
    return path


@functools.cache
def compile_all() -> dict[tuple[str, str], Compiled]:
    """By file stem and architecture, as many at once as there are cores."""
    nvcc = shutil.which("nvcc")
    assert nvcc
    version = subprocess.run([nvcc, "--version"], capture_output=True, check=True).stdout
    headers = sorted([*CSRC.glob("*.h"), *(CSRC / "cuda").glob("*.h")])
    shared = hashlib.sha256(b"".join((version, " ".join(FLAGS).encode(), *(h.read_bytes() for h in headers))))
    folder = ROOT / "build" / "cuda-evidence"
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path, arch: str) -> Compiled:
        key = shared.copy()
        key.update(source.read_bytes())
        code = folder / f"{source.stem}.{arch}.{key.hexdigest()[:16]}"
        report = code.with_name(code.name + ".txt")
        if not report.exists():
            kind = "-ptx" if arch.startswith("compute") else "-cubin"
            done = subprocess.run(
                [nvcc, *FLAGS, kind, f"-arch={arch}", source, "-o", code], capture_output=True, text=True
            )
            assert done.returncode == 0, f"{source.name} for {arch}:\n{done.stderr}"
            report.write_text(done.stdout + done.stderr)
        return Compiled(code, report.read_text())

    # The longest first.
    jobs = [(source, arch) for source in sorted(KERNELS, key=_size, reverse=True) for arch in (*ARCHS, PTX_ARCH)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        compiled = pool.map(lambda job: compile_one(*job), jobs)
        return {(source.stem, arch): one for (source, arch), one in zip(jobs, compiled, strict=True)}


def _size(path: Path) -> int:
    return path.stat().st_size


@functools.cache
def _sass(cubin: Path) -> str:
    environment = os.environ | {"PATH": f"{Path(tool('nvdisasm')).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [tool("cuobjdump"), "-sass", cubin]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
