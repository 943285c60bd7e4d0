"""What the build leaves behind, and what it says when it cannot build."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import require
from cuda_compiled import tool as cuda_tool

import rtp_mm
from rtp_mm import _core

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = Path(rtp_mm.__file__).parent
OPERATORS, CUDA_OPERATORS, CORE = PACKAGE / "_C.so", PACKAGE / "_C_cuda.so", Path(_core.__file__)


def readelf(*arguments: object) -> str:
    return subprocess.run(["readelf", *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", readelf("-d", library)))


def undefined(library: Path) -> set[str]:
    return set(re.findall(r" UND ([^@\s]+)", readelf("-W", "--dyn-syms", library)))


@pytest.fixture(scope="module")
def cuda_operators() -> Path:
    """`_C_cuda.so`, which must be there if RTP_MM_CUDA=1 asked for it."""
    require("nvcc")
    if os.environ.get("RTP_MM_CUDA") != "1" and not CUDA_OPERATORS.exists():
        pytest.skip("no _C_cuda.so: RTP_MM_CUDA=1 builds it")
    return CUDA_OPERATORS


def test_operators_need_the_stable_abi_and_no_python() -> None:
    assert "libtorch_cpu.so" in needed(OPERATORS)
    assert not [name for name in needed(OPERATORS) if re.search("python|c10", name)]
    symbols = undefined(OPERATORS)
    assert not [name for name in symbols if name.startswith("Py")]
    # torch's C++ ABI changes with every release; its C functions are the stable one
    assert not [name for name in symbols if name.startswith("_Z") and re.search("3c10|2at|5torch", name)]
    assert "torch_library_impl" in symbols


def test_core_needs_no_torch() -> None:
    assert not [name for name in needed(CORE) if re.search("torch|c10", name)]
    assert [name for name in undefined(CORE) if name.startswith("Py")]  # undefined() sees what there is


@pytest.mark.parametrize("library", [OPERATORS, CORE], ids=lambda path: path.name)
def test_no_path_of_the_build_machine_is_searched(library: Path) -> None:
    assert not re.search("RPATH|RUNPATH", readelf("-d", library))


def test_cuda_operators_hold_code_for_every_architecture(cuda_operators: Path) -> None:
    cuobjdump = cuda_tool("cuobjdump")

    def listed(kind: str) -> set[str]:
        output = subprocess.run([cuobjdump, kind, cuda_operators], capture_output=True, text=True, check=True).stdout
        return set(re.findall(r"\.(sm_\w+)\.", output))

    setup = load_setup()
    wanted = os.environ.get("RTP_MM_CUDA_ARCHS") or setup.default_cuda_archs(setup.require_nvcc())
    named = listed("--list-elf")
    if "V12." in subprocess.run([cuobjdump, "--version"], capture_output=True, text=True, check=True).stdout:
        named |= {f"{name}a" for name in named}  # this one leaves the a of sm_90a out
    for arch in wanted.split(";"):
        number, _, kind = arch.partition("-")
        if kind != "virtual":
            assert f"sm_{number}" in named
        if kind != "real":
            assert f"sm_{number}" in listed("--list-ptx")


def test_cuda_operators_load_and_register(cuda_operators: Path) -> None:
    """With the link-time stand-in for libtorch_cuda.so where torch has no CUDA; nothing is launched."""
    stub = ROOT / "build" / f"native-{sys.implementation.cache_tag}" / "stubs" / "libtorch_cuda.so"
    code = f"""
import ctypes, torch
if torch.version.cuda is None:
    ctypes.CDLL({str(stub)!r})
from rtp_mm import ops
torch.ops.load_library({str(cuda_operators)!r})
for name in ("vision_positions", "patch_embed", "resize_patchify"):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"rtp_mm::{{name}}", "CUDA"), name
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def load_setup() -> ModuleType:
    """setup.py as a module: its functions, without the call of setup()."""
    spec = importlib.util.spec_from_file_location("rtp_mm_setup", ROOT / "setup.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def one_line(refused: Callable[[], object]) -> str:
    with pytest.raises(SystemExit) as stop:
        refused()
    message = str(stop.value)
    assert message.startswith("rtp_mm: ")
    assert "\n" not in message
    return message


def test_torch_is_found_without_importing_it_even_under_build_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.setattr(sys, "path", [])
    found = setup.find_torch()
    assert found.version == torch.__version__
    assert found.folder == Path(torch.__file__).parent
    assert found.cuda == torch.version.cuda


def test_no_torch_or_an_old_one_is_one_line_that_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.setattr(setup, "find_torch", lambda: None)
    assert "pip install 'torch>=2.11'" in one_line(setup.require_torch)
    monkeypatch.setattr(setup, "find_torch", lambda: setup.Torch(Path("torch"), "2.9.1+cu128", "12.8"))
    assert "torch 2.9.1+cu128 is too old: run `pip install 'torch>=2.11'`" in one_line(setup.require_torch)
    monkeypatch.setattr(setup, "find_torch", lambda: setup.Torch(Path("torch"), "2.11.0a0+git", "13.0"))
    assert setup.require_torch().version == "2.11.0a0+git"


def test_no_compiler_is_one_line_that_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.delenv("CXX", raising=False)
    assert "apt install g++" in one_line(load_setup().require_toolchain)


def test_cuda_is_built_when_torch_has_it_or_when_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    monkeypatch.setattr(setup, "nvcc_release", lambda _: (13, 0))
    for flag, cuda, nvcc, wanted in [
        (None, "13.1", "nvcc", True),
        (None, "13.0", None, False),
        (None, None, "nvcc", False),
        ("1", None, "nvcc", True),
        ("1", "12.6", "nvcc", True),
        ("0", "13.0", "nvcc", False),
    ]:
        monkeypatch.setattr(setup, "find_torch", lambda cuda=cuda: setup.Torch(Path("torch"), "2.13.0", cuda))
        monkeypatch.setattr(setup, "find_nvcc", lambda path=nvcc: path)
        if flag is None:
            monkeypatch.delenv("RTP_MM_CUDA", raising=False)
        else:
            monkeypatch.setenv("RTP_MM_CUDA", flag)
        assert setup.wants_cuda() == wanted
    monkeypatch.delenv("RTP_MM_CUDA")
    monkeypatch.setattr(setup, "find_torch", lambda: setup.Torch(Path("torch"), "2.13.0", "12.6"))
    assert "nvcc is of CUDA 13, torch of 12.6: name another in CUDA_HOME" in one_line(setup.wants_cuda)
    monkeypatch.setattr(setup, "find_nvcc", lambda: None)
    assert "no nvcc" in one_line(setup.require_nvcc)
    monkeypatch.setenv("RTP_MM_CUDA", "yes")
    assert "RTP_MM_CUDA='yes' must be 0 or 1" in one_line(setup.wants_cuda)


def test_code_for_blackwell_takes_an_nvcc_that_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = load_setup()
    for release, archs in [((12, 6), "80-real;90a-real;90-virtual"), ((12, 8), "80-real;90a-real;100-real;90-virtual")]:
        monkeypatch.setattr(setup, "nvcc_release", lambda _, release=release: release)
        assert setup.default_cuda_archs("nvcc") == archs


def test_a_missing_library_is_one_line_that_names_the_remedy(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "rtp_mm", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = subprocess.run(
        [sys.executable, "-c", "import rtp_mm.ops"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line == f"ImportError: {tmp_path}/rtp_mm/_C.so is not built: run `pip install -e .`"


def test_the_sources_compare_shapes_as_torch_2_11_can() -> None:
    """Its array references have `equals` and no `==`, which came later: seen with its headers, which CI has not."""
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu")]
    assert sources
    compared = re.compile(r"\b(sizes|strides)\(\)\s*[!=]=|[!=]=\s*[\w.>-]+(sizes|strides)\(\)")
    assert not [path.name for path in sources if compared.search(path.read_text())]
