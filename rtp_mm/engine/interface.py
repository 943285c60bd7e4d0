"""What a server, a client or an LLM engine may ask of an engine; `MMProcessEngine` (in process) and
`RemoteEngine` (another server) both answer it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rtp_mm.types import LIBRARY_CALLER, CacheStatus, Caller, MMEmbeddingRes, MMUrlType, MultimodalInput, WorkerStatus

if TYPE_CHECKING:
    from torch import Tensor


class Engine(Protocol):
    """URL in, embeddings out."""

    async def embed(
        self, inputs: Sequence[MultimodalInput], *, caller: Caller = LIBRARY_CALLER, timeout_s: float | None = None
    ) -> MMEmbeddingRes:
        """Embeddings of all items, in their order; callable from any event loop. Cancelling drops the work.

        Raises `BadItemsError` that names each bad item, `QueueFullError`, `DeadlineError`, `ProcessError`.
        """

    def submit(
        self,
        urls: Sequence[str],
        types: Sequence[MMUrlType] | None = None,
        tensors: Sequence[Tensor | None] | None = None,
        preprocess_configs: Sequence[Any] | None = None,
    ) -> MMEmbeddingRes:
        """The synchronous face, with RTP-LLM's arguments. A config is an `MMPreprocessConfig` or its list of values."""

    def worker_status(self) -> WorkerStatus:
        """Live figures of queue, device and caches."""

    def cache_status(self, *, with_keys: bool = False) -> CacheStatus:
        """Live figures of the embedding cache."""

    async def drain(self, timeout_s: float) -> bool:
        """Takes no new work; waits for running work. True if all of it finished in time."""

    def close(self) -> None:
        """Stops threads and closes connections; idempotent."""
