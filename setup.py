"""Builds the native modules with CMake. All other metadata stands in pyproject.toml.

    rtp_mm/_core*.so    pybind11, knows no torch: for the preprocess workers
    rtp_mm/_C.so        torch operators on the CPU, LibTorch stable ABI
    rtp_mm/_C_cuda.so   the same on CUDA, where nvcc is and torch has CUDA

Environment: RTP_MM_CUDA=1 builds _C_cuda whatever torch has, 0 never does; RTP_MM_CUDA_ARCHS is its list of CMake
architectures (default 80-real;90a-real;100-real;90-virtual, without 100 from nvcc below 12.8); RTP_MM_WERROR=1 makes
warnings errors; CXX, CUDACXX and CUDA_HOME choose the compilers.
"""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OPERATORS = ("_C", "_C_cuda")  # loaded by torch, not by Python: no ABI tag in their names
OLDEST_TORCH = (2, 11)  # the stable ABI that csrc is written against


@dataclass(frozen=True, slots=True)
class Torch:
    """The target interpreter's torch: found on disk, never imported."""

    folder: Path
    version: str
    cuda: str | None  # that it was built with, as in "13.0"


def find_torch() -> Torch | None:
    """Build isolation hides site-packages from `sys.path`, so the interpreter's own folders are searched too."""
    folders = [*sys.path, sysconfig.get_path("platlib"), *site.getsitepackages(), site.getusersitepackages()]
    for folder in folders:
        version_file = Path(folder, "torch", "version.py")
        if version_file.is_file():
            text = version_file.read_text()
            version = re.search(r"^__version__ = '(.+)'", text, re.MULTILINE)
            cuda = re.search(r"^cuda.* = '(.+)'", text, re.MULTILINE)
            if version:
                return Torch(version_file.parent, version[1], cuda[1] if cuda else None)
    return None


def find_nvcc() -> str | None:
    """CUDACXX, then CUDA_HOME, PATH and the customary place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"]
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def nvcc_release(nvcc: str) -> tuple[int, int]:
    """As in (13, 0)."""
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    if (release := re.search(r"release (\d+)\.(\d+)", told)) is None:
        raise SystemExit(f"rtp_mm: {nvcc} --version tells no release")
    return int(release[1]), int(release[2])


def default_cuda_archs(nvcc: str) -> str:
    """Code for A100, H100/H200 and B200, PTX for what comes after."""
    blackwell = "100-real;" if nvcc_release(nvcc) >= (12, 8) else ""
    return f"80-real;90a-real;{blackwell}90-virtual"


def wants_cuda() -> bool:
    """What RTP_MM_CUDA says; unset, whether torch has CUDA and nvcc is there."""
    match os.environ.get("RTP_MM_CUDA"):
        case None | "":
            torch = find_torch()
            nvcc = find_nvcc()
            if torch is None or torch.cuda is None or nvcc is None:
                return False
            if (major := nvcc_release(nvcc)[0]) != int(torch.cuda.partition(".")[0]):
                raise SystemExit(  # a driver that is new enough for the one may be too old for the other
                    f"rtp_mm: {nvcc} is of CUDA {major}, torch of {torch.cuda}: name another in CUDA_HOME, or set "
                    "RTP_MM_CUDA=1 to build with it all the same, RTP_MM_CUDA=0 to build without CUDA"
                )
            return True
        case "0" | "1" as flag:
            return flag == "1"
        case other:
            raise SystemExit(f"rtp_mm: RTP_MM_CUDA={other!r} must be 0 or 1")


def require_torch() -> Torch:
    torch = find_torch()
    oldest = ".".join(map(str, OLDEST_TORCH))
    if torch is None:
        raise SystemExit(
            f"rtp_mm: no torch in {sysconfig.get_path('platlib')}: run `pip install 'torch>={oldest}'` first "
            "(if it is installed elsewhere, add --no-build-isolation)"
        )
    if tuple(int(part) for part in torch.version.split(".")[:2]) < OLDEST_TORCH:
        raise SystemExit(f"rtp_mm: torch {torch.version} is too old: run `pip install 'torch>={oldest}'` first")
    return torch


def require_toolchain() -> None:
    if not any(shutil.which(name) for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name):
        raise SystemExit("rtp_mm: no C++ compiler: install g++ 11 or newer (apt install g++), or name one in CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise SystemExit(f"rtp_mm: no Python.h in {sysconfig.get_path('include')}: install python3-dev")


def require_nvcc() -> str:
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("rtp_mm: RTP_MM_CUDA=1 but no nvcc: install the CUDA toolkit or set CUDA_HOME")
    return nvcc


class CMakeBuild(build_ext):
    """All extensions are targets of one CMake project, built incrementally in build/."""

    def get_ext_filename(self, fullname: str) -> str:
        is_operators = fullname.rpartition(".")[2] in OPERATORS
        return fullname.replace(".", os.sep) + ".so" if is_operators else super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        torch = require_torch()
        require_toolchain()
        build_dir = ROOT / "build" / f"native-{sys.implementation.cache_tag}"
        self._cmake(torch, build_dir)
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            self.mkpath(str(target.parent))
            self.copy_file(str(build_dir / target.name), str(target))

    def _cmake(self, torch: Torch, build_dir: Path) -> None:
        import cmake
        import ninja
        import pybind11

        definitions = {
            "CMAKE_MAKE_PROGRAM": Path(ninja.BIN_DIR, "ninja"),
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_COMPILE_WARNING_AS_ERROR": os.environ.get("RTP_MM_WERROR", "0"),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "TORCH_FOLDER": torch.folder,
            "CORE_FILE": Path(self.get_ext_filename("rtp_mm._core")).name,
            "RTP_MM_CUDA": "OFF",
        }
        if "rtp_mm._C_cuda" in (extension.name for extension in self.extensions):
            nvcc = require_nvcc()
            definitions |= {
                "RTP_MM_CUDA": "ON",
                "CMAKE_CUDA_COMPILER": nvcc,
                "CMAKE_CUDA_ARCHITECTURES": os.environ.get("RTP_MM_CUDA_ARCHS") or default_cuda_archs(nvcc),
            }
        program = Path(cmake.CMAKE_BIN_DIR, "cmake")
        flags = [f"-D{name}={value}" for name, value in definitions.items()]
        self._run(program, "-G", "Ninja", "-S", ROOT, "-B", build_dir, "--log-level=NOTICE", *flags)
        self._run(program, "--build", build_dir)

    @staticmethod
    def _run(*command: str | Path) -> None:
        status = subprocess.run(command).returncode
        if status:
            raise SystemExit(f"rtp_mm: `{' '.join(map(str, command[:3]))} ...` failed, status {status}; see above")


if __name__ == "__main__":
    names = ["rtp_mm._core", "rtp_mm._C", *(["rtp_mm._C_cuda"] if wants_cuda() else [])]
    setup(
        ext_modules=[Extension(name, sources=[]) for name in names],
        package_data={"rtp_mm": ["_core.pyi", "py.typed"]},
        cmdclass={"build_ext": CMakeBuild},
    )
