"""The HTTP side: `/health` for whoever balances the load, `/` for whoever wonders what listens here."""

from __future__ import annotations

from aiohttp import web

from rtp_mm import __version__
from rtp_mm.config import Settings
from rtp_mm.server.state import Phase, ServerState


def http_app(state: ServerState, settings: Settings) -> web.Application:
    """`GET /health`: 200 `{"status": "ok"}` while serving, else 503 with the phase. `GET /`: what this is."""

    async def health(_: web.Request) -> web.Response:
        if state.phase is Phase.SERVING:
            return web.json_response({"status": "ok"})
        return web.json_response({"status": state.phase}, status=503)

    async def about(_: web.Request) -> web.Response:
        loaded = state.loaded
        return web.json_response(
            {
                "name": "rtp_mm",
                "version": __version__,
                "status": state.phase,
                "model": loaded.model if loaded else settings.model_type,
                "dtype": loaded.dtype if loaded else settings.act_type,
                "device": loaded.device if loaded else settings.device,
                "grpc_port": settings.start_port + 1,
            }
        )

    app = web.Application()
    app.add_routes([web.get("/health", health), web.get("/", about)])
    return app
