"""The gRPC methods over an `Engine`, and the one place where an error becomes an answer."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import grpc

from rtp_mm.config import Settings
from rtp_mm.errors import MMError, ProcessError, QueueFullError, WrongFormatError
from rtp_mm.logs import log_event
from rtp_mm.server import wire
from rtp_mm.server.proto import CacheStatusPB, MultimodalRpcServiceServicer, WorkerStatusPB
from rtp_mm.server.state import Phase, ServerState
from rtp_mm.types import Caller, MMEmbeddingRes

REQUEST_ID_METADATA = "rtp-mm-request-id"
_access = logging.getLogger("rtp_mm.access")
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Call:
    """One call in progress: what its log line and its trailing metadata will say."""

    caller: Caller
    id: str = field(default_factory=lambda: secrets.token_hex(4))
    started: float = field(default_factory=time.perf_counter)
    items: int | None = None
    tokens: int | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)

    def finished(self, result: MMEmbeddingRes) -> None:
        self.tokens = sum(embedding.shape[0] for embedding in result.embeddings)
        self.timings_ms = result.timings_ms

    def trailing_metadata(self, failure: MMError | None = None) -> tuple[tuple[str, str], ...]:
        """Request id, `rtp-mm-<stage>-ms`, and `retry-after-ms` where the queue was full."""
        metadata = [(REQUEST_ID_METADATA, self.id)]
        metadata += [(f"rtp-mm-{stage}-ms", f"{ms:.3f}") for stage, ms in self.timings_ms.items()]
        if isinstance(failure, QueueFullError):
            metadata.append((wire.RETRY_AFTER_METADATA, str(failure.retry_after_ms)))
        return tuple(metadata)


class MultimodalServicer(MultimodalRpcServiceServicer):
    """`MultimodalRpcService` of one server process."""

    def __init__(self, state: ServerState, settings: Settings) -> None:
        self._state = state
        self._settings = settings

    async def RemoteMultimodalEmbedding(self, request: Any, context: Any) -> bytes:
        async with self._answering(request, context) as call:
            return await self._embed(request, context, call)

    async def GetWorkerStatus(self, request: Any, context: Any) -> Any:
        async with self._answering(request, context, is_logged=False):
            return self._worker_status()

    async def GetCacheStatus(self, request: Any, context: Any) -> Any:
        async with self._answering(request, context, is_logged=False):
            return self._cache_status(request)

    async def _embed(self, request: Any, context: Any, call: Call) -> bytes:
        call.items = len(request.multimodal_inputs)
        engine = self._state.admit()
        self._state.enter()
        context.add_done_callback(lambda _: self._state.leave())  # runs once the reply is sent, or the caller gone
        form = wire.choose_form(request, context.invocation_metadata() or (), self._settings)
        inputs = wire.read_inputs(request)
        result = await engine.embed(inputs, caller=call.caller, timeout_s=context.time_remaining())
        call.finished(result)
        return wire.write_result(result, form)

    def _worker_status(self) -> Any:
        """Zeros and `alive` false where nothing is loaded yet; `alive` false while draining, too."""
        loaded = self._state.loaded
        if loaded is None:
            return WorkerStatusPB(role="VIT", dp_size=1, tp_size=1)
        status = loaded.engine.worker_status()
        return WorkerStatusPB(
            role="VIT",
            available_concurrency=status.available_concurrency,
            waiting_query_len=status.waiting,
            running_query_len=status.running,
            step_latency_ms=status.step_latency_ms,
            iterate_count=status.iterations,
            dp_size=1,
            tp_size=1,
            status_version=status.finished_version,
            alive=status.is_alive and self._state.phase is Phase.SERVING,
            precision=status.precision,
            available_kv_cache=status.cache_available_bytes,
            total_kv_cache=status.cache_total_bytes,
            max_batch_tokens_size=status.max_batch_tokens,
        )

    def _cache_status(self, request: Any) -> Any:
        """Bytes, so the block size is 1. Keys only for a caller that wants them and whose version is old."""
        loaded = self._state.loaded
        if loaded is None:
            return CacheStatusPB(block_size=1)
        status = loaded.engine.cache_status()
        if request.need_cache_keys and request.latest_cache_version != status.version:
            status = loaded.engine.cache_status(with_keys=True)
        return CacheStatusPB(
            available_kv_cache=status.available_bytes,
            total_kv_cache=status.total_bytes,
            block_size=1,
            version=status.version,
            cache_keys=dict.fromkeys(status.keys, True),
        )

    @asynccontextmanager
    async def _answering(self, request: Any, context: Any, *, is_logged: bool = True) -> AsyncIterator[Call]:
        """Turns whatever ends the call into its status, message, trailing metadata and log line."""
        call = Call(caller_of(context.peer()))
        failure: MMError | None = None
        status = "OK"
        try:
            if request is None:
                raise WrongFormatError("the request does not parse")
            yield call
        except MMError as error:
            failure = error
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except Exception:  # noqa: BLE001 - the one place
            _log.exception("internal error, id %s", call.id)
            failure = ProcessError(f"internal error, id {call.id}")
        finally:
            if is_logged and not self._settings.disable_access_log:
                _log_access(call, failure, failure.status if failure else status)
        metadata = call.trailing_metadata(failure)
        if failure:
            await context.abort(grpc.StatusCode[failure.status], failure.wire_message, metadata)
        context.set_trailing_metadata(metadata)


def _log_access(call: Call, failure: MMError | None, status: str) -> None:
    stages: dict[str, Any] = {f"{stage}_ms": ms for stage, ms in call.timings_ms.items()}
    log_event(
        _access,
        "call",
        id=call.id,
        peer=call.caller.peer,
        items=call.items,
        tokens=call.tokens,
        status=status,
        ms=(time.perf_counter() - call.started) * 1e3,
        **stages,
        error=failure.wire_message if failure else None,
    )


def caller_of(peer: str) -> Caller:
    """gRPC's peer, `ipv4:1.2.3.4:5`, `ipv6:%5B::1%5D:5` or `unix:...` -> who asks.

    Local are loopback addresses (IPv4-mapped ones too) and unix sockets; what cannot be read is not local.
    """
    scheme, _, address = unquote(peer).partition(":")
    if scheme in ("unix", "unix-abstract"):
        return Caller(peer, is_local=True)
    if scheme not in ("ipv4", "ipv6"):
        return Caller(peer, is_local=False)
    host = address.rpartition(":")[0].strip("[]").partition("%")[0]
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return Caller(peer, is_local=False)
    mapped = getattr(ip, "ipv4_mapped", None)
    return Caller(peer, is_local=(mapped or ip).is_loopback)
