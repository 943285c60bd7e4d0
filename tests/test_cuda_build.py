"""What the CUDA kernels were written for, seen in their machine code. No GPU is needed."""

from __future__ import annotations

import re

import pytest
from conftest import require
from cuda_compiled import ARCHS, KERNELS, PTX_ARCH, compiled

pytestmark = pytest.mark.timeout(1200)  # it compiles for five architectures

STEMS = [path.stem for path in KERNELS]


@pytest.fixture(autouse=True)
def _nvcc() -> None:
    require("nvcc")


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("arch", ARCHS)  # in the order in which they are compiled
def test_no_kernel_spills(stem: str, arch: str) -> None:
    code = compiled(stem, arch)
    kernels = re.findall(r"Compiling entry function", code.report)
    clean = re.findall(r"\b0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", code.report)
    assert len(kernels) == len(clean) == len(code.instructions()) > 0, code.report
    for name, instructions in code.instructions().items():
        assert not [i for i in instructions if i.startswith(("LDL", "STL"))], name


MULTIPLY = re.compile(r"multiply_mmaILi(\d)ELi(\d)ELb(\d)E(\d+__(?:half|nv_bfloat16))(.*?)EEv")


@pytest.mark.parametrize("arch", ARCHS)
def test_patch_embed_multiplies_on_tensor_cores_and_moves_16_bytes(arch: str) -> None:
    kernels = compiled("patch_embed_mma", arch).instructions()
    assert len(kernels) == 2 * 3 * 2 * 3  # weights, outputs, terms, alignments
    for name, instructions in kernels.items():
        terms, row_bytes, is_aligned, weight, out = MULTIPLY.search(name).groups()  # type: ignore[union-attr]
        product = "HMMA.16816.F32.BF16" if "bfloat" in weight else "HMMA.16816.F32"
        assert instructions[product] == 32 * int(terms), name  # a step of k, and one only
        assert count(instructions, "LDS", "128") >= 8, name  # a column's eight k
        assert not count(instructions, "I2F", "U8"), name  # bytes are widened without conversions
        assert bool(count(instructions, "LDGSTS", "64")) == (row_bytes == "8"), name  # rows, global to shared
        if is_aligned == "1":
            assert count(instructions, "LDGSTS", "128") >= 2 * int(terms), name  # weight, global to shared
            assert count(instructions, "LDG.E", "128") >= 1, name  # bias and position embedding
            assert count(instructions, "STG.E", "128" if out == "f" else "64") >= 16, name  # four neighbours


def count(instructions: dict[str, int], *parts: str) -> int:
    """Of the instructions that begin with the first part and have the others among what follows."""
    first, *others = parts
    return sum(n for i, n in instructions.items() if i.startswith(first) and set(others) <= set(i.split(".")))


@pytest.mark.parametrize("arch", ARCHS)
def test_float32_weights_are_multiplied_in_float32(arch: str) -> None:
    """TF32 would lose 13 bits."""
    kernels = compiled("patch_embed", arch).instructions()
    assert all(count(i, "FFMA") > 0 and not count(i, "HMMA") for i in kernels.values())


@pytest.mark.parametrize("arch", ARCHS)
def test_the_resize_writes_words_and_sums_integers(arch: str) -> None:
    for instructions in compiled("resize_patchify", arch).instructions().values():
        assert count(instructions, "IMAD") > 0
        assert instructions["STG.E"] > 0  # 32 bits
        assert not [i for i in instructions if i.startswith(("FFMA", "DFMA", "FMUL"))]


@pytest.mark.parametrize("stem", STEMS)
def test_ptx_for_what_comes_after(stem: str) -> None:
    ptx = compiled(stem, PTX_ARCH).code.read_text()
    assert re.search(r"^\.target sm_80$", ptx, re.MULTILINE)
    assert ".entry" in ptx
    if stem == "patch_embed_mma":
        assert "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32" in ptx
        assert "cp.async.cg.shared.global" in ptx
