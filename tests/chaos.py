"""Everything that goes wrong at once, against a real server: sources that stall, lie, drip, redirect in circles or end
early, files that are noise, clients that cancel and vanish, workers that are killed. And in between good requests,
each of which must get its own right answer.

    python tests/chaos.py --requests 20000
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import torch
from chaos_weather import GOOD_IMAGES, SILENCE_MS, Case, Weather, good_files
from running_server import RunningServer, running_server
from web_source import Source

from rtp_mm import create_engine
from rtp_mm.server import wire
from rtp_mm.server.proto import MESSAGE_SIZE_OPTIONS, MultimodalInputsPB, method_path
from rtp_mm.types import MMEmbeddingRes

CALL_TIMEOUT_S = 100.0
ANSWERS_PER_KILL = 20
SETTLE_S = 20.0
PSS_SLACK = 96 << 20  # caches and pools that fill up
# What the server runs with: it may reach this machine's loopback address and no other.
OPTIONS: dict[str, object] = {
    "device": "cpu",
    "act_type": "fp32",
    "mm_allow_private_network": 1,
    "mm_allowed_media_domains": "127.0.0.1",
    "mm_fetch_timeout_ms": SILENCE_MS,
    "mm_fetch_retries": 1,
    "mm_bytes_cache_mb": 1,
    "mm_embedding_cache_mb": 1,
    "mm_image_max_file_size_kb": 2048,
    "mm_max_connection_age_ms": 1000,  # the clients' own connection ends again and again, amid their calls
    "disable_access_log": 1,
    "log_level": "ERROR",
}

Status = grpc.StatusCode


@dataclass(slots=True)
class Report:
    """What came back, by case and by outcome; `wrong` must stay empty."""

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    kills: int = 0


def right_answers(checkpoint: Path, files: Sequence[Path]) -> list[MMEmbeddingRes]:
    """Each good image alone, by an engine in this process."""
    engine = create_engine(vit_separation=0, checkpoint_path=checkpoint, device="cpu", act_type="fp32")
    try:
        return [engine.submit([str(path)]) for path in files]
    finally:
        engine.close()


class Clients:
    """Sends cases and judges what comes back."""

    def __init__(self, address: str, right: Sequence[MMEmbeddingRes], report: Report, *, workers_die: bool) -> None:
        self._address, self._right, self._report = address, right, report
        # A request whose worker is killed fails with a precise error; where nobody kills, none may.
        self._always = {Status.INTERNAL} if workers_die else set()
        self._channel = grpc.aio.insecure_channel(address, options=MESSAGE_SIZE_OPTIONS)
        self._call = self._channel.unary_unary(method_path("RemoteMultimodalEmbedding"))

    async def close(self) -> None:
        await self._channel.close()

    async def send(self, case: Case) -> None:
        request = MultimodalInputsPB()
        for url in case.urls:
            item = request.multimodal_inputs.add(
                multimodal_url=url, multimodal_type=5 if case.name == "igraph" else case.mm_type
            )
            item.mm_preprocess_config.mm_timeout_ms = case.timeout_ms
        call = self._call(
            request.SerializeToString(), timeout=CALL_TIMEOUT_S, metadata=((wire.WIRE_METADATA, "items"),)
        )
        if case.cancel_after_s is not None:
            await asyncio.sleep(case.cancel_after_s)
            call.cancel()
        status, details = Status.OK, ""
        try:
            reply = await call
        except grpc.aio.AioRpcError as error:
            status, details = error.code(), error.details() or ""
        except asyncio.CancelledError:
            status = Status.CANCELLED
        outcome = status.name
        if status is Status.OK and case.right:
            outcome = "right" if self._is_right(reply, case.right) else "WRONG"
        self._report.outcomes[case.name, outcome] += 1
        is_fine = outcome == "right" or status in case.statuses or (status in self._always and "worker" in details)
        if not is_fine:
            self._report.wrong.append(f"{case.name}: {outcome} {details[:300]} for {[url[:60] for url in case.urls]}")

    def _is_right(self, reply: bytes, numbers: Sequence[int]) -> bool:
        """Bit for bit what each image gets when it is alone."""
        result = wire.read_result(reply)
        right = [self._right[number] for number in numbers]
        return len(result.embeddings) == len(right) and all(
            torch.equal(got, expected.embeddings[0]) for got, expected in zip(result.embeddings, right, strict=True)
        )

    async def vanish(self, case: Case, rng: random.Random) -> None:
        """A client whose connection breaks in the middle of its call."""
        request = MultimodalInputsPB()
        for url in case.urls:
            request.multimodal_inputs.add(multimodal_url=url, multimodal_type=1)
        async with breakable(self._address) as (address, break_it):
            channel = grpc.aio.insecure_channel(address, options=MESSAGE_SIZE_OPTIONS)
            call = channel.unary_unary(method_path("RemoteMultimodalEmbedding"))(request.SerializeToString())
            await asyncio.sleep(rng.random() * 0.1)
            break_it()
            with suppress(grpc.aio.AioRpcError):
                await call
            await channel.close()
        self._report.outcomes["vanished", "gone"] += 1


@asynccontextmanager
async def breakable(address: str) -> AsyncIterator[tuple[str, Callable[[], None]]]:
    """An address that leads to `address`, and what breaks every connection through it, for good."""
    writers: list[asyncio.StreamWriter] = []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        there, onward = await asyncio.open_connection(host, int(port))
        writers.extend((writer, onward))
        if not relay.is_serving():  # it was broken while this connection was made
            break_it()
        await asyncio.gather(pump(reader, onward), pump(there, writer))

    relay = await asyncio.start_server(connected, "127.0.0.1", 0)

    def break_it() -> None:
        relay.close()
        for writer in writers:
            writer.transport.abort()

    try:
        yield f"127.0.0.1:{relay.sockets[0].getsockname()[1]}", break_it
    finally:
        break_it()


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process tree holds."""

    processes: int
    descriptors: int
    threads: int
    pss_bytes: int

    def exceeds(self, other: Holdings) -> bool:
        """Whether processes or descriptors were left behind."""
        return self.processes > other.processes or self.descriptors > other.descriptors

    @classmethod
    def of(cls, pid: int) -> Holdings:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
        return cls(
            len(processes),
            sum(process.num_fds() for process in processes),
            sum(process.num_threads() for process in processes),
            sum(process.memory_full_info().pss for process in processes),
        )


async def kill_workers(pid: int, report: Report, rng: random.Random) -> None:
    """Kills a child of the server every now and then, but not faster than answers come: the server must get on."""
    while True:
        answered = report.outcomes.total()
        while report.outcomes.total() < answered + ANSWERS_PER_KILL:
            await asyncio.sleep(rng.uniform(0.1, 0.5))
        workers = [p for p in psutil.Process(pid).children(recursive=True) if "resource_tracker" not in _command(p)]
        if workers:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers).pid, signal.SIGKILL)
                report.kills += 1


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""


@asynccontextmanager
async def doing(work: Awaitable[Any]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def run(
    server: RunningServer, files: Sequence[Path], right: Sequence[MMEmbeddingRes], *, requests: int, seed: int,
    callers: int = 16, kills: bool = True,
) -> tuple[Report, Holdings, Holdings]:  # fmt: skip
    """The report, and what the server held before and after."""
    rng, report = random.Random(seed), Report()
    async with Source.serving() as source:
        weather = Weather(source, files, rng)
        clients = Clients(server.address, right, report, workers_die=kills)
        for i in range(GOOD_IMAGES):  # warm: lazy imports, pools
            await clients.send(Case("good", [str(files[i])], [i]))
        before = Holdings.of(server.process.pid)
        left = iter(range(requests))

        async def caller() -> None:
            for _ in left:
                case = weather.case()
                if rng.random() < 0.04:
                    await clients.vanish(case, rng)
                else:
                    await clients.send(case)

        async with doing(kill_workers(server.process.pid, report, rng) if kills else asyncio.sleep(0)):
            await asyncio.gather(*(caller() for _ in range(callers)))
        calm = Clients(server.address, right, report, workers_die=False)
        after = Holdings.of(server.process.pid)
        give_up = time.monotonic() + SETTLE_S
        while time.monotonic() < give_up and (after.processes, after.descriptors) > (
            before.processes,
            before.descriptors,
        ):
            await asyncio.sleep(0.5)
            after = Holdings.of(server.process.pid)
        for i in range(GOOD_IMAGES):
            await calm.send(Case("good afterwards", [str(files[i])], [i]))
        await calm.close()
        await clients.close()
    return report, before, after


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    from rtp_mm.models.random_checkpoint import write_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(np.random.default_rng().integers(1 << 30)))
    parser.add_argument("--no-kills", action="store_true", help="leave the workers alone")
    parser.add_argument("--option", action="append", default=[], help="of the server, name=value")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_checkpoint(folder / "checkpoint", "qwen2_5_vl", "tiny")
        files = good_files(folder)
        right = right_answers(folder / "checkpoint", files)
        extra = dict(option.split("=", 1) for option in options.option)
        with running_server(folder / "checkpoint", **(OPTIONS | extra)) as server:
            report, before, after = asyncio.run(
                run(server, files, right, requests=options.requests, seed=options.seed, kills=not options.no_kills)
            )
    table = Table("case", "outcome", "requests")
    for (case, outcome), count in sorted(report.outcomes.items()):
        table.add_row(case, outcome, str(count))
    Console().print(table)
    print(f"workers killed: {report.kills}\nbefore {before}\nafter  {after}")
    for line in report.wrong:
        print("WRONG", line)
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
