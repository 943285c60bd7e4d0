"""Pictures of committed results, for what is looked at rather than read: `python -m benchmarks.plots`.

Other benchmarks draw theirs as they end.
"""

from __future__ import annotations

from benchmarks.harness import plot_speedups
from benchmarks.readme import PRODUCTS, results
from benchmarks.report import RESULTS

Speedups = dict[str, dict[str, float]]


def towers() -> Speedups:
    """By model, what it multiplies in and batch."""
    rows = {}
    for name, result in results("tower_*"):
        model = name.removesuffix("_cpu").removesuffix("_amx")
        for patches, figures in result["patches"].items():
            ms = {side: times["median"] for side, times in figures["milliseconds"].items()}
            row = f"{model}, {PRODUCTS[figures.get('peak_of', 'float32')]}, {patches} patches"
            peers = {"Hugging Face bf16": "bf16", "Hugging Face float32": "fp32"}
            rows[row] = {label: ms[f"Hugging Face {dtype}"] / ms["ours bf16"] for label, dtype in peers.items()}
    return rows


def kernels(result: str, ours: str, peer: str) -> Speedups:
    """Those of many rows or patches, whose rate both sides tell, against a peer."""
    [(_, figures)] = results(result)
    rates = {name: case["rates"] for part in ("gflops", "gigabytes") for name, case in figures[part].items()}
    return {
        name: {peer: rate[ours] / rate[peer]}
        for name, rate in rates.items()
        if {ours, peer} <= rate.keys() and not name.endswith((" 257 rows", " 16 rows", " 1 rows"))
    }


def main() -> None:
    pictures = {
        "tower": ("our tower in bf16: times faster than", towers()),
        "kernels": ("our kernels in float32: times faster than", kernels("kernels_2_threads", "ours", "torch float32")),
        "kernels_amx": (
            "our kernels in bf16, by AMX: times faster than",
            kernels("kernels_2_threads_amx", "ours bf16", "torch bf16"),
        ),
    }
    for name, (title, rows) in pictures.items():
        plot_speedups(RESULTS / f"{name}.png", title, rows)
        print(f"benchmarks/results/{name}.png")


if __name__ == "__main__":
    main()
