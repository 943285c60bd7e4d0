"""The HTTP side: health for whoever balances the load, metrics and traces for whoever watches, `/` for whoever wonders.

GET  /health, /ready        200 {"status": "ok"} while serving, else 503 with the reason; open to all
GET  /live                  200 until the device is lost, loading and draining included; open to all
GET  /metrics               Prometheus
GET  /                      what this is
POST /debug/profile         records a trace for ?seconds=5; GET lists traces, GET /debug/profile/NAME fetches one
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from rtp_mm import __version__
from rtp_mm.config import Settings
from rtp_mm.logs import log_event
from rtp_mm.server.metrics import Metrics
from rtp_mm.server.profiler import MAX_SECONDS, Profiler
from rtp_mm.server.security import Guard, is_loopback
from rtp_mm.server.state import Phase, ServerState

_log = logging.getLogger(__name__)
_OPEN = ("/health", "/ready", "/live")  # probes carry no credentials
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def http_app(
    state: ServerState, settings: Settings, metrics: Metrics, guard: Guard, *, is_mutual: bool = False
) -> web.Application:
    """All routes; `is_mutual`: callers must have shown a client certificate."""

    async def health(_: web.Request) -> web.Response:
        if state.is_serving:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": _reason(state)}, status=503)

    async def live(_: web.Request) -> web.Response:
        status = 503 if state.is_lost and state.phase is not Phase.DRAINING else 200
        return web.json_response({"status": "ok" if status == 200 else _reason(state)}, status=status)

    async def about(_: web.Request) -> web.Response:
        loaded = state.loaded
        return web.json_response(
            {
                "name": "rtp_mm",
                "version": __version__,
                "status": _reason(state),
                "model": loaded.model if loaded else settings.model_type,
                "dtype": loaded.dtype if loaded else settings.act_type,
                "device": loaded.device if loaded else settings.device,
                "quantization": loaded.quantization if loaded else settings.mm_quantization,
                "grpc_port": settings.start_port + 1,
            }
        )

    async def exposition(request: web.Request) -> web.Response:
        body, content_type = metrics.exposition(request.headers.get(hdrs.ACCEPT, ""))
        return web.Response(body=body, headers={hdrs.CONTENT_TYPE: content_type})

    @web.middleware
    async def authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.path in _OPEN:
            return await handler(request)
        if is_mutual and not request.get_extra_info("peercert"):
            return _unauthenticated(metrics, "this needs a client certificate")
        if not guard.admits(request.headers.get(hdrs.AUTHORIZATION)):
            return _unauthenticated(metrics, "header Authorization must be Bearer and the server's token")
        return await handler(request)

    app = web.Application(middlewares=[authenticate])
    app.add_routes([web.get("/health", health), web.get("/ready", health), web.get("/live", live)])
    app.add_routes([web.get("/metrics", exposition), web.get("/", about)])
    _add_profiler(app, settings, is_guarded=is_mutual or guard.is_on)
    return app


def http_logger() -> logging.Logger:
    """For aiohttp: of bytes that are no HTTP/1.1 it logs one line, as whatever scans ports sends them."""
    logger = logging.getLogger(f"{__name__}.requests")
    if not logger.filters:
        logger.addFilter(_without_stack)
    return logger


def _without_stack(record: logging.LogRecord) -> bool:
    if record.exc_info and isinstance(record.exc_info[1], HttpProcessingError):
        record.msg, record.exc_info = f"{record.msg}: no HTTP/1.1 request", None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
    return True


def _reason(state: ServerState) -> str:
    return "device lost" if state.phase is Phase.SERVING and state.is_lost else str(state.phase)


def _unauthenticated(metrics: Metrics, why: str) -> web.Response:
    metrics.refused("http")
    return web.json_response({"error": why}, status=401, headers={hdrs.WWW_AUTHENTICATE: "Bearer"})


def _add_profiler(app: web.Application, settings: Settings, *, is_guarded: bool) -> None:
    """`is_guarded`: whoever gets here has shown credentials; else only local callers may profile."""
    profiler = Profiler(settings.mm_profile_dir) if settings.mm_profile_dir else None

    def allowed(request: web.Request) -> Profiler:
        if profiler is None:
            raise web.HTTPNotFound(text="set MM_PROFILE_DIR to a folder for traces\n")
        if not is_guarded and not is_loopback(request.remote or ""):
            raise web.HTTPForbidden(text="without MM_AUTH_TOKEN or MM_TLS_CLIENT_CA only local callers may profile\n")
        return profiler

    async def record(request: web.Request) -> web.Response:
        recorder = allowed(request)
        if (seconds := _seconds(request.query.get("seconds", "5"))) is None:
            raise web.HTTPBadRequest(text=f"seconds must be a number above 0 and at most {MAX_SECONDS:g}\n")
        if recorder.is_recording:
            raise web.HTTPConflict(text="a trace is being recorded\n")
        path = await recorder.record(seconds)
        log_event(_log, "profiled", trace=path, seconds=seconds, peer=request.remote)
        return web.json_response({"trace": path.name, "bytes": path.stat().st_size}, status=201)

    async def traces(request: web.Request) -> web.Response:
        found = allowed(request).traces()
        return web.json_response([{"trace": path.name, "bytes": path.stat().st_size} for path in found])

    async def trace(request: web.Request) -> web.FileResponse:
        for path in allowed(request).traces():
            if path.name == request.match_info["name"]:
                return web.FileResponse(path)
        raise web.HTTPNotFound(text="no such trace\n")

    async def close(_: web.Application) -> None:
        if profiler is not None:
            profiler.close()

    app.add_routes([web.post("/debug/profile", record), web.get("/debug/profile", traces)])
    app.add_routes([web.get("/debug/profile/{name}", trace)])
    app.on_shutdown.append(close)


def _seconds(text: str) -> float | None:
    with suppress(ValueError):
        if 0 < (seconds := float(text)) <= MAX_SECONDS:
            return seconds
    return None
