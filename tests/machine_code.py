"""The innermost loops of a compiled file, and what they spend their instructions on."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop without branches out of its middle or into it that go backwards: the innermost of their nest."""

    function: str
    instructions: Counter[str]  # by mnemonic
    spills: int  # vectors that go to the stack or come from it


@dataclass(frozen=True, slots=True)
class Machine:
    """How a disassembly is read."""

    objdump: str
    branch: str  # a regular expression: mnemonics that may go backwards
    spill: str  # operands that name a vector and the stack


AARCH64 = Machine("aarch64-linux-gnu-objdump", r"b|b\..*|cb.*|tb.*", r"q.*\[sp")
X86_64 = Machine("objdump", r"j.*", r".*%[xyz]mm.*\(%r[sb]p|.*\(%r[sb]p.*%[xyz]mm")


@dataclass(frozen=True, slots=True)
class _Instruction:
    address: int
    name: str
    operands: str

    def target(self, machine: Machine) -> int | None:
        found = re.search(r"\b([0-9a-f]+) <", self.operands)
        return int(found[1], 16) if re.fullmatch(machine.branch, self.name) and found else None


def loops(compiled: Path, machine: Machine) -> list[Loop]:
    """The innermost loops of all functions of an object."""
    listing = subprocess.run(
        [machine.objdump, "-dC", "--no-show-raw-insn", compiled], capture_output=True, text=True, check=True
    ).stdout
    found: list[Loop] = []
    for function, body in re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", listing, re.MULTILINE):
        code = []
        for line in body.splitlines():
            address, _, text = line.partition(":")
            name, *operands = text.split(maxsplit=1)
            code.append(_Instruction(int(address, 16), name, "".join(operands)))
        found += (_loop(function, code[begin:end], machine) for begin, end in _innermost(code, machine))
    return found


def _innermost(code: list[_Instruction], machine: Machine) -> Iterator[tuple[int, int]]:
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = []
    for i, instruction in enumerate(code):
        begin = index.get(instruction.target(machine) or -1, i + 1)
        if begin <= i:
            spans.append((begin, i + 1))
    for begin, end in spans:
        if not any(begin <= b and e <= end for b, e in spans if (b, e) != (begin, end)):
            yield begin, end


def _loop(function: str, code: list[_Instruction], machine: Machine) -> Loop:
    spills = sum(re.match(machine.spill, instruction.operands) is not None for instruction in code)
    return Loop(function, Counter(instruction.name for instruction in code), spills)
