"""A cached image, end to end, against a bare gRPC echo of an answer of the same size: one call at a time, in turns.

    python -m benchmarks.bench_cached [--size 1024x768]

The same photograph again and again, over HTTP with a source that lets it be cached, and as a data URL, whose bytes
travel and are hashed every time. The server's own time, from a parsed request to the answer's bytes, is told by its
metrics: the median of the turns' means.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from benchmarks.load import free_ports, image_requests, is_healthy, is_listening, ours, started
from benchmarks.photo_source import photograph
from benchmarks.report import write_result
from rtp_mm.random_checkpoint import write_checkpoint
from rtp_mm.server.proto import MESSAGE_SIZE_OPTIONS, method_path

WIDTHS = (128, 2048)  # a tiny model's, where a call's own costs show most, and Qwen2.5-VL-3B's
ROUNDS = 120
CALLS = 10  # a turn


async def measure(addresses: dict[str, str], requests: dict[str, bytes], own_http: int) -> dict[str, dict[str, float]]:
    calls, channels = {}, []
    for name, address in addresses.items():
        channels.append(grpc.aio.insecure_channel(address, options=MESSAGE_SIZE_OPTIONS))
        calls[name] = channels[-1].unary_unary(method_path("RemoteMultimodalEmbedding"))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    on_server: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(ROUNDS + 2):
        for name, call in calls.items():
            before = await asyncio.to_thread(seconds_on_server, own_http)
            turn = []
            for _ in range(CALLS):
                begun = time.perf_counter()
                await call(requests[name])
                turn.append(time.perf_counter() - begun)
            if round_number >= 2:
                seconds[name] += turn
                on_server[name].append((await asyncio.to_thread(seconds_on_server, own_http) - before) / CALLS)
    for channel in channels:
        await channel.close()
    return {
        name: {
            "median_ms": statistics.median(values) * 1e3,
            **({"server_median_ms": statistics.median(on_server[name]) * 1e3} if any(on_server[name]) else {}),
        }
        for name, values in seconds.items()
    }


def seconds_on_server(http_port: int) -> float:
    """In all embedding calls since its start."""
    with urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics") as reply:
        lines = reply.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("rtp_mm_request_duration_seconds_sum"))


async def reply_bytes(address: str, request: bytes) -> int:
    async with grpc.aio.insecure_channel(address, options=MESSAGE_SIZE_OPTIONS) as channel:
        return len(await channel.unary_unary(method_path("RemoteMultimodalEmbedding"))(request))


def measured(size: str, width: int, jpeg: bytes, photos: int) -> dict[str, Any]:
    """Our server with answers `width` wide, and an echo of as many bytes, in turns."""
    own, echo = free_ports(2)
    data_url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    requests = {
        "http": image_requests(lambda _: f"http://127.0.0.1:{photos}/{size}/1.jpg?max_age=3600")(0),
        "data URL": image_requests(lambda _: data_url)(0),
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(checkpoint, "qwen2_5_vl", "tiny")
        widen(checkpoint, width)
        command = ours(checkpoint, own, "bf16", "--mm_bytes_cache_mb=256", "--mm_embedding_cache_mb=256")
        stack.enter_context(started(command, lambda: is_healthy(own)))
        address = f"127.0.0.1:{own + 1}"
        nbytes = asyncio.run(reply_bytes(address, requests["http"]))
        peer = ["benchmarks.peers.bare_server", "--port", str(echo), "--reply-bytes", str(nbytes)]
        stack.enter_context(started(peer, lambda: is_listening(echo)))
        echo_address = f"127.0.0.1:{echo}"
        addresses = {"ours, http": address, "echo, http": echo_address, "ours, data URL": address}
        addresses["echo, data URL"] = echo_address
        by_name = {name: requests[name.partition(", ")[2]] for name in addresses}
        calls = asyncio.run(measure(addresses, by_name, own))
    ratio = {kind: calls[f"ours, {kind}"]["median_ms"] / calls[f"echo, {kind}"]["median_ms"] for kind in requests}
    return {"width": width, "reply_bytes": nbytes, "calls": calls, "ratio": ratio}


def widen(checkpoint: Path, width: int) -> None:
    """Gives a tiny checkpoint's tower answers of a published width."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    for name in ("visual.merger.mlp.2.weight", "visual.merger.mlp.2.bias"):
        tensors[name] = torch.rand(width, *tensors[name].shape[1:], dtype=tensors[name].dtype)
    save_file(tensors, path)
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["out_hidden_size"] = config["hidden_size"] = width
    (checkpoint / "config.json").write_text(json.dumps(config))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1024x768")
    options = parser.parse_args()
    (photos,) = free_ports(1)
    jpeg = photograph(*map(int, options.size.split("x")))
    source = ["benchmarks.photo_source", "--port", str(photos)]
    with started(source, lambda: is_listening(photos)):
        rows = [measured(options.size, width, jpeg, photos) for width in WIDTHS]
    for row in rows:
        table = Table("", "end to end, ms", "on the server, ms", title=f"{row['reply_bytes']:,} bytes of answer")
        for name, values in row["calls"].items():
            on_server = f"{values['server_median_ms']:.2f}" if "server_median_ms" in values else ""
            table.add_row(name, f"{values['median_ms']:.2f}", on_server)
        Console().print(table, ", ".join(f"{kind} {ratio:.2f} of the echo" for kind, ratio in row["ratio"].items()))
    write_result("cached", {"size": options.size, "rows": rows})


if __name__ == "__main__":
    main()
