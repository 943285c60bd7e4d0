"""Writes the README's measured tables from the committed results: `python -m benchmarks.readme`.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; a test holds that README and results agree.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

README = RESULTS.parent.parent / "README.md"
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(pattern: str) -> list[tuple[str, dict[str, Any]]]:
    """Committed results whose name matches, as (what follows the pattern's prefix, figures)."""
    prefix = pattern.rstrip("*")
    return [
        (path.stem.removeprefix(prefix), json.loads(path.read_text()))
        for path in sorted(RESULTS.glob(pattern + ".json"))
    ]


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def accuracy() -> str:
    rows = []
    for name, result in results("accuracy_*"):
        figures = result["summary"]
        errors = [f"{figures[key]:.1e}" for key in ("worst_ours_fp32", "mean_ours_bf16", "mean_hugging_face_bf16")]
        rows.append([f"`{name}`", str(len(result["images"])), *errors, f"{figures['worst_ratio_bf16']:.2f}"])
    header = ["model", "images", "float32, worst", "bf16, mean", "Hugging Face bf16, mean", "worst bf16 ratio to it"]
    return markdown(header, rows)


def load() -> str:
    rows = []
    for name, result in results("load_*"):
        keys = ("checkpoint_bytes", "tower_file_bytes", "bytes_read", "tower_held_bytes", "peak_anonymous_bytes")
        rows.append([f"`{name}`", *(f"{result[key] / 1e6:,.0f}" for key in keys)])
    header = ["model", "checkpoint", "its tower", "read from disk", "tower in memory", "peak anonymous memory"]
    return markdown(header, rows)


TABLES: dict[str, Callable[[], str]] = {"accuracy": accuracy, "load": load}


def rendered(text: str) -> str:
    """The README's text with every table as the results have it."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[3]}", text)


def main() -> None:
    README.write_text(rendered(README.read_text()))
    print(f"wrote {', '.join(TABLES)} into {Path(README).name}")


if __name__ == "__main__":
    main()
