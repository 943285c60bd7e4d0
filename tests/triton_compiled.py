"""Run by test_ops_triton.py: every kernel compiles for CUDA, without a GPU, its registers do not spill, and its matrix
products are what the machine has for them.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rtp_mm.ops import linear_triton, pointwise_triton

CAPABILITY = int(os.environ["CAPABILITY"])
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
FLOAT, HALF, BYTE, INT = "*fp32", "*bf16", "*fp8e4nv", "i32"
# What multiplies 16-bit and 8-bit matrices, and what fetches them: asynchronous copies of 16 bytes, or whole tiles.
MATRIX = {80: ("HMMA", ""), 89: ("HMMA", "QMMA"), 90: ("HGMMA", "QGMMA"), 100: ("UTCHMMA", "UTCQMMA")}[CAPABILITY]
SHARED = {80: 166912, 89: 101376, 90: 232448, 100: 232448}[CAPABILITY]  # bytes that a program may take
FETCH = r"LDGSTS\.\S*\.128" if CAPABILITY < 90 else "UTMALDG"


class Case(NamedTuple):
    """A kernel as the towers call it: types of its arguments, constants, and instructions that it must have."""

    kernel: Any
    types: dict[str, str]
    constants: dict[str, Any]
    instructions: tuple[str, ...] = ()
    options: dict[str, int] = {}  # noqa: RUF012
    unaligned: frozenset[str] = frozenset()  # integers that need not be multiples of 16

    @property
    def name(self) -> str:
        return f"{self.kernel.__name__} {self.types.get('x_ptr', '')} {self.constants}"


def linear(activation: str, width: int, *, adds: bool, is_byte: bool) -> Case:
    capability = (CAPABILITY // 10, CAPABILITY % 10)
    dtype = torch.float8_e4m3fn if is_byte else torch.bfloat16
    tile, has_tma = linear_triton.choose_tile(capability, dtype, width, activation, adds)
    operand = BYTE if is_byte else HALF
    types = {
        "x_ptr": operand,
        "weight_ptr": operand,
        "bias_ptr": FLOAT,
        "x_scale_ptr": FLOAT,
        "weight_scale_ptr": FLOAT,
    }
    types |= {"out_ptr": FLOAT if adds else HALF, "rows": INT, "width": INT, "depth": INT}
    constants = {"ACTIVATION": activation, "ADDS": adds, "IS_SCALED": is_byte, "HAS_TMA": has_tma, "GROUP": 8}
    constants |= {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
    return Case(
        linear_triton._linear,
        types,
        constants,
        (MATRIX[is_byte], FETCH, r"STG\.E\.128"),
        {"num_warps": tile.warps, "num_stages": tile.stages},
        frozenset({"rows"}),
    )


NORM = {"x_ptr": FLOAT, "delta_ptr": HALF, "weight_ptr": FLOAT, "out_ptr": HALF, "dim": INT, "eps": "fp32"}
NORM_CONSTANTS = {"HAS_DELTA": True, "BLOCK": 2048}
LAYERS = [("none", 3840, False), ("none", 1280, True), ("gelu", 5120, False), ("silu_gate", 3424, False)]
CASES = [
    Case(pointwise_triton._rms_norm, NORM, NORM_CONSTANTS),
    Case(pointwise_triton._layer_norm, NORM | {"bias_ptr": FLOAT}, NORM_CONSTANTS),
    Case(
        pointwise_triton._rotate_qk,
        {"qkv_ptr": HALF, "cos_ptr": FLOAT, "sin_ptr": FLOAT},
        {"heads": 16, "half": 40, "HEADS": 32, "HALF": 64},
        (r"LDG\.E\.128", r"STG\.E\.128"),
    ),
    Case(pointwise_triton._silu_gate, {"gate_up_ptr": HALF, "out_ptr": HALF, "width": INT}, {"BLOCK": 1024}),
    Case(pointwise_triton._activate_, {"x_ptr": HALF, "count": INT}, {"ACTIVATION": "gelu", "BLOCK": 1024}),
    *(linear(activation, width, adds=adds, is_byte=False) for activation, width, adds in LAYERS),
    linear("quick_gelu", 5120, adds=False, is_byte=False),
]
if MATRIX[1]:
    CASES += [linear(activation, width, adds=adds, is_byte=True) for activation, width, adds in LAYERS]
    CASES += [
        Case(
            linear_triton._quantize_rows,
            {"x_ptr": HALF, "out_ptr": BYTE, "scale_ptr": FLOAT, "depth": INT, "width": INT},
            {"LARGEST": 448.0, "BLOCK": 4096},
        )
    ]


def of_cubin(cubin: bytes, tool: str, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / tool, *arguments, file.name], capture_output=True, text=True, check=True).stdout


for case in CASES:
    names = [*case.types, *case.constants]
    aligned = [n for n, kind in case.types.items() if kind.startswith("*") or (kind == INT and n not in case.unaligned)]
    source = ASTSource(
        fn=case.kernel,
        signature=case.types | dict.fromkeys(case.constants, "constexpr"),
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned} if case.instructions else None,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32), options=case.options)
    cubin = compiled.asm["cubin"]
    resources = of_cubin(cubin, "cuobjdump", "--dump-resource-usage")
    spills = sum(int(n) for n in re.findall(r"(?:LOCAL|STACK):(\d+)", resources))
    assert spills == 0, f"{case.name} spills {spills} bytes"
    assert compiled.metadata.shared <= SHARED, f"{case.name} takes {compiled.metadata.shared} bytes of shared memory"
    machine_code = of_cubin(cubin, "nvdisasm", "-c")
    for instruction in case.instructions:
        assert re.search(instruction, machine_code), f"{case.name} has no {instruction}"
    print(case.name, re.findall(r"REG:\d+", resources), len(cubin), "bytes of machine code", flush=True)
