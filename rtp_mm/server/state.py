"""Where the server stands in its life; the gRPC and the HTTP side both ask here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from enum import StrEnum

from rtp_mm.engine.interface import Engine
from rtp_mm.errors import DrainingError, LoadingError


class Phase(StrEnum):
    LOADING = "loading"
    SERVING = "serving"
    DRAINING = "draining"


@dataclass(frozen=True, slots=True)
class Loaded:
    """An engine that can serve, and what to say about it."""

    engine: Engine
    model: str
    dtype: str
    device: str
    quantization: str = "none"
    products: str = ""  # see `MultiModalEmbeddingInterface`


@dataclass(slots=True)
class ServerState:
    """One event loop's own: no locks."""

    phase: Phase = Phase.LOADING
    loaded: Loaded | None = None
    calls: int = 0  # embedding calls from their start until their reply is sent
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def serve(self, loaded: Loaded) -> None:
        self.loaded, self.phase = loaded, Phase.SERVING

    @property
    def is_lost(self) -> bool:
        """Whether the engine gave up, its device gone or hung: a new process helps."""
        return self.loaded is not None and not self.loaded.engine.worker_status().is_alive

    @property
    def is_serving(self) -> bool:
        return self.phase is Phase.SERVING and not self.is_lost

    def admit(self) -> Engine:
        """The engine, for a new call. Raises `LoadingError`, `DrainingError`."""
        if self.phase is Phase.DRAINING:
            raise DrainingError("the server is going down, ask another")
        if self.loaded is None:
            raise LoadingError("the model is still loading")
        return self.loaded.engine

    def enter(self) -> None:
        self.calls += 1

    def leave(self) -> None:
        self.calls -= 1
        if self.calls == 0:
            self._idle.set()

    async def drained(self, timeout_s: float) -> bool:
        """Waits until no call is left; `False` if `timeout_s` passed first."""
        self._idle.clear()
        if self.calls == 0:
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True
