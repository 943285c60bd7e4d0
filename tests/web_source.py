"""A loopback web server whose answers a test chooses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Source:
    """A web server whose answers a test chooses; it keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Answer] = {}
        self.requests: list[web.Request] = []
        self.url = ""
        self.port = 0

    def answers_with(self, path: str, **response: Any) -> str:
        """Always the same response; its URL."""

        async def answer(request: web.Request) -> web.StreamResponse:
            return web.Response(**response)

        return self.answers_by(path, answer)

    def answers_by(self, path: str, answer: Answer) -> str:
        self.answers[path] = answer
        return self.url + path

    def redirects(self, path: str, location: str, status: int = 302) -> str:
        return self.answers_with(path, status=status, headers={"Location": location})

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        return await self.answers[request.path](request)

    @classmethod
    @asynccontextmanager
    async def serving(cls) -> AsyncIterator[Source]:
        source = cls()
        runner = web.ServerRunner(web.Server(source.handle, handler_cancellation=True), shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        source.port = runner.addresses[0][1]
        source.url = f"http://127.0.0.1:{source.port}"
        yield source
        await runner.cleanup()
