"""Load for a gRPC server: closed loop (so many callers, each waiting for its answer) and open loop (Poisson arrivals
that wait for nobody), and what a process tree costs meanwhile."""

from __future__ import annotations

import asyncio
import itertools
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil

from rtp_mm.server.proto import MESSAGE_SIZE_OPTIONS, MultimodalInputsPB, method_path

CALL_TIMEOUT_S = 60.0
START_LIMIT_S = 180.0
MEMORY_PERIOD_S = 1.0


@dataclass(slots=True)
class Outcome:
    """Answers of one run. Latency is from the planned arrival, so that a late client does not flatter the server."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    refused_s: list[float] = field(default_factory=list)  # how long a RESOURCE_EXHAUSTED took
    cpu_s: float = 0.0  # of the server's processes, where they were watched (`watched`)
    peak_bytes: int = 0  # of them, PSS

    @property
    def per_second(self) -> float:
        return len(self.latencies_s) / self.seconds

    def summary(self) -> dict[str, Any]:
        """Throughput of good answers, latency in milliseconds, errors by status, what the server used."""
        ms = np.array(self.latencies_s or [float("nan")]) * 1e3
        summary = {
            "answers": len(self.latencies_s),
            "per_second": self.per_second,
            **{f"p{q}_ms": float(np.percentile(ms, q)) for q in (50, 95, 99)},
            "errors": dict(self.errors),
        }
        if self.refused_s:
            summary["refused_p99_ms"] = float(np.percentile(np.array(self.refused_s) * 1e3, 99))
        if self.peak_bytes:
            summary |= {"cpu_s": self.cpu_s, "peak_pss_bytes": self.peak_bytes}
        return summary


def pooled(outcomes: Sequence[Outcome]) -> Outcome:
    """Several runs as one."""
    return Outcome(
        sum(each.seconds for each in outcomes),
        [latency for each in outcomes for latency in each.latencies_s],
        sum((each.errors for each in outcomes), Counter()),
        [latency for each in outcomes for latency in each.refused_s],
        sum(each.cpu_s for each in outcomes),
        max(each.peak_bytes for each in outcomes),
    )


class Client:
    """Sends requests as bytes and looks at no answer beyond its length: the client costs as little as it can."""

    def __init__(self, address: str, requests: Callable[[int], bytes]) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=MESSAGE_SIZE_OPTIONS)
        self._call = self._channel.unary_unary(method_path("RemoteMultimodalEmbedding"))
        self._requests = requests
        self._numbers = itertools.count(random.SystemRandom().randrange(1 << 40))  # no two runs send the same file

    async def close(self) -> None:
        await self._channel.close()

    async def send(self, outcome: Outcome, due: float) -> None:
        try:
            await self._call(self._requests(next(self._numbers)), timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            outcome.errors[error.code().name] += 1
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                outcome.refused_s.append(time.perf_counter() - due)
        else:
            outcome.latencies_s.append(time.perf_counter() - due)

    async def closed_loop(self, callers: int, seconds: float) -> Outcome:
        """`callers` requests at once for as long; the last answers are waited for, and their time counts."""
        outcome, started = Outcome(), time.perf_counter()

        async def caller() -> None:
            while time.perf_counter() - started < seconds:
                await self.send(outcome, time.perf_counter())

        await asyncio.gather(*(caller() for _ in range(callers)))
        outcome.seconds = time.perf_counter() - started
        return outcome

    async def open_loop(self, per_second: float, seconds: float, seed: int = 0) -> Outcome:
        """Poisson arrivals: the same for every server with the same seed."""
        gaps = np.random.default_rng(seed).exponential(1 / per_second, round(per_second * seconds) + 1)
        outcome, started = Outcome(), time.perf_counter()
        calls = []
        for due in started + np.cumsum(gaps):
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            calls.append(asyncio.create_task(self.send(outcome, due)))
        await asyncio.gather(*calls)
        outcome.seconds = time.perf_counter() - started
        return outcome


def image_requests(urls: Callable[[int], str]) -> Callable[[int], bytes]:
    """Serialized requests for one image each, by number."""

    def request(number: int) -> bytes:
        message = MultimodalInputsPB()
        message.multimodal_inputs.add(multimodal_url=urls(number), multimodal_type=1)
        data: bytes = message.SerializeToString()
        return data

    return request


class Cost:
    """CPU seconds and peak memory (PSS) of a process and its children, while it is entered."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._root = psutil.Process(process.pid)
        self._stopped = threading.Event()
        self.cpu_s = 0.0
        self.peak_bytes = 0

    def __enter__(self) -> Cost:
        self._before = self._cpu()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._watcher.join()
        self.cpu_s = self._cpu() - self._before

    def _cpu(self) -> float:
        total = 0.0
        for process in tree(self._root):
            times = process.cpu_times()
            total += times.user + times.system
        return total

    def _watch(self) -> None:
        while True:
            self.peak_bytes = max(self.peak_bytes, pss(self._root))
            if self._stopped.wait(MEMORY_PERIOD_S):
                return


async def watched(process: subprocess.Popen[str], run: Coroutine[Any, Any, Outcome]) -> Outcome:
    """A run's outcome, with what a server used meanwhile."""
    with Cost(process) as cost:
        outcome = await run
    outcome.cpu_s, outcome.peak_bytes = cost.cpu_s, cost.peak_bytes
    return outcome


def tree(root: psutil.Process) -> list[psutil.Process]:
    return [root, *root.children(recursive=True)]


def pss(root: psutil.Process) -> int:
    """Bytes of a process and its children, shared pages divided among those who share them."""
    total = 0
    for process in tree(root):
        try:
            total += process.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total


@contextmanager
def started(
    command: Sequence[str], is_ready: Callable[[], bool], poll_s: float = 0.1
) -> Iterator[subprocess.Popen[str]]:
    """A module run as a process of its own, ready when it comes back, gone afterwards."""
    process = subprocess.Popen([sys.executable, "-m", *command], text=True, stderr=subprocess.DEVNULL)
    try:
        give_up = time.monotonic() + START_LIMIT_S
        while not is_ready():
            if process.poll() is not None or time.monotonic() > give_up:
                raise SystemExit(f"{' '.join(command)} did not start")
            time.sleep(poll_s)
        yield process
    finally:
        process.terminate()
        process.wait(60)


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def free_ports(count: int) -> list[int]:
    """Ports that are free now; consecutive ones differ by at least 2, for servers that take two."""
    with ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            probe = stack.enter_context(socket.socket())
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
            if all(abs(port - other) > 1 for other in ports):
                ports.append(port)
        return ports


def ours(checkpoint: Path, port: int, dtype: str, *options: str) -> list[str]:
    """The command of our server, HTTP on `port`, gRPC on the next, its caches off."""
    flags = {
        "start_port": port,
        "mm_bind_address": "127.0.0.1",
        "checkpoint_path": checkpoint,
        "act_type": dtype,
        "mm_bytes_cache_mb": 0,
        "mm_patch_cache_mb": 0,
        "mm_embedding_cache_mb": 0,
        "mm_allow_private_network": 1,
        "disable_access_log": 1,
    }
    return ["rtp_mm.start_server", *(f"--{name}={value}" for name, value in flags.items()), *options]


def hugging_face(checkpoint: Path, port: int, dtype: str) -> list[str]:
    """The command of the peer, gRPC on `port`."""
    return [*("benchmarks.peers.hf_server", "--checkpoint", str(checkpoint), "--port", str(port), "--dtype", dtype)]
