"""Writes measured tables into the README and docs/ from the committed results: `python -m benchmarks.readme`.

A table stands between `<!-- results: NAME -->` and `<!-- end -->`; a test holds that documents and results agree.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from benchmarks.report import RESULTS, ROOT

DOCUMENTS = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
SIDES = ("ours", "Hugging Face")
BLOCK = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def results(pattern: str) -> list[tuple[str, Any]]:
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


def _by_what(name: str) -> str:
    """A model, and what multiplied it if that was AMX."""
    return f"`{name.removesuffix('_amx')}`" + ", by AMX" * name.endswith("_amx")


def bf16_products() -> str:
    rows = []
    for name, result in results("bf16_products_*"):
        figures = result["summary"]
        errors = [f"{figures[key]:.1e}" for key in ("mean_ours_bf16", "mean_hugging_face_bf16")]
        rows.append([_by_what(name), str(len(result["images"])), *errors, f"{figures['worst_ratio_bf16']:.2f}"])
    return markdown(["model", "images", "ours, mean", "Hugging Face bf16, mean", "worst ratio to it"], rows)


def load() -> str:
    rows = []
    for name, result in results("load_*"):
        keys = ("checkpoint_bytes", "tower_file_bytes", "bytes_read", "tower_held_bytes", "peak_anonymous_bytes")
        rows.append([f"`{name}`", *(f"{result[key] / 1e6:,.0f}" for key in keys)])
    header = ["model", "checkpoint", "its tower", "read from disk", "tower in memory", "peak anonymous memory"]
    return markdown(header, rows)


def preprocess() -> str:
    [(_, result)] = results("preprocess")
    pixels = result["tables"]["decoded pixels to rows, one thread"]
    best = next(name for name in next(iter(pixels.values())) if name.startswith("ours"))

    def times(table: dict[str, Any], size: str, peer: str, ours: str) -> str:
        return f"{table[size][peer]['median'] / table[size][ours]['median']:.1f}x"

    rows = [
        [
            size,
            f"{pixels[size][best]['median']:.2f}",
            f"{result['bytes'][size] / pixels[size][best]['median'] * 1e-6:.1f}",
            times(pixels, size, "Hugging Face", best),
            times(pixels, size, "Hugging Face, torchvision", best),
            times(pixels, size, "Pillow resize", best),
        ]
        for size in pixels
    ]
    header = [
        "pixels",
        f"{best.removeprefix('ours, ')}, ms",
        "GB/s",
        "Hugging Face",
        "by torchvision",
        "Pillow's resize alone",
    ]
    return markdown(header, rows)


def jpeg() -> str:
    """Sequential files, then progressive ones: how many times as long peers take as ours from bytes to rows."""
    [(_, result)] = results("preprocess")
    tables = [result["tables"][f"{kind} bytes to rows, one thread"] for kind in ("JPEG", "progressive JPEG")]
    peers = {"libjpeg-turbo decode": "libjpeg-turbo's decode alone", "Hugging Face": "Hugging Face"}
    rows = []
    for size in tables[0]:
        row = [size]
        for table in tables:
            ours = table[size]["ours"]["median"]
            row += [f"{ours:.2f}", *(f"{table[size][peer]['median'] / ours:.1f}x" for peer in peers)]
        rows.append(row)
    header = ["JPEG", "ours, ms", *peers.values(), "progressive, ours, ms", *peers.values()]
    return markdown(header, rows)


PRODUCTS = {"float32": "float32", "avx512_bf16": "AVX-512 BF16", "amx": "AMX"}


def tower() -> str:
    """Of a batch, "16x256" say, one forward."""
    rows = []
    for name, result in results("tower_*"):
        for patches, figures in result["patches"].items():
            ms = {side: times["median"] for side, times in figures["milliseconds"].items()}
            ours = ms["ours bf16"]
            images = int(patches.rpartition("x")[0] or 1)
            of_peak = figures["gflops"]["ours bf16"] / figures["peak_gflops"]
            peers = [f"{ms[f'Hugging Face {dtype}'] / ours:.1f}x" for dtype in ("bf16", "fp32")]
            model, _, _ = name.removesuffix("_cpu").removesuffix("_amx").partition("_avx512")
            products = PRODUCTS[figures.get("peak_of", "float32")]
            rates = (f"{ours:,.0f}", f"{1e3 * images / ours:.3g}", f"{of_peak:.0%}")
            rows.append([f"`{model}`", products, patches, *rates, *peers])
    header = ["model", "multiplies", "patches", "ours bf16, ms", "images/s", "of peak"]
    return markdown([*header, "Hugging Face bf16", "Hugging Face float32"], rows)


def video() -> str:
    [(_, result)] = results("media_videos")
    runs = result["clips"]
    clips = {run["clip"]: {r["way"]: r for r in runs if r["clip"] == run["clip"]} for run in runs}
    rows = []
    for clip, ways in clips.items():
        ours = ways["ours"]
        ratios = [f"{ways[way]['seconds'] / ours['seconds']:.1f}x" for way in ("every", "random")]
        rows.append([clip, f"{ours['seconds']:.1f}", *ratios, f"{ours['decoded']:,}", f"{ours['peak_mb']:.0f}"])
    header = ["clip", "ours, s", "decoding every frame", "random access", "frames decoded", "peak memory, MB"]
    return markdown(header, rows)


def audio() -> str:
    rows = []
    for name, result in results("audio_*"):
        tower = f"`{result['checkpoint']}`, {result['act_type']}" + ", by AMX" * name.endswith("_amx")
        for sound in result["sounds"]:
            ours, ratios = [], []
            for stage in ("frames_ms", "tower_ms"):
                ms = {side: times["median"] for side, times in sound[stage].items()}
                ours.append(f"{ms['ours']:.1f}")
                ratios.append(f"{ms['peer'] / ms['ours']:.1f}x")
            rows.append([tower, str(sound["seconds"]), ours[0], ratios[0], ours[1], ratios[1]])
    return markdown(["tower", "sound, s", "log-mel frames, ms", "Hugging Face", "tower, ms", "Hugging Face"], rows)


def service() -> str:
    rows = []
    for scenario, result in results("service_*"):
        if "Hugging Face" not in result["capacity_per_second"]:  # overload is ours alone
            continue
        ours, peer = (result["capacity_per_second"][side] for side in SIDES)
        cpu = [f"{result['cost'][side]['cpu_ms_per_image']:.0f}" for side in SIDES]
        p99 = [
            " / ".join(f"{result['levels'][level][side]['p99_ms']:,.0f}" for side in SIDES)
            for level in ("0.3x", "0.6x", "0.9x")
        ]
        rows.append([scenario, f"{ours:.1f} / {peer:.1f}", f"{ours / peer:.1f}x", " / ".join(cpu), *p99])
    load = [f"p99 at {share} of its capacity, ms" for share in ("0.3", "0.6", "0.9")]
    return markdown(["", "images/s, ours / Hugging Face", "", "CPU ms an image", *load], rows)


def latency() -> str:
    """Plots, for documents in docs/."""
    names = [path.name for path in sorted(RESULTS.glob("service_*.png"))]
    titles = [name.removeprefix("service_").removesuffix(".png") for name in names]
    plots = zip(titles, names, strict=True)
    return "\n\n".join(f"![Latency over load, {title}](../benchmarks/results/{name})" for title, name in plots) + "\n"


def overload() -> str:
    rows = []
    for _, result in results("service_overload*"):
        capacity = result["capacity_per_second"]["ours"]
        for level, servers in result["levels"].items():
            figures = servers["ours"]
            refused = figures["errors"].get("RESOURCE_EXHAUSTED", 0) / (figures["answers"] / figures["per_second"])
            refusal = f"{figures['refused_p99_ms']:.0f}" if refused else ""
            share = result["goodput_share"] if level == "3x" else figures["per_second"] / capacity
            bare = f"{result['bare_share']:.0%}" if level == "3x" else ""
            answers = [f"{figures['per_second']:.1f}", f"{share:.0%}", bare, f"{figures['p99_ms']:,.0f}"]
            rows.append([result["scenario"], level, *answers, f"{refused:.0f}", refusal])
    shares = ["of the capacity", "refused by a bare server"]
    header = ["", "arrivals", "answers/s", *shares, "p99, ms", "refused/s", "p99 of a refusal, ms"]
    return markdown(header, rows)


def memory() -> str:
    [(_, result)] = results("memory")
    values = [result["idle_bytes"], *result["quarter_medians"], result["peak_bytes"]]
    row = [f"{result['requests']:,}", *(f"{value / 1e6:.0f}" for value in values)]
    if "target_bytes" in result:
        row += [f"{result['target_bytes'] / 1e6:.0f}", "met" if result["is_target_met"] else "not met"]
    else:  # from before it was evaluated
        row += ["", ""]
    quarters = [f"{which} quarter" for which in ("first", "second", "third", "fourth")]
    return markdown(["requests", "idle, MB", *quarters, "peak", "target", ""], [row])


def cached() -> str:
    [(_, result)] = results("cached")
    rows = []
    for row in result["rows"]:
        calls = row["calls"]
        for source in ("http", "data URL"):
            ours, echo = calls[f"ours, {source}"], calls[f"echo, {source}"]
            figures = [ours["server_median_ms"], ours["median_ms"], echo["median_ms"]]
            ratio = f"{ours['median_ms'] / echo['median_ms']:.2f}x"
            rows.append([f"{row['reply_bytes'] / 1e6:.1f} MB, {source}", *(f"{ms:.2f}" for ms in figures), ratio])
    return markdown(["answer", "on the server, ms", "end to end, ms", "bare gRPC echo, ms", ""], rows)


def kernels() -> str:
    [(_, result)] = results("kernels_2_threads")
    rows = []
    for unit, key in (("GFLOP/s", "gflops"), ("GB/s", "gigabytes")):
        for name, case in result[key].items():
            if name.endswith((" 257 rows", " 16 rows", " 1 rows")):
                continue
            rates = case["rates"]
            peers = [
                f"{rates[peer]:.3g}" if peer in rates else ""
                for peer in ("torch float32", "torch bf16", "transformers")
            ]
            rows.append([name, f"{rates['ours']:.3g} {unit}", f"{rates['ours'] / rates['peak']:.0%}", *peers])
    return markdown(["kernel", "ours", "of the peak", "torch float32", "torch bf16", "transformers"], rows)


def amx() -> str:
    """Linear layers, and attention from the same qkv, in bf16."""
    [(_, result)] = results("kernels_2_threads_amx")
    rows = []
    for name, case in result["gflops"].items():
        rates = case["rates"]
        if "ours bf16" in rates and not name.endswith((" 16 rows", " 1 rows")):
            sides = ("ours bf16", "torch bf16", "onednn bf16, packed")
            rows.append([name, *(f"{rates[side]:,.0f}" if side in rates else "" for side in sides)])
    return markdown(["kernel", "ours", "PyTorch", "oneDNN, packed"], rows)


def invariance() -> str:
    """All linear layers of a block and the merger, once, by rows: ours, and F.linear with its activation behind it."""
    [(_, result)] = results("kernels_2_threads")
    layers = re.compile(r"(qkv|proj|gate/up|down|merger \d), (\d+) rows")
    totals: dict[int, Counter[str]] = {}
    for name, case in result["gflops"].items():
        if found := layers.fullmatch(name):
            total = totals.setdefault(int(found[2]), Counter())
            total.update({side: timing["median"] for side, timing in case["milliseconds"].items()})
    rows = [
        [
            str(count),
            f"{ms['ours']:,.0f}",
            *(f"{ms[f'torch {dtype}'] / ms['ours']:.2f}x" for dtype in ("float32", "bf16")),
        ]
        for count, ms in totals.items()
    ]
    return markdown(["rows", "ours, ms", "`F.linear`, float32", "`F.linear`, bf16"], rows)


def int8() -> str:
    rows = []
    for name, result in results("int8_*"):
        errors = [f"{result['summary'][key]:.1e}" for key in ("mean_int8", "mean_hugging_face_bf16")]
        speeds = [ms["bf16"]["median"] / ms["bf16, int8"]["median"] for ms in result["milliseconds"].values()]
        worst = f"{result['summary']['worst_ratio']:.2f}"
        rows.append([_by_what(name), *errors, worst, f"{min(speeds):.1f}x to {max(speeds):.1f}x"])
    header = ["tower", "int8, mean error", "Hugging Face bf16, mean error", "worst ratio to it", "faster than without"]
    return markdown(header, rows)


def media(name: str, what: str, peer: str) -> str:
    """Files of every format, read by a peer and by us; by DALI, where it was there."""
    [(_, result)] = results(name)
    has_dali = any("DALI" in figures for figures in result["formats"].values())
    rows = []
    for file_format, figures in result["formats"].items():
        theirs, ours = (figures[side]["median"] for side in (peer, "ours"))
        milliseconds = (f"{theirs:.1f}", f"{ours:.1f}", f"{theirs / ours:.1f}x")
        dali = [f"{figures['DALI']['median']:.1f}" if "DALI" in figures else ""] if has_dali else []
        rows.append([file_format, f"{figures['bytes'] / 1e3:,.0f}", *milliseconds, *dali])
    return markdown([what, "KB", f"{peer}, ms", "ours, ms", "", *(["DALI, ms"] if has_dali else [])], rows)


def start() -> str:
    rows = []
    for name, result in results("start_*"):
        for state, figures in result["states"].items():
            answers, where = figures["first_answer_s"], f"`{name}`, {state}"
            for side, seconds in figures["ready_s"].items():
                rows.append([where, side, f"{seconds:.2f}", f"{answers[side]:.2f}" if side in answers else ""])
            is_met = figures["beyond_reading_s"] <= result["target_s"]
            beyond = f"ours beyond reading; target {result['target_s']:.0f} s: {'met' if is_met else 'not met'}"
            rows.append([where, beyond, f"{figures['beyond_reading_s']:.2f}", ""])
    return markdown(["checkpoint", "", "ready, s", "first answer, s"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "accuracy": accuracy,
    "bf16_products": bf16_products,
    "load": load,
    "preprocess": preprocess,
    "jpeg": jpeg,
    "tower": tower,
    "video": video,
    "audio": audio,
    "service": service,
    "latency": latency,
    "overload": overload,
    "start": start,
    "memory": memory,
    "cached": cached,
    "kernels": kernels,
    "amx": amx,
    "invariance": invariance,
    "int8": int8,
    "images": partial(media, "media_images", "1024x768 as", "Pillow"),
    "sounds": partial(media, "media_sounds", "30 s of stereo as", "PyAV and Hugging Face"),
}


def rendered(text: str) -> str:
    """A document's text with every table as the results have it."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]]()}\n{block[3]}", text)


def main() -> None:
    for document in DOCUMENTS:
        text = document.read_text()
        document.write_text(rendered(text))
        print(f"{document.name}: {', '.join(block[2] for block in BLOCK.finditer(text)) or 'no tables'}")


if __name__ == "__main__":
    main()
