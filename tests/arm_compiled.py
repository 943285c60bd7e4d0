"""The native code that knows no torch compiled for aarch64, as CMakeLists.txt compiles it; emulation; its loops."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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


def _own_options() -> dict[str, list[str]]:
    """What CMakeLists.txt compiles single files with, by path."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(r'set_source_files_properties\((.*?)PROPERTIES COMPILE_OPTIONS "(.*?)"', text, re.DOTALL)
    assert found
    return {path: found[2].split(";") for path in found[1].split()}


def compile_objects(folder: Path) -> list[Path]:
    """An object of every algorithm file, in `folder`."""
    options = _own_options()
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


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop without branches out of its middle or into it that go backwards: the innermost of their nest."""

    function: str
    instructions: Counter[str]  # by mnemonic
    spills: int  # vectors that go to the stack or come from it


@dataclass(frozen=True, slots=True)
class _Instruction:
    address: int
    name: str
    operands: str

    def target(self) -> int | None:
        is_branch = self.name.startswith(("b.", "cb", "tb")) or self.name == "b"
        found = re.search(r"\b([0-9a-f]+) <", self.operands)
        return int(found[1], 16) if is_branch and found else None


def loops(compiled: Path) -> list[Loop]:
    """The innermost loops of all functions of an object."""
    listing = subprocess.run(
        [f"{TOOLS}objdump", "-dC", "--no-show-raw-insn", compiled], capture_output=True, text=True, check=True
    ).stdout
    found: list[Loop] = []
    for function, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        fields = (line.split("\t") for line in body.splitlines())
        code = [
            _Instruction(int(address.strip(" :"), 16), name.strip(), "\t".join(operands))
            for address, name, *operands in fields
        ]
        found += (_loop(function, code[begin:end]) for begin, end in _innermost(code))
    return found


def _innermost(code: list[_Instruction]) -> Iterator[tuple[int, int]]:
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = []
    for i, instruction in enumerate(code):
        begin = index.get(instruction.target() or -1, i + 1)
        if begin <= i:
            spans.append((begin, i + 1))
    for begin, end in spans:
        if not any(begin <= b and e <= end for b, e in spans if (b, e) != (begin, end)):
            yield begin, end


def _loop(function: str, code: list[_Instruction]) -> Loop:
    spills = sum(instruction.operands.startswith("q") and "[sp" in instruction.operands for instruction in code)
    return Loop(function, Counter(instruction.name for instruction in code), spills)
