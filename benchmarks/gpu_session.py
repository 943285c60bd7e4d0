"""Everything there is to do on a GPU that is lent for minutes: build, check, measure, profile; one table, one JSON.

    python -m benchmarks.gpu_session             on a machine with a GPU, torch and nvcc
    TRITON_INTERPRET=1 python -m benchmarks.gpu_session --device cpu --size tiny      to try the script anywhere

Every step runs even where another failed, its figures are printed and written (to --out) as soon as they are there; the
exit status is that of the worst. Steps that a machine cannot do (no GPU, no compute-sanitizer) say so.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu_checks import build, invariance, sanitizer, tests
from benchmarks.gpu_common import Figures, Options, Unavailable
from benchmarks.gpu_decode import decode
from benchmarks.gpu_kernels import attention, linears, peaks, pointwise, tiles
from benchmarks.gpu_towers import profile, service, tower
from benchmarks.report import RESULTS, machine

# What is known soonest, and matters most, comes first.
STEPS: dict[str, Callable[[Options], Figures]] = {
    step.__name__: step
    for step in (
        *(build, tests, peaks, attention, pointwise, linears, tower, invariance),
        *(decode, service, profile, tiles, sanitizer),
    )
}

console = Console(width=160)


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(name: str, figures: dict[str, Any]) -> None:
    table = Table(name, "", show_lines=True)
    for figure, value in figures.items():
        table.add_row(escape(figure), escape(shown(value)))
    console.print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"steps, comma-separated: {', '.join(STEPS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="3b", help="tiny, 3b or 7b")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)), help="folder of gpu_session.json"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / ("gpu_session.json" if options.device != "cpu" else "gpu_session_try.json")
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        for name in options.only.split(",") if options.only else STEPS:
            started = time.perf_counter()
            try:
                figures = STEPS[name](options)
            except Unavailable as reason:
                figures = {"not here": str(reason)}
            except Exception:  # noqa: BLE001 - the lease is short: the other steps still run
                figures = {"failed": traceback.format_exc()}
            results[name] = figures | {"step_seconds": time.perf_counter() - started}
            show(name, results[name])
            file.write_text(json.dumps({"machine": machine(), **results}, indent=2) + "\n")
    console.print(f"wrote {file}")
    return int(any("failed" in figures for figures in results.values()))


if __name__ == "__main__":
    sys.exit(main())
