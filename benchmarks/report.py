"""What every benchmark says besides its figures: the machine, the versions, and where the JSON went."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rtp_mm._core import bf16_instructions

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "transformers", "pillow", "numpy")


def machine() -> dict[str, Any]:
    """Processor, threads and versions."""
    names = [line.partition(":")[2].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "threads": torch.get_num_threads(),
        "bf16_instructions": bf16_instructions(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def command() -> str:
    """That made the figures; of a path, which is this machine's affair, only the last part."""
    spec = sys.modules["__main__"].__spec__
    arguments = [Path(argument).name if argument.startswith("/") else argument for argument in sys.argv[1:]]
    return shlex.join(["python", "-m", spec.name if spec else Path(sys.argv[0]).name, *arguments])


def measured_at(root: Path) -> dict[str, str]:
    """{"commit": hash} of a git checkout, with "-dirty" behind it where tracked files have changed; elsewhere {}."""
    if not (root / ".git").exists():  # it may lie in a repository of something else
        return {}

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True, text=True).stdout

    try:
        # Earlier results, and documents with tables of them, change no figure.
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results", ":!*.md")
        return {"commit": git("rev-parse", "HEAD").strip() + ("-dirty" if changed else "")}
    except (OSError, subprocess.CalledProcessError):
        return {}


# Taken when a benchmark starts: the figures are of the code that it has read, whatever is committed while it runs.
COMMIT = measured_at(ROOT)


def write_result(name: str, result: dict[str, Any]) -> Path:
    """`results/<name>.json`, with the machine, the command and the commit beside the figures."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(), "command": command(), **COMMIT, **result}, indent=2) + "\n")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")
    return path


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
