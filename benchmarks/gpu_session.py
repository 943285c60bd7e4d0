"""Everything there is to do on a GPU that is lent for minutes: build, check, measure, profile; tables, and one JSON.

    python -m benchmarks.gpu_session             on a machine with a GPU, torch and nvcc
    TRITON_INTERPRET=1 python -m benchmarks.gpu_session --device cpu --size tiny      to try the script anywhere

Each step runs in a process of its own, so that neither a crash, nor a hang, nor a broken CUDA context takes another's
figures along; every figure is written as soon as it is there, a line of --out/gpu_session.jsonl, which only a session
that is killed leaves behind. What --minutes leave no time for is left out, and says so. Where results/gpu_session.json
is there already, its other steps are kept: one file from several calls, if it is copied there between them.
Within a step, what fails is its own figure, and what comes after it is measured still (`gpu_common.attempt`).
The exit status is 1 where anything failed: a step, a case or variant of one, a test, a sanitizer, an image's bits; the
last table names these first. What is not installed is named before any step begins. Steps that a machine cannot do (no
GPU, no DALI) say so, which is no failure.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.gpu_checks import build, invariance, sanitizer, tests
from benchmarks.gpu_common import FAILED, ROOT, UNFINISHED, Figures, Options, Unavailable, failures, found
from benchmarks.gpu_decode import decode
from benchmarks.gpu_kernels import attention, linears, peaks, pointwise, tiles
from benchmarks.gpu_operators import operators
from benchmarks.gpu_towers import profile, service, tower
from benchmarks.report import COMMIT, RESULTS, machine

# What is known soonest, and matters most, comes first.
STEPS: dict[str, Callable[[Options], Figures]] = {
    step.__name__: step
    for step in (
        *(build, peaks, tests, tower, invariance, service),
        *(linears, pointwise, operators, attention, profile, sanitizer, decode, tiles),
    )
}
STEP_LIMIT_S = 400  # no step may take what the others need
LEAST_S = 10  # no step begins with less
GRACE_S = 15  # from the moment at which a step should end to that at which it is killed

console = Console(width=160)


def run_step(name: str, options: Options) -> None:
    """In a step's own process: its figures, a line of JSON each, to the file that waits for them."""
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(1.0, options.until - time.time()) + GRACE_S / 2)
    with lines_of(options).open("a") as lines:

        def put(figure: str, value: Any) -> None:
            lines.write("\n" + json.dumps([name, figure, value]) + "\n")  # after what another step left of a line
            lines.flush()

        try:
            for figure, value in STEPS[name](options):
                put(figure, value)
                if time.time() > options.until:
                    put(UNFINISHED, "no time left")
                    break
        except Unavailable as reason:
            put("not here", str(reason))
        except Exception:  # noqa: BLE001 - is reported, and the other steps still run
            put(FAILED, traceback.format_exc())
    faulthandler.cancel_dump_traceback_later()


def lines_of(options: Options) -> Path:
    """What all steps write as they go: there even where the session is killed."""
    out: Path = options.out
    return out / "gpu_session.jsonl"


def read_figures(name: str, options: Options) -> dict[str, Any]:
    """Those that a step has written whole."""
    figures = {}
    for line in lines_of(options).read_text().splitlines() if lines_of(options).exists() else []:
        with suppress(ValueError):
            step, figure, value = json.loads(line)
            if step == name:
                figures[figure] = value
    return figures


def figures_of(name: str, options: Options) -> dict[str, Any]:
    """What a step found, in a process of its own."""
    left = options.until - time.time()
    if left < LEAST_S:
        return {"not here": "no time left"}
    until = time.time() + min(left, STEP_LIMIT_S)
    flags = ["--device", options.device, "--size", options.size, "--folder", options.folder, "--until", until]
    flags += ["--out", options.out]
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu_session", "--step", name, *map(str, flags)],
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        ended = f"status {process.wait(until + GRACE_S - time.time())}"
    except subprocess.TimeoutExpired:
        ended = "SIGKILL: it took too long"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    figures = read_figures(name, options)
    if process.returncode:
        figures[FAILED] = f"its process ended with {ended}"
    return figures


def shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {shown(part)}" for key, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def show(name: str, figures: dict[str, Any]) -> None:
    table = Table(name, "", show_lines=True)
    for figure, value in figures.items():
        table.add_row(escape(figure), escape(shown(value)))
    console.print(table)


def summarize(steps: dict[str, dict[str, Any]]) -> int:
    """Prints what failed, then how each step ended; the session's exit status."""
    failed = {name: lines for name, figures in steps.items() if (lines := [*failures(figures)])}
    table = Table("step", "s", "outcome")
    for name, lines in failed.items():
        for line in lines:
            table.add_row(name, "", escape(f"FAILED: {line}"))
    for name, figures in steps.items():
        left = [f"{UNFINISHED}: {line}" for line in found(UNFINISHED, figures)]
        outcome = f"not here: {figures['not here']}" if "not here" in figures else ", ".join(left) or "done"
        table.add_row(name, f"{figures['step_seconds']:.0f}", "failed" if name in failed else escape(outcome))
    console.print(table)
    return int(bool(failed))


def missing_packages() -> list[str]:
    """That pyproject.toml asks for, for the library and its tests, and that are not here."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    names = [re.split(r"[>=<]", requirement)[0] for requirement in wanted if "[" not in requirement]
    return [name for name in names if not _is_installed(name)]


def _is_installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def parse() -> Options:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"steps, comma-separated: {', '.join(STEPS)}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default="3b", help="tiny, 3b or 7b")
    parser.add_argument("--minutes", type=float, default=8.5, help="for all steps together")
    parser.add_argument("--anyway", action="store_true", help="though packages are missing that some steps take")
    parser.add_argument(
        "--out", type=Path, default=Path(os.environ.get("OUT", RESULTS)), help="folder of gpu_session.json"
    )
    for internal, kind in (("--step", str), ("--folder", Path), ("--until", float)):
        parser.add_argument(internal, type=kind, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    options = parse()
    if options.step:
        run_step(options.step, options)
        return 0
    names = options.only.split(",") if options.only else [*STEPS]
    if unknown := set(names) - STEPS.keys():
        raise SystemExit(f"no such steps: {', '.join(sorted(unknown))}")
    if (missing := missing_packages()) and not options.anyway:
        raise SystemExit(f"not installed: {', '.join(missing)}; with --anyway the steps that take them fail")
    options.until = time.time() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    lines_of(options).unlink(missing_ok=True)
    file = f"gpu_session{'' if options.device != 'cpu' else '_try'}.json"
    known: dict[str, Any] = json.loads((RESULTS / file).read_text()) if (RESULTS / file).exists() else {}
    results = known | {"machine": machine()}
    ran: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        for name in names:
            started = time.perf_counter()
            results[name] = figures_of(name, options) | {"step_seconds": time.perf_counter() - started} | COMMIT
            show(name, results[name])
            (options.out / file).write_text(json.dumps(results, indent=2) + "\n")
            ran.append(name)
            if name == "build" and FAILED in results[name]:
                break  # nearly all others would fail for it
    lines_of(options).unlink(missing_ok=True)
    console.print(f"wrote {options.out / file}")
    return summarize({name: results[name] for name in ran})


if __name__ == "__main__":
    sys.exit(main())
