"""The gRPC methods over an `Engine`, and the one place where an error becomes an answer."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

import grpc

from rtp_mm.config import Settings
from rtp_mm.errors import MMError, ProcessError
from rtp_mm.server import wire
from rtp_mm.server.call import Call
from rtp_mm.server.metrics import Metrics
from rtp_mm.server.proto import CacheStatusPB, MultimodalRpcServiceServicer, WorkerStatusPB
from rtp_mm.server.security import is_loopback
from rtp_mm.server.state import ServerState
from rtp_mm.server.tracing import Trace, Tracing
from rtp_mm.types import Caller, MMEmbeddingRes, MMUrlType

CALLERS_KEPT = 1024  # connections
COPIED_ON_LOOP = 4 << 20  # bytes of a reply: a millisecond; more would hold up all other calls
_log = logging.getLogger(__name__)
Method = Callable[[Any, Any, Call], Awaitable[Any]]  # of a request, its context and its call: the reply


class MultimodalServicer(MultimodalRpcServiceServicer):
    """`MultimodalRpcService` of one server process."""

    def __init__(self, state: ServerState, settings: Settings, metrics: Metrics, tracing: Tracing) -> None:
        self._state = state
        self._settings = settings
        self._metrics = metrics
        self._tracing = tracing
        self._caller_of = lru_cache(CALLERS_KEPT)(caller_of)

    async def RemoteMultimodalEmbedding(self, request: Any, context: Any) -> Any:
        """A call that, however it ends, leaves its log line, metrics and span, once its reply is on its way."""
        metadata = context.invocation_metadata() or ()  # made anew each time it is asked for
        trace = self._tracing.begin(metadata)
        call = Call(self._caller_of(context.peer()), metadata, trace_id=trace.id)
        answer = self._answer(request, context, call, self._embed)
        del context, request  # as `_answer` does
        try:
            return await answer
        finally:
            call.ended()
            asyncio.get_running_loop().call_soon(self._observe, call, trace)

    async def GetWorkerStatus(self, request: Any, context: Any) -> Any:
        return await self._answer(request, context, Call(self._caller_of(context.peer())), self._worker_status)

    async def GetCacheStatus(self, request: Any, context: Any) -> Any:
        return await self._answer(request, context, Call(self._caller_of(context.peer())), self._cache_status)

    async def _embed(self, request: Any, context: Any, call: Call) -> bytes:
        call.items = len(request.multimodal_inputs)
        engine = self._state.admit()
        unsent: list[MMEmbeddingRes] = []  # held, and so counted by the engine

        def leave(_: Any) -> None:
            """The reply is sent, or the caller gone."""
            unsent.clear()
            self._state.leave()

        self._state.enter()
        # gRPC's own task ends as the call does. A callback of the context would make a cycle of it, for the garbage
        # collector to find.
        task = asyncio.current_task()
        assert task is not None
        task.add_done_callback(leave)
        form = wire.choose_form(request, call.metadata, self._settings)
        inputs = (
            await asyncio.to_thread(wire.read_inputs, request) if _has_tensors(request) else wire.read_inputs(request)
        )
        call.received(inputs)
        result = await engine.embed(inputs, caller=call.caller, timeout_s=context.time_remaining())
        unsent.append(result)
        if wire.copied_bytes(result, form) <= COPIED_ON_LOOP:
            reply = wire.write_result(result, form)
        else:
            reply = await asyncio.to_thread(wire.write_result, result, form)
        call.answered(result, reply)
        return reply

    async def _worker_status(self, request: Any, context: Any, call: Call) -> Any:
        """Zeros and `alive` false where nothing is loaded yet; `alive` false while draining, too."""
        loaded = self._state.loaded
        if loaded is None:
            return WorkerStatusPB(role="VIT", dp_size=1, tp_size=1)
        await context.send_initial_metadata(((wire.MODEL_METADATA, quote(loaded.model)),))
        status = loaded.engine.worker_status()
        return WorkerStatusPB(
            role="VIT",
            available_concurrency=_int32(status.available_concurrency),
            waiting_query_len=_int32(status.waiting),
            running_query_len=_int32(status.running),
            step_latency_ms=status.step_latency_ms,
            iterate_count=_int32(status.iterations),
            dp_size=1,
            tp_size=1,
            status_version=status.finished_version,
            alive=self._state.is_serving,
            precision=status.precision,
            available_kv_cache=status.cache_available_bytes,
            total_kv_cache=status.cache_total_bytes,
            max_batch_tokens_size=status.max_batch_tokens,
        )

    async def _cache_status(self, request: Any, context: Any, call: Call) -> Any:
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

    def _observe(self, call: Call, trace: Trace) -> None:
        if not self._settings.disable_access_log:
            call.log()
        self._metrics.observe(call)
        trace.end(call)

    async def _answer(self, request: Any, context: Any, call: Call, method: Method) -> Any:
        """The method's reply; turns whatever else ends the call into its status, message and trailing metadata."""
        try:
            if isinstance(request, MMError):
                raise request
            reply = await method(request, context, call)
        except MMError as error:
            failure = error
        except asyncio.CancelledError:
            call.status = "CANCELLED"
            raise
        except Exception:  # noqa: BLE001 - the one place
            _log.exception("internal error, id %s", call.id)
            failure = ProcessError(f"internal error, id {call.id}")
        else:
            context.set_trailing_metadata(call.trailing_metadata())
            return reply
        call.failed(failure.with_traceback(None))
        end = context.abort(grpc.StatusCode[call.status], failure.wire_message, call.trailing_metadata())
        del context, request, failure  # the context keeps the error that ends the call, which keeps this frame: a cycle
        return await end


def _has_tensors(request: Any) -> bool:
    """Which are copied as they are read."""
    return any(item.multimodal_type == MMUrlType.TENSOR for item in request.multimodal_inputs)


def _int32(value: int) -> int:
    """The wire's largest for what is larger: forwards are counted past it in a month."""
    return min(value, (1 << 31) - 1)


def caller_of(peer: str) -> Caller:
    """gRPC's peer, `ipv4:1.2.3.4:5`, `ipv6:%5B::1%5D:5` or `unix:...` -> who asks.

    Local are loopback addresses (IPv4-mapped ones too) and unix sockets; what cannot be read is not local.
    """
    scheme, _, address = unquote(peer).partition(":")
    if scheme in ("unix", "unix-abstract"):
        return Caller(peer, is_local=True)
    if scheme not in ("ipv4", "ipv6"):
        return Caller(peer, is_local=False)
    return Caller(peer, is_local=is_loopback(address.rpartition(":")[0].strip("[]")))
