"""The service under load against Hugging Face's model behind the same interface, both on this machine at the same time.

    python -m benchmarks.bench_service thin     the service itself: a tower of one block 16 wide, 1024x768 JPEGs
    python -m benchmarks.bench_service tiny     a tower of one block 64 wide, which takes two thirds of our CPU time
    python -m benchmarks.bench_service tower    tower-bound: four blocks of the published 3B width, small photographs
    python -m benchmarks.bench_service mixed    the tiny tower, JPEGs from 112x112 to 4K, half of them as data URLs
    python -m benchmarks.bench_service overload        three times our own capacity for a minute, then normal load again
    python -m benchmarks.bench_service overload-tower  the same, tower-bound
    python -m benchmarks.bench_service overload --apart    the same, callers and images on a core of their own

Every image is distinct and comes over HTTP from a server of its own, or within the request; caches are off. First the
capacity of both, in turns, with `--callers` requests at once; then Poisson arrivals at 0.3, 0.6 and 0.9 of the peer's
capacity, and at one and a half of it. The client and the web server share the machine's cores with whoever is measured;
with `--apart` they have the last core, which that one does not have.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import tempfile
from base64 import b64encode
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.load import (
    Client,
    Outcome,
    free_ports,
    hugging_face,
    image_requests,
    is_healthy,
    is_listening,
    ours,
    pooled,
    started,
    watched,
)
from benchmarks.photo_source import numbered, photograph
from benchmarks.report import RESULTS, write_result
from rtp_mm.random_checkpoint import write_checkpoint

# Size, blocks kept, and those of them that attend to the whole image; a block costs what it costs in the whole tower.
TOWERS = {"thin": ("tiny", 1, []), "tiny": ("tiny", 1, []), "tower": ("3b", 4, [3])}
# Of the tiny tower's sizes, what the thin one keeps: a quarter of its width, two heads, a narrower gated layer.
THIN = {64: 16, 3 * 64: 3 * 16, 172: 32, 4 * 64: 4 * 16}
THIN_CONFIG = {"hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
LEVELS = (0.3, 0.6, 0.9, 1.5)  # of the peer's capacity
OVERLOAD = 3.0  # of our own


@dataclass(frozen=True, slots=True)
class Scenario:
    """A tower of `TOWERS`, the sizes of the images, which come in this order again and again, and what is measured."""

    tower: str
    sizes: Sequence[str]
    has_data_urls: bool = False  # every other image, and of each size every other
    is_overload: bool = False
    options: Sequence[str] = ()  # of our server

    def url(self, photos: str, number: int) -> str:
        """Of an image, by its number."""
        size = self.sizes[number % len(self.sizes)]
        if not self.has_data_urls or (number + number // len(self.sizes)) % 2:
            return f"{photos}/{size}/{number}.jpg"
        jpeg = numbered(photograph(*map(int, size.split("x"))), number)
        return f"data:image/jpeg;base64,{b64encode(jpeg).decode()}"


LARGE, SMALL = ["1024x768"], ["112x112", "112x168", "224x112", "168x168"]
# Of twenty images so many of each size: icons and thumbnails, photographs of the web, a few from a phone or a screen.
MIXED = {"112x112": 4, "224x336": 4, "640x480": 5, "1024x768": 4, "1920x1080": 2, "3840x2160": 1}
IN_ANY_ORDER = random.Random(0).sample([*MIXED], sum(MIXED.values()), counts=[*MIXED.values()])
SCENARIOS = {
    "thin": Scenario("thin", LARGE),
    "tiny": Scenario("tiny", LARGE),
    "tower": Scenario("tower", SMALL),
    # By default the queue of a CPU server holds three 4K images, which take a real tower minutes.
    "mixed": Scenario("tiny", IN_ANY_ORDER, has_data_urls=True, options=["--mm_max_queue_patches=1000000"]),
    "overload": Scenario("tiny", LARGE, is_overload=True),
    "overload-tower": Scenario("tower", SMALL, is_overload=True, options=["--mm_max_queue_size=64"]),
}


@dataclass(frozen=True, slots=True)
class Contender:
    name: str
    address: str
    process: Any


@contextmanager
def on_cores(cores: Collection[int]) -> Iterator[None]:
    """For this thread and what it starts, processes included."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextmanager
def contenders(options: argparse.Namespace, checkpoint: Path) -> Iterator[tuple[list[Contender], str]]:
    """Both servers and the source of photographs, running; the source's base URL. With `--apart`, from here on this
    thread runs on the last core, as the source does, and the servers on the others.
    """
    own, peer, photos = free_ports(3)
    *most, last = cores = sorted(os.sched_getaffinity(0))
    callers, measured = ([last], most) if options.apart else (cores, cores)
    with ExitStack() as stack:
        stack.enter_context(on_cores(callers))
        stack.enter_context(started(["benchmarks.photo_source", "--port", str(photos)], lambda: is_listening(photos)))
        on_measured = stack.enter_context(ExitStack())
        on_measured.enter_context(on_cores(measured))
        command = ours(checkpoint, own, options.dtype, *SCENARIOS[options.scenario].options, *options.option)
        servers = [
            Contender("ours", f"127.0.0.1:{own + 1}", stack.enter_context(started(command, lambda: is_healthy(own))))
        ]
        if SCENARIOS[options.scenario].is_overload:
            name, command = "bare", ["benchmarks.peers.bare_server", "--port", str(peer), "--refuse"]
        else:
            name, command = "Hugging Face", hugging_face(checkpoint, peer, options.dtype)
        process = stack.enter_context(started(command, lambda: is_listening(peer)))
        servers.append(Contender(name, f"127.0.0.1:{peer}", process))
        on_measured.close()
        yield servers, f"http://127.0.0.1:{photos}"


Clients = dict[str, Client]


async def measure(options: argparse.Namespace, servers: list[Contender], photos: str) -> dict[str, Any]:
    scenario = SCENARIOS[options.scenario]
    requests = image_requests(lambda number: scenario.url(photos, number))
    for number in range(2 * len(scenario.sizes)):  # photographs are made but once, and that takes time
        requests(number)
    clients = {server.name: Client(server.address, requests) for server in servers}
    for client in clients.values():  # warm
        await client.closed_loop(2, 2)
    result = await (overload if scenario.is_overload else side_by_side)(options, servers, clients)
    for client in clients.values():
        await client.close()
    return result


async def side_by_side(options: argparse.Namespace, servers: list[Contender], clients: Clients) -> dict[str, Any]:
    """The capacity of both, then arrivals at parts of the peer's."""
    rounds, costs = await capacities(options, servers, clients, options.rounds)
    capacity = {name: statistics.median(rates) for name, rates in rounds.items()}
    base = capacity["Hugging Face"]
    levels = {}
    for level in track(LEVELS, "arrivals"):
        seconds = max(options.seconds, options.answers / (level * base))
        levels[f"{level}x"] = {
            server.name: (
                await watched(server.process, clients[server.name].open_loop(level * base, seconds))
            ).summary()
            for server in servers
        }
    speedup = capacity["ours"] / base
    return {
        "capacity_per_second": capacity,
        "rounds": rounds,
        "cost": costs,
        "levels": levels,
        "speedup": speedup,
    }


async def overload(options: argparse.Namespace, servers: list[Contender], clients: Clients) -> dict[str, Any]:
    """Arrivals over our capacity, which is taken before and after every minute of them: the machine's speed changes.
    And the capacity while as many calls are refused by a bare gRPC server: more nobody could answer here, where the
    calls, and the refusals, are made on the same cores.
    """
    server, _ = servers

    async def arrivals(per_second: float, seconds: float) -> Outcome:
        return await watched(server.process, clients[server.name].open_loop(per_second, seconds))

    async def beside_bare(per_second: float) -> float:
        outcome, _ = await asyncio.gather(
            clients[server.name].closed_loop(options.callers, options.seconds),
            clients["bare"].open_loop(per_second, options.seconds),
        )
        return outcome.per_second

    rates, costs = await capacities(options, [server], clients, 1)
    half = (await arrivals(0.5 * rates["ours"][0], options.seconds)).summary()
    minutes, halves_again, shares, bare_shares = [], [], [], []
    for _ in track(range(options.rounds), "overload"):
        before = rates["ours"][-1]
        minutes.append(await arrivals(OVERLOAD * before, options.overload_seconds))
        halves_again.append(await arrivals(0.5 * before, options.seconds))
        bare = await beside_bare(minutes[-1].errors["RESOURCE_EXHAUSTED"] / minutes[-1].seconds)
        [after] = (await capacities(options, [server], clients, 1))[0]["ours"]
        rates["ours"].append(after)
        capacity = statistics.mean([before, after])
        shares.append(minutes[-1].per_second / capacity)
        bare_shares.append(bare / capacity)
    return {
        "capacity_per_second": {"ours": statistics.median(rates["ours"])},
        "rounds": rates,
        "cost": costs,
        "levels": {
            "0.5x": {"ours": half},
            "3x": {"ours": pooled(minutes).summary()},
            "0.5x again": {"ours": pooled(halves_again).summary()},
        },
        "goodput_shares": shares,
        "goodput_share": statistics.median(shares),
        "bare_shares": bare_shares,
        "bare_share": statistics.median(bare_shares),
    }


async def capacities(
    options: argparse.Namespace, servers: list[Contender], clients: Clients, count: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Answers a second of each, round by round, with `options.callers` requests at once; what the last round cost."""
    rounds: dict[str, list[float]] = {server.name: [] for server in servers}
    costs: dict[str, dict[str, float]] = {}
    for _ in track(range(count), "capacity"):
        for server in servers:
            closed_loop = clients[server.name].closed_loop(options.callers, options.seconds)
            outcome = await watched(server.process, closed_loop)
            rounds[server.name].append(outcome.per_second)
            cpu_ms = outcome.cpu_s / max(1, len(outcome.latencies_s)) * 1e3
            costs[server.name] = {"cpu_ms_per_image": cpu_ms, "peak_pss_bytes": outcome.peak_bytes}
            if outcome.errors:
                raise SystemExit(f"{server.name} at its capacity: {dict(outcome.errors)}")
    return rounds, costs


def tower_ratio(checkpoint: Path, dtype: str) -> dict[str, float]:
    """Hugging Face's time over ours for the forwards alone, on the sizes of the load, one image at a time."""
    import torch

    from benchmarks.harness import interleave
    from rtp_mm.cli.hugging_face import HuggingFacePeer
    from rtp_mm.config import load_settings
    from rtp_mm.models.multimodal_common import ACT_DTYPES
    from rtp_mm.models.registry import load_model
    from rtp_mm.types import Blob, MMPreprocessConfig, MMUrlType

    model = load_model(load_settings(checkpoint_path=checkpoint, act_type=dtype))
    peer = HuggingFacePeer(checkpoint, ACT_DTYPES[dtype], torch.device("cpu"))
    photos = [photograph(*map(int, size.split("x"))) for size in SMALL]
    prepared = [model.mm_part.prepare(Blob(photo, b"", ""), MMUrlType.IMAGE, MMPreprocessConfig()) for photo in photos]
    inputs = [peer.preprocess(photo) for photo in photos]

    def one_by_one() -> None:
        for item in prepared:
            model.mm_part.mm_process_batch([item], [MMUrlType.IMAGE], [MMPreprocessConfig()])

    def peers() -> None:
        for item in inputs:
            peer.forward(item)

    timings = interleave({"ours": one_by_one, "Hugging Face": peers}, rounds=5)
    return {name: timing.median for name, timing in timings.items()}


def write_tower(folder: Path, tower: str) -> None:
    """A checkpoint of the published layout with the first blocks only."""
    size, depth, full = TOWERS[tower]
    whole = folder.with_name("whole")
    write_checkpoint(whole, "qwen2_5_vl", size)
    tensors = load_file(whole / "model.safetensors")
    kept = {name: t for name, t in tensors.items() if ".blocks." not in name or int(name.split(".")[2]) < depth}
    if tower == "thin":
        kept = {name: t[tuple(slice(THIN.get(n, n)) for n in t.shape)].contiguous() for name, t in kept.items()}
    folder.mkdir()
    save_file(kept, folder / "model.safetensors")
    config = json.loads((whole / "config.json").read_text())
    config["vision_config"] |= {"depth": depth, "fullatt_block_indexes": full}
    if tower == "thin":
        config["vision_config"] |= THIN_CONFIG
    (folder / "preprocessor_config.json").write_text((whole / "preprocessor_config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config))
    shutil.rmtree(whole)


def show(result: dict[str, Any]) -> None:
    table = Table("arrivals", "", "answers/s", "p50 ms", "p95 ms", "p99 ms", "CPU s", "PSS MB", "errors")
    for level, servers in result["levels"].items():
        for name, s in servers.items():
            figures = [f"{s[key]:.1f}" for key in ("per_second", "p50_ms", "p95_ms", "p99_ms", "cpu_s")]
            figures.append(f"{s['peak_pss_bytes'] / 1e6:.0f}")
            table.add_row(level, name, *figures, ", ".join(f"{n} {status}" for status, n in s["errors"].items()))
    console = Console()
    for name, rate in result["capacity_per_second"].items():
        cost = result["cost"][name]
        console.print(
            f"{name}: {rate:.1f} images/s, {cost['cpu_ms_per_image']:.1f} CPU ms an image, "
            f"{cost['peak_pss_bytes'] / 1e6:.0f} MB"
        )
    console.print(table)
    if "goodput_share" in result:
        console.print(
            f"at three times the capacity {result['goodput_share']:.0%} of it are answers; "
            f"{result['bare_share']:.0%} while a bare gRPC server refuses as many"
        )


def plot(path: Path, result: dict[str, Any]) -> None:
    """Latency over offered load."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    base = result["capacity_per_second"]["Hugging Face"]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    loads = [float(level.removesuffix("x")) * base for level in result["levels"]]
    for name in result["capacity_per_second"]:
        for quantile, style in (("p50_ms", "-"), ("p99_ms", "--")):
            values = [servers[name][quantile] for servers in result["levels"].values()]
            axes.plot(loads, values, style, marker="o", label=f"{name}, {quantile[:3]}")
    axes.set_yscale("log")
    axes.set_xlabel("images per second offered")
    axes.set_ylabel("latency, ms")
    axes.set_title(f"Poisson arrivals; capacity of the peer {base:.1f} images/s")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenario", choices=SCENARIOS)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10, help="of each run")
    parser.add_argument("--answers", type=int, default=150, help="at least so many arrivals a level")
    parser.add_argument("--overload-seconds", type=float, default=60)
    parser.add_argument("--apart", action="store_true", help="callers and images on a core of their own, the last")
    parser.add_argument("--option", action="append", default=[], help="a flag for our server, --name=value")
    options = parser.parse_args()
    if options.apart and len(os.sched_getaffinity(0)) < 2:
        parser.error("--apart takes two cores or more")
    name = options.scenario + "-apart" * options.apart
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder) / "checkpoint"
        result: dict[str, Any] = {"scenario": name, "dtype": options.dtype, "callers": options.callers}
        write_tower(checkpoint, SCENARIOS[options.scenario].tower)
        if options.scenario == "tower":
            result["tower_ms"] = tower_ratio(checkpoint, options.dtype)
            result["tower_speedup"] = result["tower_ms"]["Hugging Face"] / result["tower_ms"]["ours"]
        with contenders(options, checkpoint) as (servers, photos):
            result |= asyncio.run(measure(options, servers, photos))
    show(result)
    name = f"service_{name.replace('-', '_')}" + ("" if options.dtype == "bf16" else f"_{options.dtype}")
    if "Hugging Face" in result["capacity_per_second"]:
        plot(RESULTS / f"{name}.png", result)
    write_result(name, result)


if __name__ == "__main__":
    main()
