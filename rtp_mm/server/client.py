"""An engine in another process: the same interface, answered over gRPC by a server."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc

from rtp_mm.config import Settings, load_settings
from rtp_mm.engine.interface import ClosedByWith, as_inputs, time_limit
from rtp_mm.errors import (
    DeadlineError,
    DownloadFailedError,
    DownloadRefusedError,
    DrainingError,
    LoadingError,
    MMError,
    NotSupportedError,
    ProcessError,
    QueueFullError,
    RemoteCallError,
    ReplyTooLargeError,
    StartError,
    UnauthenticatedError,
    WrongFormatError,
)
from rtp_mm.server import wire
from rtp_mm.server.proto import (
    MESSAGE_SIZE_OPTIONS,
    CacheVersionPB,
    MultimodalInputsPB,
    MultimodalRpcServiceStub,
    StatusVersionPB,
    method_path,
)
from rtp_mm.server.security import authorization, bearer_token, client_credentials
from rtp_mm.server.tracing import outgoing_context
from rtp_mm.types import (
    LIBRARY_CALLER,
    CacheStatus,
    Caller,
    EngineStats,
    MMEmbeddingRes,
    MMUrlType,
    MultimodalInput,
    WorkerStatus,
)

if TYPE_CHECKING:
    from torch import Tensor

DEFAULT_PORT = 8089  # gRPC of a server on its default START_PORT
_STATUS_TIMEOUT_S = 10.0
_OPTIONS = (
    *MESSAGE_SIZE_OPTIONS,
    ("grpc.enable_http_proxy", 0),  # a proxy in the environment is for downloads
    ("grpc.max_reconnect_backoff_ms", 2_000),  # a restarted server is found again soon; gRPC's default is 120 s
)
_CLASSES: dict[tuple[str, str], type[MMError]] = {
    (cls.name, cls.status): cls
    for cls in (
        ProcessError,
        WrongFormatError,
        NotSupportedError,
        DownloadRefusedError,
        DownloadFailedError,
        DeadlineError,
        DrainingError,
        LoadingError,
        ReplyTooLargeError,
        UnauthenticatedError,
    )
}
# gRPC's words, and what they mean here.
_MEANINGS = {
    "http1.x server": "an HTTP port; gRPC listens on the next one",
    "WRONG_VERSION_NUMBER": "no TLS there; without MM_REMOTE_TLS_CA the connection has none either",
    "Socket closed": "it closes the connection; with TLS it needs MM_REMOTE_TLS_CA here",
}
_NAMED = re.compile(r"\[(\w+)\] (.*)", re.DOTALL)
_STAGE = re.compile(r"rtp-mm-(\w+)-ms")


class RemoteEngine(ClosedByWith):
    """The engine of the server at `address`. Implements `rtp_mm.engine.interface.Engine`; for any thread and loop.

    `caller` is not passed on: the server goes by the address it sees. Errors arrive as the classes the server raised,
    save that a `BadItemsError` comes as its verdict's class, with its text. With `MM_REMOTE_TLS_CA` the connection is
    TLS; `MM_AUTH_TOKEN` is shown to the server. Raises `StartError` where one of their files is of no use.
    """

    def __init__(self, address: str, settings: Settings | None = None) -> None:
        self.address = server_address(address)
        self._settings = settings or load_settings()
        # The sync channel's calls are futures that any thread or event loop can wait for, so one channel serves all.
        credentials = client_credentials(self._settings)
        self._channel = (
            grpc.secure_channel(self.address, credentials, options=_OPTIONS)
            if credentials
            else grpc.insecure_channel(self.address, options=_OPTIONS)
        )
        self._token = bearer_token(self._settings)
        self._stub = MultimodalRpcServiceStub(self._channel)
        self._embed_call = self._channel.unary_unary(
            method_path("RemoteMultimodalEmbedding"), request_serializer=MultimodalInputsPB.SerializeToString
        )

    async def embed(
        self, inputs: Sequence[MultimodalInput], *, caller: Caller = LIBRARY_CALLER, timeout_s: float | None = None
    ) -> MMEmbeddingRes:
        """Cancelling cancels the call on the server, too."""
        call = self._start(inputs, timeout_s)
        try:
            await _settled(call)
        except asyncio.CancelledError:
            call.cancel()
            raise
        return await asyncio.to_thread(self._finish, call)  # copies the tensors off the loop

    def submit(
        self,
        urls: Sequence[str | os.PathLike[str]],
        types: Sequence[MMUrlType] | None = None,
        tensors: Sequence[Tensor | None] | None = None,
        preprocess_configs: Sequence[Any] | None = None,
    ) -> MMEmbeddingRes:
        return self._finish(self._start(as_inputs(urls, types, tensors, preprocess_configs), None))

    def worker_status(self) -> WorkerStatus:
        status = self._ask(self._stub.GetWorkerStatus, StatusVersionPB())
        return WorkerStatus(
            available_concurrency=status.available_concurrency,
            waiting=status.waiting_query_len,
            running=status.running_query_len,
            step_latency_ms=status.step_latency_ms,
            iterations=status.iterate_count,
            finished_version=status.status_version,
            is_alive=status.alive,
            precision=status.precision,
            cache_available_bytes=status.available_kv_cache,
            cache_total_bytes=status.total_kv_cache,
            max_batch_tokens=status.max_batch_tokens_size,
        )

    def model(self) -> str | None:
        """The family that the server runs, as in `MODEL_TYPE`; `None` where it does not say, or is still loading."""
        _, call = self._call(self._stub.GetWorkerStatus, StatusVersionPB())
        name = dict(call.initial_metadata()).get(wire.MODEL_METADATA)
        return None if name is None else unquote(name)

    def cache_status(self, *, with_keys: bool = False) -> CacheStatus:
        asked = CacheVersionPB(latest_cache_version=-1, need_cache_keys=with_keys)
        status = self._ask(self._stub.GetCacheStatus, asked)
        return CacheStatus(
            available_bytes=status.available_kv_cache,
            total_bytes=status.total_kv_cache,
            version=status.version,
            keys=tuple(status.cache_keys),
        )

    def stats(self) -> EngineStats:
        """Zeros: a server's figures are on its own `/metrics`."""
        return EngineStats()

    def close(self) -> None:
        self._channel.close()

    async def aclose(self) -> None:
        await asyncio.to_thread(self.close)

    def _start(self, inputs: Sequence[MultimodalInput], timeout_s: float | None) -> grpc.Future:
        limit = time_limit(inputs, timeout_s, self._settings)
        metadata = ((wire.WIRE_METADATA, "items"), *authorization(self._token), *outgoing_context())
        try:
            return self._embed_call.future(wire.write_inputs(inputs), timeout=limit.seconds, metadata=metadata)
        except ValueError:  # what grpc says of a closed channel
            raise DrainingError("the engine is closed") from None

    def _finish(self, call: grpc.Future) -> MMEmbeddingRes:
        """The answer; blocks until it is there."""
        try:
            result = wire.read_result(call.result())
        except grpc.RpcError as error:
            raise self._as_mm_error(error) from None
        except WrongFormatError as error:
            raise RemoteCallError(f"{self.address}: {error}") from None
        metadata = dict(call.trailing_metadata() or ())
        stages = ((_STAGE.fullmatch(key), value) for key, value in metadata.items())
        result.timings_ms = {match[1]: float(value) for match, value in stages if match}
        if seconds := metadata.get(wire.SECONDS_METADATA):
            result.seconds_per_grid = [float(text) or None for text in seconds.split(",")]
        if cuts := metadata.get(wire.CUT_METADATA):
            result.cut_s = [float(text) or None for text in cuts.split(",")]
        return result

    def _ask(self, method: Any, request: Any) -> Any:
        return self._call(method, request)[0]

    def _call(self, method: Any, request: Any) -> tuple[Any, Any]:
        """The reply, and the call with its metadata."""
        try:
            reply, call = method.with_call(request, timeout=_STATUS_TIMEOUT_S, metadata=authorization(self._token))
        except grpc.RpcError as error:
            raise self._as_mm_error(error) from None
        return reply, call

    def _as_mm_error(self, error: Any) -> MMError:
        """The class whose name and status the server sent; `RemoteCallError` for what is no answer of a server."""
        status, details = error.code().name, error.details() or ""
        if match := _NAMED.match(details):
            name, text = match.groups()
            if (name, status) == (QueueFullError.name, QueueFullError.status):
                metadata = dict(error.trailing_metadata() or ())
                return QueueFullError(text, int(metadata.get(wire.RETRY_AFTER_METADATA, 0)))
            if cls := _CLASSES.get((name, status)):
                return cls(text)
        if status == DeadlineError.status:
            return DeadlineError(f"{self.address}: no answer in time")
        for words, meaning in _MEANINGS.items():
            if words in details:
                details = meaning
        return RemoteCallError(f"{self.address}: {status}: {details}")


def server_address(text: str) -> str:
    """`host[:port]`, an IPv6 address bare or in brackets -> gRPC's target, `DEFAULT_PORT` where no port is given."""
    if "://" in text:
        raise StartError(f"a server is host[:port], not a URL: {text}")
    with suppress(ValueError):
        if ipaddress.ip_address(text.strip("[]")).version == 6:
            return f"[{text.strip('[]')}]:{DEFAULT_PORT}"
    return text if re.search(r":\d+$", text) else f"{text}:{DEFAULT_PORT}"


def _settled(call: grpc.Future) -> asyncio.Future[None]:
    """Done on this event loop once the call is, however it ended."""
    loop = asyncio.get_running_loop()
    settled: asyncio.Future[None] = loop.create_future()

    def settle() -> None:
        if not settled.done():
            settled.set_result(None)

    def on_done(_: grpc.Future) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            loop.call_soon_threadsafe(settle)

    call.add_done_callback(on_done)
    return settled
