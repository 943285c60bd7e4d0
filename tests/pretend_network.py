"""An internet of tables: names that resolve as a test says, addresses that all lead to one loopback server.

Nothing else is ever asked or dialled, even where the code under test is broken.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from rtp_mm.config import load_settings
from rtp_mm.media.http import HttpSource


class _Socket(socket.socket):
    """Says it is of the family asked for, and connects to the loopback whatever it is told."""

    def __init__(self, network: PretendNetwork, family: int) -> None:
        super().__init__(socket.AF_INET, socket.SOCK_STREAM)
        self._network = network
        self._family = family

    @property
    def family(self) -> Any:
        return self._family

    def connect(self, address: Any) -> None:
        host = address[0]
        self._network.dialled.append(host)
        if host in self._network.down:
            raise ConnectionRefusedError(errno.ECONNREFUSED, f"Connect call failed {address}")
        super().connect(("127.0.0.1", self._network.port))


class _Resolver(AbstractResolver):
    def __init__(self, network: PretendNetwork) -> None:
        self._network = network

    async def resolve(self, host: str, port: int = 0, family: int = 0) -> list[ResolveResult]:
        self._network.asked.append(host)
        answers = self._network.names.get(host, [])
        if not answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, OSError):
            raise answer
        return [
            ResolveResult(hostname=host, host=address, port=port, family=socket.AF_UNSPEC, proto=0, flags=0)
            for address in answer
        ]

    async def close(self) -> None:
        pass


class PretendNetwork:
    """`port` is the loopback server's. `asked` and `dialled` are the names and addresses that were tried, in order."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.names: dict[str, list[Sequence[str] | OSError]] = {}
        self.down: set[str] = set()
        self.asked: list[str] = []
        self.dialled: list[str] = []
        self.pauses: list[float] = []

    def name(self, name: str, *answers: Sequence[str] | OSError) -> None:
        """`answers` in turn, the last one for ever; each a list of addresses or an error."""
        self.names[name] = list(answers)

    @asynccontextmanager
    async def source(self, *, reuse: bool = True, **options: Any) -> AsyncIterator[HttpSource]:
        """A source on this network. Without `reuse`, each request resolves and connects anew."""

        def connector(**arguments: Any) -> aiohttp.TCPConnector:
            return aiohttp.TCPConnector(
                socket_factory=lambda info: _Socket(self, info[0]),
                use_dns_cache=reuse,
                force_close=not reuse,
                happy_eyeballs_delay=None,  # one address after the other
                **arguments,
            )

        async def sleep(seconds: float) -> None:
            self.pauses.append(seconds)

        settings = load_settings(**options)
        source = HttpSource(settings, sleep=sleep, resolver=lambda: _Resolver(self), connector=connector)
        try:
            yield source
        finally:
            await source.close()
