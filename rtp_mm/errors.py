"""Every way a request can fail, with the name RTP-LLM's client parses and the gRPC status that goes with it.

Raise the most precise class from anywhere in the pipeline; only `server/servicer.py` turns one into a reply, and
`server/security.py` that of a call without its token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

MAX_DETAILS_BYTES = 1024  # gRPC details over the peer's metadata limit destroy the status itself


class MMError(Exception):
    """Base of all. `name` is RTP-LLM's exception name, `status` a `grpc.StatusCode` name."""

    name: ClassVar[str] = "MM_PROCESS_ERROR"
    status: ClassVar[str] = "INTERNAL"
    timings_ms: Mapping[str, float] = MappingProxyType({})  # a request's, by stage, up to where it failed

    @property
    def wire_message(self) -> str:
        """`[NAME] text`, cut on a character boundary to `MAX_DETAILS_BYTES` of UTF-8."""
        encoded = f"[{self.name}] {self}".encode(errors="backslashreplace")  # a path may hold lone surrogates
        if len(encoded) <= MAX_DETAILS_BYTES:
            return encoded.decode()
        return encoded[: MAX_DETAILS_BYTES - 3].decode(errors="ignore") + "..."


class ProcessError(MMError):
    """NaN in an embedding, out of memory, or a bug of ours."""


class WrongFormatError(MMError):
    """Undecodable bytes, a limit exceeded, or a bad preprocess config: the caller must change the input."""

    name = "MM_WRONG_FORMAT_ERROR"
    status = "INVALID_ARGUMENT"


class NotSupportedError(MMError):
    """A blocked address, path or scheme, or a modality that the model lacks."""

    name = "MM_NOT_SUPPORTED_ERROR"
    status = "INVALID_ARGUMENT"


class UnauthenticatedError(MMError):
    """The caller showed no token, or not the server's (`MM_AUTH_TOKEN`)."""

    name = "MM_NOT_SUPPORTED_ERROR"  # RTP-LLM's client does not ask again on this one
    status = "UNAUTHENTICATED"


class DownloadRefusedError(MMError):
    """The source answered 4xx: asking again gives the same answer."""

    name = "MM_DOWNLOAD_FAILED"
    status = "INVALID_ARGUMENT"


class DownloadFailedError(MMError):
    """408, 429, 5xx, or no connection: asking again may help."""

    name = "MM_DOWNLOAD_FAILED"
    status = "UNAVAILABLE"


class DeadlineError(MMError):
    """The caller's deadline, or `MM_TIMEOUT_MS`, passed before the answer was there."""

    status = "DEADLINE_EXCEEDED"


class QueueFullError(MMError):
    """Requests, patches or bytes in progress are at their limit, or the deadline cannot be met any more.
    `retry_after_ms` goes into the trailing metadata.
    """

    status = "RESOURCE_EXHAUSTED"

    def __init__(self, message: str, retry_after_ms: int) -> None:
        super().__init__(message)
        self.retry_after_ms = retry_after_ms


class DrainingError(MMError):
    """The server is going down and takes no new calls."""

    name = "MM_REMOTE_RPC_FAILED"
    status = "UNAVAILABLE"


class RemoteCallError(MMError):
    """A client's: its server cannot be reached, or answered something that is no answer."""

    name = "MM_REMOTE_RPC_FAILED"
    status = "UNAVAILABLE"


class LoadingError(MMError):
    """The model is not loaded yet."""

    name = "MM_EMPTY_ENGINE_ERROR"
    status = "UNAVAILABLE"


class ReplyTooLargeError(MMError):
    """The embeddings do not fit into one gRPC message."""

    name = "MM_LONG_PROMPT_ERROR"
    status = "INVALID_ARGUMENT"


class StartError(Exception):
    """The server cannot start: a wrong option, a missing checkpoint, a taken port. Shown as one line."""


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """One bad item of a request: its index, its redacted source, and what was wrong with it."""

    index: int
    source: str
    error: MMError


class BadItemsError(MMError):
    """One or more items of a request failed; the message names each of them, first those that no retry can mend.

    Name and status are the first one's, so that a client never retries a call that must fail again.
    """

    def __init__(self, failures: Sequence[ItemFailure]) -> None:
        # First what counts: `wire_message` is cut.
        self.failures = tuple(sorted(failures, key=lambda failure: failure.error.status != "INVALID_ARGUMENT"))
        super().__init__("; ".join(f"item {f.index} ({f.source}): {f.error}" for f in self.failures))
        self.verdict = self.failures[0].error

    @property
    def name(self) -> str:  # type: ignore[override]  # a class constant elsewhere, the verdict's here
        return self.verdict.name

    @property
    def status(self) -> str:  # type: ignore[override]
        return self.verdict.status
