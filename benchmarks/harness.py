"""Peers and ours, side by side in one run: warmed up, in turns, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WARM_UP_ROUNDS = 2
SLICE_S = 0.02  # a turn: short calls are repeated for as long, so that they run in the state that they leave behind


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds: the median of all rounds, the quartiles around it, and the best."""

    median: float
    quartiles: tuple[float, float]
    best: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Timing:
        milliseconds = [1e3 * s for s in seconds]
        if len(milliseconds) == 1:  # of which Python 3.11 tells no quartiles
            milliseconds *= 2
        low, median, high = statistics.quantiles(milliseconds, n=4, method="inclusive")
        return cls(round(median, 4), (round(low, 4), round(high, 4)), round(1e3 * min(seconds), 4))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warm_up_rounds: int = WARM_UP_ROUNDS,
) -> dict[str, Timing]:
    """Every round gives each contender a turn, so that whatever else the machine does hits all of them alike.

    clock: `time.thread_time` for work on the calling thread alone leaves out the time that others had the core.
    warm_up_rounds: 0 for calls of a second and more, that ran before.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    calls = dict.fromkeys(contenders, 1)
    for round_number in range(warm_up_rounds + rounds):
        for name, run in contenders.items():
            started = clock()
            for _ in range(calls[name]):
                run()
            elapsed = (clock() - started) / calls[name]
            if round_number >= warm_up_rounds:
                seconds[name].append(elapsed)
            elif elapsed > 0:
                calls[name] = max(1, round(SLICE_S / elapsed))
    return {name: Timing.of(values) for name, values in seconds.items()}


def on_threads(run: Callable[[], object], threads: int, calls: int) -> Callable[[], object]:
    """`run`, `calls` times on each of `threads` threads."""
    pool = ThreadPoolExecutor(threads)

    def run_all() -> None:
        for future in [pool.submit(run) for _ in range(threads * calls)]:
            future.result()

    return run_all


def plot_speedups(path: Path, title: str, rows: Mapping[str, Mapping[str, float]]) -> None:
    """A group of bars per row, a bar per contender: how many times faster than its peer."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = list(next(iter(rows.values())))
    figure, axes = pyplot.subplots(figsize=(9, 0.9 + 0.28 * len(rows) * len(names)), layout="constrained")
    height = 0.8 / len(names)
    for i, name in enumerate(names):
        places: list[Any] = [row + i * height for row in range(len(rows))]
        bars = axes.barh(places, [row[name] for row in rows.values()], height, label=name)
        axes.bar_label(bars, fmt="%.1fx", padding=3)
    axes.set_yticks([row + 0.4 - height / 2 for row in range(len(rows))], list(rows))
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=len(names))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
