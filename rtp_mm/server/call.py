"""One embedding call, from its first byte to its last: what its log line, metrics, span and trailing metadata say."""

from __future__ import annotations

import logging
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rtp_mm.errors import MMError, QueueFullError
from rtp_mm.logs import log_event
from rtp_mm.server.wire import CUT_METADATA, RETRY_AFTER_METADATA, SECONDS_METADATA
from rtp_mm.types import Caller, MMEmbeddingRes, MultimodalInput

REQUEST_ID_METADATA = "rtp-mm-request-id"
MAX_SECONDS_BYTES = 4096  # a status with more metadata than the peer takes (8 KiB) is lost
Metadata = Sequence[tuple[str, Any]]
_DIGITS = range(9, 2, -1)  # of a number: all of a float32's, fewer where they are many
_access = logging.getLogger("rtp_mm.access")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Call:
    """A call in progress, or, once `seconds` is set, one that has ended."""

    caller: Caller
    metadata: Metadata = field(default=(), repr=False)  # that came with it; it may hold a token
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    trace_id: str | None = None
    started: float = field(default_factory=time.perf_counter)
    seconds: float | None = None
    items: int | None = None
    types: Counter[str] = field(default_factory=Counter)  # items by `multimodal_type`
    tokens: int | None = None
    cached_items: int | None = None
    received_bytes: int | None = None  # of URLs, data URLs and tensors
    sent_bytes: int | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    seconds_per_grid: list[float | None] = field(default_factory=list)
    cut_s: list[float | None] = field(default_factory=list)
    status: str = "OK"
    failure: MMError | None = None

    def received(self, inputs: Sequence[MultimodalInput]) -> None:
        self.types.update(item.mm_type.name.lower() for item in inputs)
        self.received_bytes = sum(item.nbytes for item in inputs)

    def answered(self, result: MMEmbeddingRes, reply: bytes) -> None:
        self.tokens = sum(embedding.shape[0] for embedding in result.embeddings)
        self.cached_items = result.cached_items
        self.timings_ms = result.timings_ms
        self.seconds_per_grid, self.cut_s = result.seconds_per_grid, result.cut_s
        self.sent_bytes = len(reply)

    def failed(self, failure: MMError) -> None:
        self.failure, self.status = failure, failure.status
        self.timings_ms = dict(failure.timings_ms)

    def ended(self) -> None:
        self.seconds = time.perf_counter() - self.started

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        """Request id, `rtp-mm-<stage>-ms`, `retry-after-ms` where the queue was full, and, where there is a clip,
        `rtp-mm-second-per-grid`: a number per item, in order, separated by commas, 0 for what is no clip. The same for
        sounds that were cut off: `rtp-mm-audio-cut-s`. Left out, and logged, where the items are too many for it.
        """
        metadata = [(REQUEST_ID_METADATA, self.id)]
        metadata += [(f"rtp-mm-{stage}-ms", f"{ms:.3f}") for stage, ms in self.timings_ms.items()]
        if isinstance(self.failure, QueueFullError):
            metadata.append((RETRY_AFTER_METADATA, str(self.failure.retry_after_ms)))
        for name, seconds in ((SECONDS_METADATA, self.seconds_per_grid), (CUT_METADATA, self.cut_s)):
            if any(each is not None for each in seconds):
                if (text := _list_of(seconds)) is not None:
                    metadata.append((name, text))
                else:
                    log_event(_log, "metadata left out", logging.WARNING, id=self.id, name=name, items=len(seconds))
        return tuple(metadata)

    def log(self) -> None:
        stages: dict[str, Any] = {f"{stage}_ms": ms for stage, ms in self.timings_ms.items()}
        log_event(
            _access,
            "call",
            id=self.id,
            trace=self.trace_id,
            peer=self.caller.peer,
            items=self.items,
            cached=self.cached_items,
            tokens=self.tokens,
            bytes_in=self.received_bytes,
            bytes_out=self.sent_bytes,
            status=self.status,
            ms=(self.seconds or 0.0) * 1e3,
            **stages,
            retry_after_ms=self.failure.retry_after_ms if isinstance(self.failure, QueueFullError) else None,
            error=self.failure.wire_message if self.failure else None,
        )


def _list_of(seconds: Sequence[float | None]) -> str | None:
    """With as many digits as fit into `MAX_SECONDS_BYTES`; `None` where three do not."""
    texts = (",".join(f"{each or 0:.{digits}g}" for each in seconds) for digits in _DIGITS)
    return next((text for text in texts if len(text) <= MAX_SECONDS_BYTES), None)
