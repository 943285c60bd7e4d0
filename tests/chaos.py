"""Everything that goes wrong at once, against a real server: sources that stall, lie, drip, redirect in circles or end
early, files that are noise or damaged, clients that cancel and vanish, workers that are killed. And in between good
requests, each of which must get its own right answer.

    python tests/chaos.py --requests 20000
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import psutil
import torch
from chaos_media import LIMITS, Supply, noises, pictures
from chaos_processes import SLAB_MB, WORKERS, Holdings, kill_workers, unfinished
from chaos_weather import SILENCE_MS, Case, Weather
from running_server import RunningServer, running_server
from web_source import Source

from rtp_mm import create_engine
from rtp_mm.engine.interface import Engine
from rtp_mm.errors import MMError
from rtp_mm.server import wire
from rtp_mm.server.proto import MESSAGE_SIZE_OPTIONS, method_path
from rtp_mm.types import MMEmbeddingRes, MMPreprocessConfig, MultimodalInput

CALL_TIMEOUT_S = 100.0
SETTLE_S = 30.0
LONG_PSS_SLACK = 192 << 20  # of thousands of requests: what decoders keep of the largest media; 144 MB were seen
# What the server runs with: it may reach this machine's loopback address and no other.
OPTIONS: dict[str, object] = LIMITS | {
    "device": "cpu",
    "act_type": "fp32",
    "mm_allow_private_network": 1,
    "mm_allowed_media_domains": "127.0.0.1",
    "mm_fetch_timeout_ms": SILENCE_MS,
    "mm_fetch_retries": 1,
    "mm_bytes_cache_mb": 1,
    "mm_embedding_cache_mb": 1,
    "mm_preprocess_max_workers": WORKERS,
    "mm_slab_mb": SLAB_MB,
    "mm_max_connection_age_ms": 1000,  # the clients' own connection ends again and again, amid their calls
    "disable_access_log": 1,
    "log_level": "ERROR",
}
THE_SAME = MMPreprocessConfig(fps=2)  # as where it is unset, and no cache has it
SUPPLIES = {"qwen2_5_vl": pictures, "qwen2_audio": noises}  # by the family of models that takes it

Status = grpc.StatusCode


@dataclass(slots=True)
class Report:
    """What came back, by case and by outcome; `wrong` must stay empty.

    known: the cases that had to come.
    open:  what came of files that may be broken or not, yet to be judged.
    before_s, after_s: the middle one of good requests, one at a time.
    """

    known: set[str] = field(default_factory=set)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    open: list[tuple[Case, grpc.StatusCode, MMEmbeddingRes | None]] = field(default_factory=list)
    kills: int = 0
    before_s: float = 0.0
    after_s: float = 0.0

    def saw_kill(self) -> None:
        self.kills += 1


@contextmanager
def calm_engine(checkpoint: Path) -> Iterator[Engine]:
    """One in this process with the server's options, which nobody disturbs."""
    engine = create_engine(vit_separation=0, checkpoint_path=checkpoint, **OPTIONS)
    try:
        yield engine
    finally:
        engine.close()


def answer_of(engine: Engine, items: Sequence[MultimodalInput]) -> MMEmbeddingRes:
    urls, types, tensors = zip(*((item.url, item.mm_type, item.tensor) for item in items), strict=True)
    return engine.submit(urls, types, tensors)


def is_same(one: MMEmbeddingRes, other: MMEmbeddingRes) -> bool:
    """Bit for bit."""
    pairs = [(one.embeddings, other.embeddings), (one.position_ids or [], other.position_ids or [])]
    return all(len(a) == len(b) and all(map(torch.equal, a, b)) for a, b in pairs)


def judge(report: Report, engine: Engine) -> None:
    """What came of damaged files: the same as where nothing else happens, or nothing, for want of a worker."""
    for case, status, got in report.open:
        right, words = "OK", "another answer"
        try:
            expected = answer_of(engine, case.items)
        except MMError as error:
            right, words = error.status, str(error)[:300]
        is_same_answer = got is None or (right == "OK" and is_same(got, expected))
        if right not in ("OK", "INVALID_ARGUMENT") or (status is not Status.INTERNAL and status.name != right):
            report.wrong.append(f"{case.name}: {status.name}, alone {right} {words}")
        elif not is_same_answer:
            report.wrong.append(f"{case.name}: {words}")
    report.open.clear()


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
        if case.vanish_after_s is not None:
            await self._vanish(case, case.vanish_after_s)
            return
        request = wire.write_inputs(case.items).SerializeToString()
        call = self._call(request, timeout=CALL_TIMEOUT_S, metadata=((wire.WIRE_METADATA, "items"),))
        if case.cancel_after_s is not None:
            await asyncio.sleep(case.cancel_after_s)
            call.cancel()
        status, details, result = Status.OK, "", None
        try:
            result = wire.read_result(await call)
        except grpc.aio.AioRpcError as error:
            status, details = error.code(), error.details() or ""
        except asyncio.CancelledError:
            status = Status.CANCELLED
        outcome = status.name
        if result is not None and case.right:
            outcome = "right" if is_same(result, self._expected(case.right)) else "WRONG"
        self._report.outcomes[case.name, outcome] += 1
        is_lost = status in self._always and "worker" in details
        if case.is_open and (result is not None or status in case.statuses or is_lost):
            self._report.open.append((case, status, result))
            return
        is_fine = outcome == "right" or status in case.statuses or is_lost
        if not is_fine:
            urls = [item.url[:60] for item in case.items]
            self._report.wrong.append(f"{case.name}: {outcome} {details[:300]} for {urls}")

    def _expected(self, numbers: Sequence[int]) -> MMEmbeddingRes:
        """What each of the good media gets when it is alone."""
        alone = [self._right[number] for number in numbers]
        ids = [answer.position_ids[0] for answer in alone if answer.position_ids is not None]
        return MMEmbeddingRes([answer.embeddings[0] for answer in alone], ids)

    async def _vanish(self, case: Case, after_s: float) -> None:
        """A client whose connection breaks in the middle of its call."""
        request = wire.write_inputs(case.items).SerializeToString()
        async with breakable(self._address) as (address, break_it):
            channel = grpc.aio.insecure_channel(address, options=MESSAGE_SIZE_OPTIONS)
            call = channel.unary_unary(method_path("RemoteMultimodalEmbedding"))(request)
            await asyncio.sleep(after_s)
            break_it()
            with suppress(grpc.aio.AioRpcError):
                await call
            await channel.close()
        self._report.outcomes[case.name, "gone"] += 1


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
    server: RunningServer, supply: Supply, right: Sequence[MMEmbeddingRes], folder: Path, *, requests: int, seed: int,
    callers: int = 16, kills: bool = True,
) -> tuple[Report, Holdings, Holdings]:  # fmt: skip
    """The report, and what the server held before and after."""
    rng, report, pid = random.Random(seed), Report(), server.process.pid
    async with Source.serving() as source:
        clients = Clients(server.address, right, report, workers_die=kills)
        report.before_s = await one_by_one(clients, supply, "good before", MMPreprocessConfig())  # lazy imports, pools
        before = Holdings.of(pid)
        weather = Weather(source, supply, folder, rng)
        report.known = {case.name for case in weather.known}
        cases = weather.cases()
        left = iter(range(requests))

        async def caller() -> None:
            for _ in left:
                await clients.send(next(cases))

        async with doing(kill_workers(pid, report.outcomes.total, report.saw_kill, rng) if kills else asyncio.sleep(0)):
            await asyncio.gather(*(caller() for _ in range(callers)))
        calm = Clients(server.address, right, report, workers_die=False)
        report.after_s = await one_by_one(calm, supply, "good afterwards", THE_SAME)
        await calm.close()
        after = await settled(server, before)
        await clients.close()
    return report, before, after


async def one_by_one(clients: Clients, supply: Supply, name: str, config: MMPreprocessConfig) -> float:
    """Each of the good media; the seconds that the middle one took."""
    seconds = []
    for i, good in enumerate(supply.good):
        begun = time.perf_counter()
        await clients.send(Case(name, [replace(good.item, config=config)], [i]))
        seconds.append(time.perf_counter() - begun)
    return statistics.median(seconds)


async def settled(server: RunningServer, before: Holdings) -> Holdings:
    """What the server holds once nothing is in progress and all is as before, or after `SETTLE_S`."""
    give_up = time.monotonic() + SETTLE_S
    while True:
        is_over = not await asyncio.to_thread(unfinished, server)
        with suppress(psutil.NoSuchProcess, FileNotFoundError):  # one ended while it was looked at
            after = Holdings.of(server.process.pid)
            if (is_over and after.is_within(before)) or time.monotonic() > give_up:
                return after
        await asyncio.sleep(0.5)


def main() -> int:
    from rich.console import Console
    from rich.table import Table

    from rtp_mm.random_checkpoint import write_checkpoint

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=int(np.random.default_rng().integers(1 << 30)))
    parser.add_argument("--family", choices=SUPPLIES, default="qwen2_5_vl")
    parser.add_argument("--no-kills", action="store_true", help="leave the workers alone")
    parser.add_argument("--option", action="append", default=[], help="of the server, name=value")
    options = parser.parse_args()
    print(f"seed {options.seed}")
    with tempfile.TemporaryDirectory() as name:
        folder, supply = Path(name), SUPPLIES[options.family]()
        checkpoint = folder / "checkpoint"
        write_checkpoint(checkpoint, options.family, "tiny")
        extra = dict(option.split("=", 1) for option in options.option)
        with calm_engine(checkpoint) as engine:
            right = [answer_of(engine, [good.item]) for good in supply.good]
            with running_server(checkpoint, **(OPTIONS | extra)) as server:
                report, before, after = asyncio.run(
                    run(server, supply, right, folder, requests=options.requests, seed=options.seed,
                        kills=not options.no_kills)
                )  # fmt: skip
                left = unfinished(server)
            judge(report, engine)
    table = Table("case", "outcome", "requests")
    for (case, outcome), count in sorted(report.outcomes.items()):
        table.add_row(case, outcome, str(count))
    Console().print(table)
    print(f"workers killed: {report.kills}\nbefore {before}\nafter  {after}\nstill in progress: {left}")
    print(f"a good request alone: {report.before_s * 1e3:.1f} ms before, {report.after_s * 1e3:.1f} ms after")
    for line in report.wrong:
        print("WRONG", line)
    return int(bool(report.wrong or left) or not after.is_within(before, LONG_PSS_SLACK))


if __name__ == "__main__":
    sys.exit(main())
