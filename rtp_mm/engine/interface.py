"""What a server, a client or an LLM engine may ask of an engine; `MMProcessEngine` (in process) and
`RemoteEngine` (another server) both answer it.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from rtp_mm.config import Settings
from rtp_mm.types import (
    LIBRARY_CALLER,
    CacheStatus,
    Caller,
    EngineStats,
    MMEmbeddingRes,
    MMPreprocessConfig,
    MMUrlType,
    MultimodalInput,
    WorkerStatus,
)

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """URL in, embeddings out."""

    async def embed(
        self, inputs: Sequence[MultimodalInput], *, caller: Caller = LIBRARY_CALLER, timeout_s: float | None = None
    ) -> MMEmbeddingRes:
        """Embeddings of all items, in their order; callable from any event loop. Cancelling drops the work.

        `timeout_s` is what the caller grants; see `time_limit`. The tensors are a library caller's own; any other's may
        be views of answers that are cached, and are not to be written to. Raises `BadItemsError` that names each bad
        item, `QueueFullError`, `DeadlineError`, `ProcessError`, and `DrainingError` once the engine is closed.
        """

    def submit(
        self,
        urls: Sequence[str | os.PathLike[str]],
        types: Sequence[MMUrlType] | None = None,
        tensors: Sequence[Tensor | None] | None = None,
        preprocess_configs: Sequence[Any] | None = None,
    ) -> MMEmbeddingRes:
        """The synchronous face, with RTP-LLM's arguments; see `as_inputs`."""

    def worker_status(self) -> WorkerStatus:
        """Live figures of queue, device and caches."""

    def cache_status(self, *, with_keys: bool = False) -> CacheStatus:
        """Live figures of the embedding cache."""

    def stats(self) -> EngineStats:
        """Live figures and counters, for metrics; zeros where an engine does not know."""

    def close(self) -> None:
        """Ends what runs, stops threads and closes connections; idempotent. Not for the engine's own event loop."""

    async def aclose(self) -> None:
        """The same for any event loop."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None:
        """Closes it."""


class ClosedByWith(ABC):
    """What a `with` statement closes, for engines to inherit."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @abstractmethod
    def close(self) -> None: ...


def as_inputs(
    urls: Sequence[str | os.PathLike[str]],
    types: Sequence[MMUrlType] | None = None,
    tensors: Sequence[Tensor | None] | None = None,
    preprocess_configs: Sequence[Any] | None = None,
) -> list[MultimodalInput]:
    """RTP-LLM's parallel lists to items; an absent or empty list stands for defaults.

    A config is an `MMPreprocessConfig`, a dictionary of its values, or these in order. Raises `ValueError` for lists of
    unequal length, for one URL in place of a list, and for what is neither URL nor path.
    """
    if isinstance(urls, str | os.PathLike):
        raise ValueError("urls must be a list, got one text or path")
    types = types or [MMUrlType.DEFAULT] * len(urls)
    tensors = tensors or [None] * len(urls)
    configs = map(_config, preprocess_configs or [()] * len(urls))
    return [
        MultimodalInput(url, MMUrlType(mm_type), config, tensor)
        for url, mm_type, config, tensor in zip(map(_url, urls), types, configs, tensors, strict=True)
    ]


def _url(url: object) -> str:
    text = os.fspath(url) if isinstance(url, os.PathLike) else url
    if not isinstance(text, str):
        raise ValueError(f"urls must be texts or paths, got {type(url).__name__}; bytes go as a data: URL")
    return text


def _config(values: Any) -> MMPreprocessConfig:
    if isinstance(values, MMPreprocessConfig):
        return values
    return MMPreprocessConfig(**values) if isinstance(values, Mapping) else MMPreprocessConfig(*values)


class TimeLimit(NamedTuple):
    """For a whole request."""

    seconds: float
    source: str  # who set it

    def __str__(self) -> str:
        return f"{self.seconds:.3f} s, {self.source}"


def time_limit(inputs: Iterable[MultimodalInput], remaining_s: float | None, settings: Settings) -> TimeLimit:
    """The smallest of what the caller grants, MM_TIMEOUT_MS, and the largest `mm_timeout_ms` among the items (each
    item grants the request its own time; the slowest counts).
    """
    limits = [TimeLimit(settings.mm_timeout_ms / 1e3, "MM_TIMEOUT_MS")]
    if granted := [item.config.timeout_ms for item in inputs if item.config.timeout_ms is not None]:
        limits.append(TimeLimit(max(granted) / 1e3, "mm_timeout_ms"))
    if remaining_s is not None:
        limits.append(TimeLimit(max(remaining_s, 0.0), "the caller's deadline"))
    return min(limits)
