"""Run by test_ops_triton.py: every kernel compiles for CUDA, without a GPU, and its registers do not spill."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rtp_mm.ops import pointwise_triton as kernels

CAPABILITY = int(os.environ["CAPABILITY"])
FLOAT, HALF, INT = "*fp32", "*bf16", "i32"
NORM = {"x_ptr": FLOAT, "delta_ptr": HALF, "weight_ptr": FLOAT, "out_ptr": HALF, "dim": INT, "eps": "fp32"}
NORM_CONSTANTS = {"HAS_DELTA": True, "BLOCK": 2048}
# kernel, types of its arguments, constants: as the towers call them
CASES = [
    (kernels._rms_norm, NORM, NORM_CONSTANTS),
    (kernels._layer_norm, NORM | {"bias_ptr": FLOAT}, NORM_CONSTANTS),
    (
        kernels._rotate_qk,
        {"qkv_ptr": HALF, "cos_ptr": FLOAT, "sin_ptr": FLOAT, "heads": INT, "half": INT},
        {"HEADS": 32, "HALF": 64},
    ),
    (kernels._silu_gate, {"gate_up_ptr": HALF, "out_ptr": HALF, "width": INT}, {"BLOCK": 1024}),
]


def spilled_bytes(cubin: bytes) -> int:
    """Bytes of local memory that the machine code uses."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return sum(int(n) for n in re.findall(r"(?:LOCAL|STACK):(\d+)", report.stdout))


for kernel, types, constants in CASES:
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", CAPABILITY, 32))
    spills = spilled_bytes(compiled.asm["cubin"])
    assert spills == 0, f"{kernel.__name__} spills {spills} bytes"
    print(kernel.__name__, len(compiled.asm["cubin"]), "bytes of machine code")
