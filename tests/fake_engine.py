"""An engine without a model: answers by URL, for tests of everything around engines.

`serving(engine)` puts it behind both ports in this process, `python -m tests.fake_engine` in its own.

    img:<tokens>       that many rows
    slow:<seconds>     two rows, after a while
    fail:<class>       that class of rtp_mm.errors, or any built-in exception
    frozen:            a row for every thousand objects that the garbage collector looks at no more
"""

from __future__ import annotations

import asyncio
import builtins
import gc
import random
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

from rtp_mm import errors
from rtp_mm.config import Settings, load_settings
from rtp_mm.engine.interface import as_inputs, time_limit
from rtp_mm.server.app import open_ports
from rtp_mm.server.state import Loaded, ServerState
from rtp_mm.start_server import run
from rtp_mm.types import LIBRARY_CALLER, CacheStatus, Caller, EngineStats, MMEmbeddingRes, MultimodalInput, WorkerStatus

HIDDEN = 5
TIMINGS_MS = {"fetch": 1.5, "forward": 20.25}


class FakeEngine:
    def __init__(self, *, has_position_ids: bool = True, has_extra_inputs: bool = False) -> None:
        self.has_position_ids = has_position_ids
        self.has_extra_inputs = has_extra_inputs
        self.asked: list[tuple[list[MultimodalInput], Caller, float | None]] = []
        self.cancelled = 0
        self.running = 0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.is_closed = False
        self.is_alive = True
        self.figures = EngineStats()

    async def embed(
        self, inputs: Sequence[MultimodalInput], *, caller: Caller = LIBRARY_CALLER, timeout_s: float | None = None
    ) -> MMEmbeddingRes:
        timeout_s = time_limit(inputs, timeout_s, load_settings()).seconds
        self.asked.append(([*inputs], caller, timeout_s))
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.running += 1
        try:
            async with asyncio.timeout(timeout_s):
                rows = [await self._rows(item.url) for item in inputs]
        except TimeoutError:
            raise errors.DeadlineError("too slow") from None
        except asyncio.CancelledError:
            self.cancelled += 1
            if not self.is_closed:
                raise
            task.uncancel()
            raise errors.DrainingError("the engine is closed") from None
        finally:
            self._tasks.discard(task)
            self.running -= 1
        return self.answer(rows)

    def submit(self, urls, types=None, tensors=None, preprocess_configs=None) -> MMEmbeddingRes:
        return asyncio.run(self.embed(as_inputs(urls, types, tensors, preprocess_configs)))

    def answer(self, rows: Sequence[int]) -> MMEmbeddingRes:
        import torch  # seconds: only the servers that answer pay them

        return MMEmbeddingRes(
            [torch.arange(n * HIDDEN, dtype=torch.bfloat16).view(n, HIDDEN) + i for i, n in enumerate(rows)],
            [torch.arange(n * 3, dtype=torch.int32).view(n, 3) for n in rows] if self.has_position_ids else None,
            [torch.full((n,), i, dtype=torch.float16) for i, n in enumerate(rows)] if self.has_extra_inputs else None,
            TIMINGS_MS,
            cached_items=0,
        )

    async def _rows(self, url: str) -> int:
        kind, _, argument = url.partition(":")
        if kind == "slow":
            await asyncio.sleep(float(argument))
            return 2
        if kind == "linger":  # a thread that goes on, as a forward whose caller has left
            threading.Thread(target=time.sleep, args=(600,)).start()
        if kind == "fail":
            raise failure(argument)
        if kind == "frozen":
            return gc.get_freeze_count() // 1000
        return int(argument) if kind == "img" else 2

    def worker_status(self) -> WorkerStatus:
        return WorkerStatus(7, 1, self.running, 3.5, 4, 11, self.is_alive, "bf16", 100, 200, 300)

    def cache_status(self, *, with_keys: bool = False) -> CacheStatus:
        return CacheStatus(100, 200, version=9, keys=(-3, 1 << 60) if with_keys else ())

    def stats(self) -> EngineStats:
        return self.figures

    def close(self) -> None:
        self.is_closed = True

    async def aclose(self) -> None:
        self.close()
        for task in self._tasks:
            task.cancel()


def failure(name: str) -> Exception:
    if name == "QueueFullError":
        return errors.QueueFullError("full", retry_after_ms=250)
    if name == "BadItemsError":
        bad = errors.WrongFormatError("no image")
        return errors.BadItemsError([errors.ItemFailure(1, "http://host/b.jpg", bad)])
    return (getattr(errors, name, None) or getattr(builtins, name))(f"text of {name}")


@dataclass
class Serving:
    engine: FakeEngine
    state: ServerState
    settings: Settings

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.settings.start_port + 1}"

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.settings.start_port}"


@asynccontextmanager
async def serving(
    engine: FakeEngine | None = None, *, is_loaded: bool = True, model: str = "fake", **options: Any
) -> AsyncIterator[Serving]:
    """The fake engine behind both ports, on this event loop."""
    engine = engine or FakeEngine()
    options = {"start_port": free_start_port(), "mm_bind_address": "127.0.0.1"} | options
    settings, state = load_settings(None, **options), ServerState()
    if is_loaded:
        state.serve(Loaded(engine, model=model, dtype="bf16", device="cpu"))
    async with open_ports(state, settings):
        yield Serving(engine, state, settings)


def free_start_port() -> int:
    """A port that is free and whose successor is; below the range that outgoing connections take theirs from."""
    while True:
        port = random.randrange(10_000, 30_000, 2)
        with suppress(OSError), socket.create_server(("", port)), socket.create_server(("", port + 1)):
            return port


def load_fake(settings: Settings, loop: asyncio.AbstractEventLoop | None = None) -> Loaded:
    if settings.model_type == "broken":
        raise errors.StartError("the checkpoint\nis broken")
    if settings.model_type == "endless":
        threading.Event().wait()
    return Loaded(FakeEngine(), model="fake", dtype="bf16", device="cpu")


if __name__ == "__main__":
    sys.exit(run(load_settings(sys.argv[1:]), load_fake))
