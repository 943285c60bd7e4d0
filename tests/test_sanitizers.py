"""The native code that knows no torch, under AddressSanitizer and UndefinedBehaviorSanitizer, and ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from animations import RANDOM
from conftest import FEATURES, require
from image_seeds import seeds
from jpeg_encoder import random_jpeg
from mutations import mutated

pytestmark = pytest.mark.timeout(1200)  # it compiles a good deal, beside whatever else the machine does

ROOT = Path(__file__).resolve().parent.parent
CSRC, CPP, FUZZ = ROOT / "csrc", ROOT / "tests" / "cpp", ROOT / "tests" / "fuzz"
ALGORITHMS = [path for path in sorted((CSRC / "cpu").glob("*.cpp")) if not path.stem.endswith("_op")]
KERNELS = sorted((CSRC / "cuda").glob("*.cu"))
FLAGS = ["-std=c++20", "-g", "-pthread", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
MEMORY = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
THREADS = ["-fsanitize=thread"]


def compile_sources(*arguments: str | Path, sanitizers: Sequence[str] = MEMORY) -> None:
    """.cu files are compiled as C++ against `cuda_on_cpu`."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    assert compiler, "the extension was built, so there is a C++ compiler"
    includes = [f"-I{path}" for path in (CPP / "cuda_on_cpu", CSRC, CPP, FUZZ)]
    subprocess.run([compiler, *FLAGS, *sanitizers, *includes, *arguments], check=True)


def compile_and_run(
    folder: Path,
    *sources: Path,
    objects: Sequence[Path] = (),
    arguments: Sequence[Path] = (),
    sanitizers: Sequence[str] = MEMORY,
) -> subprocess.CompletedProcess[str]:
    program = folder / "program"
    compile_sources(*sources, *objects, "-o", program, sanitizers=sanitizers)
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    result: subprocess.CompletedProcess[str] = run([program, *arguments])
    if (
        "unexpected memory mapping" in result.stderr
    ):  # gcc's ThreadSanitizer before 14, where vm.mmap_rnd_bits is over 28
        result = run(["setarch", "-R", program, *arguments])
    return result


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """Of every algorithm and kernel by its source, compiled once for all programs."""
    folder = tmp_path_factory.mktemp("objects")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        compile_sources("-x", "c++", "-c", source, "-o", target)
        return target

    sources = [*ALGORITHMS, *KERNELS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(sources, pool.map(compiled, sources), strict=True))


def test_algorithms_are_clean(tmp_path: Path, objects: dict[Path, Path]) -> None:
    result = compile_and_run(tmp_path, CPP / "test_algorithms.cpp", objects=[objects[path] for path in ALGORITHMS])
    assert result.returncode == 0, result.stderr


def test_bf16_products_are_clean_and_have_the_bits_that_their_instructions_promise(
    tmp_path: Path, objects: dict[Path, Path]
) -> None:
    """On a CPU with AVX-512, instructions of BF16 and AMX that are missing are emulated; AMX's always are, too, and are
    compared with its own where it is."""
    result = compile_and_run(tmp_path, CPP / "test_bf16.cpp", objects=[objects[path] for path in ALGORITHMS])
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("AVX-512 BF16: ") == FEATURES["avx512"]()
    require("avx512")  # those that are here agree; a skip says that this one was not among them


def test_the_resize_stays_within_its_memory(tmp_path: Path, objects: dict[Path, Path]) -> None:
    result = compile_and_run(tmp_path, CPP / "test_resize.cpp", objects=[objects[path] for path in ALGORITHMS])
    assert result.returncode == 0, result.stderr


def test_what_threads_share_is_clean(tmp_path: Path) -> None:
    shared = [path for path in ALGORITHMS if not path.stem.startswith(("probe", "png", "jpeg"))]
    result = compile_and_run(tmp_path, CPP / "test_threads.cpp", *shared, sanitizers=THREADS)
    assert result.returncode == 0, result.stderr


def test_cuda_kernels_are_clean_and_agree_with_the_cpu(tmp_path: Path, objects: dict[Path, Path]) -> None:
    result = compile_and_run(tmp_path, CPP / "test_cuda_kernels.cpp", objects=list(objects.values()))
    assert result.returncode == 0, result.stderr


def probe_inputs(rng: np.random.Generator) -> Iterator[bytes]:
    """Files of every format, whole, cut and damaged."""
    animations = [make(rng) for make in RANDOM.values() for _ in range(10)]
    for data in [*(data for _, data in seeds()), *animations]:
        yield data
        yield from (mutated(data, rng) for _ in range(100))


def jpeg_inputs(rng: np.random.Generator) -> Iterator[bytes]:
    """Files whole, cut and damaged, most of them behind their headers."""
    for name, data in seeds((37, 29)):
        if name.endswith(".jpeg"):
            yield data
            yield from (mutated(data, rng, head=len(data) if i % 3 else 200) for i in range(300))
    for sampling, is_progressive in product([None, (1, 1), (2, 1), (1, 2), (2, 2)], [False, True]):
        for data in (random_jpeg(rng, 37, 29, sampling, is_progressive) for _ in range(10)):
            yield data
            yield from (mutated(data, rng, head=len(data)) for _ in range(30))


def resize_inputs(rng: np.random.Generator) -> Iterator[bytes]:
    """What the harness reads sizes, filters and pixels from."""
    yield b""
    yield from (rng.bytes(int(rng.integers(1, 120))) for _ in range(150))


def png_rows_inputs(rng: np.random.Generator) -> Iterator[bytes]:
    """Sizes, then rows; what is missing reads as zeros."""
    yield b""
    yield from (rng.bytes(int(rng.integers(1, 4096))) for _ in range(150))


@pytest.mark.parametrize(
    ("name", "inputs"),
    [("probe", probe_inputs), ("jpeg", jpeg_inputs), ("resize", resize_inputs), ("png_rows", png_rows_inputs)],
)
def test_the_fuzz_harnesses_pass_in_short_form(
    tmp_path: Path,
    objects: dict[Path, Path],
    name: str,
    inputs: Callable[[np.random.Generator], Iterator[bytes]],
) -> None:
    files = []
    for number, data in enumerate(inputs(np.random.default_rng(11))):
        files.append(tmp_path / str(number))
        files[-1].write_bytes(data)
    sources = [FUZZ / "replay.cpp", FUZZ / f"fuzz_{name}.cpp"]
    result = compile_and_run(tmp_path, *sources, objects=[objects[path] for path in ALGORITHMS], arguments=files)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{len(files)} files\n"


@pytest.mark.parametrize(
    ("body", "report", "sanitizers"),
    [
        ("std::vector<char> block(8); return block.data()[argc + 8];", "heap-buffer-overflow", MEMORY),
        ("return argc + 0x7fffffff;", "signed integer overflow", MEMORY),
        ("std::thread other([&] { ++argc; }); ++argc; other.join(); return 0;", "data race", THREADS),
    ],
)
def test_the_sanitizers_see_a_planted_bug(tmp_path: Path, body: str, report: str, sanitizers: list[str]) -> None:
    source = tmp_path / "planted.cpp"
    source.write_text(f"#include <thread>\n#include <vector>\nint main(int argc, char**) {{ {body} }}\n")
    result = compile_and_run(tmp_path, source, sanitizers=sanitizers)
    assert result.returncode != 0
    assert report in result.stderr
