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
import statistics
import tempfile
import time
import urllib.request
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import grpc
from rich.console import Console
from rich.table import Table

from benchmarks.load import free_ports, image_requests, is_healthy, is_listening, ours, started
from benchmarks.photo_source import photograph
from benchmarks.report import write_result
from rtp_mm.models.random_checkpoint import write_checkpoint
from rtp_mm.server.proto import MESSAGE_SIZE_OPTIONS, method_path

ROUNDS = 40
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1024x768")
    options = parser.parse_args()
    own, echo, photos = free_ports(3)
    jpeg = photograph(*map(int, options.size.split("x")))
    data_url = "data:image/jpeg;base64," + base64.b64encode(jpeg).decode()
    requests = {
        "http": image_requests(lambda _: f"http://127.0.0.1:{photos}/{options.size}/1.jpg?max_age=3600")(0),
        "data URL": image_requests(lambda _: data_url)(0),
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        checkpoint = Path(folder) / "checkpoint"
        write_checkpoint(checkpoint, "qwen2_5_vl", "tiny")
        stack.enter_context(started(["benchmarks.photo_source", "--port", str(photos)], lambda: is_listening(photos)))
        command = ours(checkpoint, own, "bf16", "--mm_bytes_cache_mb=256", "--mm_embedding_cache_mb=256")
        stack.enter_context(started(command, lambda: is_healthy(own)))
        address = f"127.0.0.1:{own + 1}"
        nbytes = asyncio.run(reply_bytes(address, requests["http"]))
        peer = ["benchmarks.peers.echo_server", "--port", str(echo), "--reply-bytes", str(nbytes)]
        stack.enter_context(started(peer, lambda: is_listening(echo)))
        echo_address = f"127.0.0.1:{echo}"
        addresses = {"ours, http": address, "echo, http": echo_address, "ours, data URL": address}
        addresses["echo, data URL"] = echo_address
        figures = asyncio.run(measure(addresses, {name: requests[name.partition(", ")[2]] for name in addresses}, own))
    result: dict[str, Any] = {"size": options.size, "reply_bytes": nbytes, "calls": figures}
    result["ratio"] = {
        kind: figures[f"ours, {kind}"]["median_ms"] / figures[f"echo, {kind}"]["median_ms"] for kind in requests
    }
    table = Table("", "end to end, ms", "on the server, ms", title=f"{nbytes:,} bytes of answer")
    for name, values in figures.items():
        table.add_row(name, f"{values['median_ms']:.2f}", f"{values.get('server_median_ms', float('nan')):.2f}")
    Console().print(table)
    write_result("cached", result)


if __name__ == "__main__":
    main()
