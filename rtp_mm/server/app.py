"""One server process from its start to its end: ports, health, the engine, and a drain that cuts nobody off."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
from aiohttp import web
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from rtp_mm.config import Settings
from rtp_mm.errors import StartError
from rtp_mm.logs import log_event
from rtp_mm.server.http import http_app, http_logger
from rtp_mm.server.metrics import Metrics
from rtp_mm.server.proto import (
    MAX_MESSAGE_BYTES,
    SERVICE,
    WireForm,
    add_MultimodalRpcServiceServicer_to_server,
    file_descriptor,
)
from rtp_mm.server.security import Guard, ServerTls, TokenInterceptor, bearer_token
from rtp_mm.server.servicer import MultimodalServicer
from rtp_mm.server.state import Loaded, Phase, ServerState
from rtp_mm.server.tracing import tracing

_log = logging.getLogger(__name__)
_HEALTH_NAMES = ("", SERVICE)  # "" stands for the server as a whole
LoadEngine = Callable[[Settings, asyncio.AbstractEventLoop], Loaded]  # blocks; the engine then lives on that loop
_HEALTH_PERIOD_S = 0.5
_LAST_WORDS_S = 0.2  # after the drain: for health watchers and refusals to reach their clients
_HTTP_IDLE_S = 75.0  # that an HTTP connection may wait for a request's head to end: longer than between two scrapes
_NEVER_MS = (1 << 31) - 1  # as gRPC takes it; a larger number it does not take
_CARRIAGE_MS = 60_000  # for the messages of a call, both ways, beside its MM_TIMEOUT_MS

GRPC_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.compression_enabled_algorithms_bitset", 1),  # none: media are, and of gzip a MiB may be a GiB of memory
    ("grpc.so_reuseport", 0),  # a taken port is an error, not a second server that gets half of the calls
    # A caller that vanished without a word is noticed within 80 s, and its work dropped.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients may ping as often as every 5 s, idle ones too; gRPC's default of 5 minutes disconnects common settings.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)


def grpc_options(settings: Settings) -> tuple[tuple[str, int], ...]:
    """A connection ends some day: a caller that sends half a message, or reads no answer, holds memory till then.
    Clients connect anew without a word, and so find servers that were added meanwhile.
    """
    return (
        *GRPC_OPTIONS,
        ("grpc.max_receive_message_length", settings.mm_max_message_mb << 20),
        ("grpc.max_connection_age_ms", min(settings.mm_max_connection_age_ms, _NEVER_MS)),
        ("grpc.max_connection_age_grace_ms", min(settings.mm_timeout_ms + _CARRIAGE_MS, _NEVER_MS)),
    )


async def serve(settings: Settings, load_engine: LoadEngine) -> None:
    """Serves until SIGTERM or SIGINT, then drains; a second signal ends the process at once.

    Binds both ports first and answers 503 or `LoadingError` there while `load_engine` runs in a thread.
    Raises `StartError` for a taken port or a model that does not load.
    """
    started = time.perf_counter()
    state = ServerState()
    stopped = _stop_signal()
    try:
        async with open_ports(state, settings) as healths:
            loading = _in_thread(load_engine, settings)
            either: set[asyncio.Future[Any]] = {loading, stopped}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not stopped.done():
                loaded = loading.result()
                _freeze_heap()
                state.serve(loaded)
                await _set_health(healths, state)
                _log_ready(loaded, settings, time.perf_counter() - started)
            name = await stopped
            log_event(_log, "draining", signal=name, calls=state.calls)
            state.phase = Phase.DRAINING
            await healths.enter_graceful_shutdown()
            if not await state.drained(settings.mm_drain_timeout_ms / 1e3):
                log_event(_log, "drain timed out", logging.WARNING, calls_cut=state.calls)
                await _close_engine(state)  # which tells its callers so, in the words of the table; gRPC would not
    finally:
        await _close_engine(state)
    log_event(_log, "stopped", seconds=time.perf_counter() - started)


@asynccontextmanager
async def open_ports(state: ServerState, settings: Settings) -> AsyncIterator[health.aio.HealthServicer]:
    """Both ports open: HTTP, and gRPC with health and reflection. Raises `StartError`."""
    tls, guard, metrics = ServerTls.of(settings), Guard(bearer_token(settings)), Metrics(state)
    spans = tracing(settings)
    is_mutual = tls is not None and tls.is_mutual
    app = http_app(state, settings, metrics, guard, is_mutual=is_mutual)
    runner = web.AppRunner(
        app, access_log=None, logger=http_logger(), shutdown_timeout=_LAST_WORDS_S, keepalive_timeout=_HTTP_IDLE_S
    )
    await runner.setup()
    by_token = TokenInterceptor(guard, lambda: metrics.refused("grpc"), is_logged=not settings.disable_access_log)
    server = grpc.aio.server(options=grpc_options(settings), interceptors=[by_token] if guard.is_on else [])
    healths = health.aio.HealthServicer()
    await _set_health(healths, state)
    health_pb2_grpc.add_HealthServicer_to_server(healths, server)
    servicer = MultimodalServicer(state, settings, metrics, spans)
    add_MultimodalRpcServiceServicer_to_server(servicer, server)
    form: WireForm = "concat" if settings.mm_wire == "concat" else "items"
    names = (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
    reflection.enable_server_reflection(names, server, pool=reflection_pool(form))
    host, port = settings.mm_bind_address, settings.start_port
    following: asyncio.Task[None] | None = None
    try:
        _check_port(host, port, "HTTP")
        _check_port(host, port + 1, "gRPC")
        await web.TCPSite(runner, host, port, ssl_context=tls.http_context() if tls else None).start()
        if tls is None:
            server.add_insecure_port(_address(host, port + 1))
        else:
            server.add_secure_port(_address(host, port + 1), tls.grpc_credentials())
        await server.start()
        following = asyncio.create_task(_follow_health(healths, state))
        yield healths
    finally:
        if following is not None:
            following.cancel()
        await server.stop(grace=_LAST_WORDS_S)
        await runner.cleanup()
        await asyncio.to_thread(spans.close)


async def _close_engine(state: ServerState) -> None:
    if state.loaded is not None:
        await state.loaded.engine.aclose()


def _freeze_heap() -> None:
    """What is there by now stays to the end: modules, the model. Python's garbage collector, off until now, would stop
    all threads each time it looks through all of it again.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def _log_ready(loaded: Loaded, settings: Settings, seconds: float) -> None:
    log_event(
        _log,
        "ready",
        http=_address(settings.mm_bind_address, settings.start_port),
        grpc=_address(settings.mm_bind_address, settings.start_port + 1),
        model=loaded.model,
        dtype=loaded.dtype,
        device=loaded.device,
        quantization=loaded.quantization,
        multiplies=loaded.products,
        workers=settings.mm_preprocess_max_workers,
        tls=settings.mm_tls_cert is not None,
        auth=settings.mm_auth_token is not None or settings.mm_auth_token_file is not None,
        seconds=seconds,
    )


def reflection_pool(form: WireForm) -> DescriptorPool:
    """All that reflection may be asked for, in a pool of its own."""
    pool = DescriptorPool()
    pool.Add(file_descriptor(form))
    for module in (health_pb2, reflection_pb2):
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return pool


def _check_port(host: str, port: int, use: str) -> None:
    """Raises `StartError` for a port that cannot be had. A plain socket says why; gRPC's error would not."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise StartError(f"cannot listen on {_address(host, port)} for {use}: {error.strerror}") from None


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


async def _set_health(healths: health.aio.HealthServicer, state: ServerState) -> None:
    response = health_pb2.HealthCheckResponse
    for name in _HEALTH_NAMES:
        await healths.set(name, response.SERVING if state.is_serving else response.NOT_SERVING)


async def _follow_health(healths: health.aio.HealthServicer, state: ServerState) -> None:
    """Tells gRPC's health service when the engine gives up, or is back; runs until it is cancelled."""
    was_serving = state.is_serving
    while True:
        await asyncio.sleep(_HEALTH_PERIOD_S)
        if state.is_serving != was_serving:
            was_serving = state.is_serving
            await _set_health(healths, state)
            if state.is_lost:
                log_event(_log, "device lost", logging.ERROR)


def _stop_signal() -> asyncio.Future[str]:
    """Done with the signal's name at the first SIGTERM or SIGINT; after that both have their default effect again."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[str] = loop.create_future()

    def stop(received: signal.Signals) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_DFL)
        stopped.set_result(received.name)

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop, number)
    return stopped


def _in_thread(load_engine: LoadEngine, settings: Settings) -> asyncio.Future[Loaded]:
    """Runs in a daemon thread, which, unlike an executor's, does not hold up the end of the process."""
    loop = asyncio.get_running_loop()
    loading: asyncio.Future[Loaded] = loop.create_future()

    def settle(outcome: Loaded | StartError) -> None:
        if isinstance(outcome, StartError):
            loading.set_exception(outcome)
        else:
            loading.set_result(outcome)

    def run() -> None:
        outcome: Loaded | StartError = StartError("the model did not load, see the stack above")
        try:
            outcome = load_engine(settings, loop)
        except StartError as error:
            outcome = error
        finally:  # any other exception is a bug: the thread prints its stack
            with suppress(RuntimeError):  # the loop is closed: stopped while loading
                loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=run, name="load-engine", daemon=True).start()
    return loading
