"""What a source may say beside its answer: on aiohttp's event loop every word of it takes time from everybody."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler

READ_BYTES = 1 << 16  # parsed in one turn of the loop; asyncio's own is 256 KiB
MAX_INFORMATIONAL = 16  # answers of 1xx before the one that counts
FREE_BYTES = 1 << 20  # of an answer behind its head that need not be its body
MAX_OVERHEAD = 2  # times a body's bytes, what goes over the wire for it beyond these: chunks of a few bytes are a siege


class BoundedHandler(ResponseHandler):
    """One connection to a source. Closes it, with `ClientPayloadError`, where that goes on and on without an answer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(loop)
        self._informational = 0
        self._received = 0  # bytes since the last answer's head

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        transport.max_size = READ_BYTES  # type: ignore[attr-defined]  # asyncio's; of no effect on others

    def data_received(self, data: bytes) -> None:
        self._received += len(data)
        super().data_received(data)
        if self._payload is not None and self._received > FREE_BYTES + MAX_OVERHEAD * self._payload.total_bytes:
            self._give_up("the source sends next to nothing in a flood of bytes")

    def feed_data(self, data: Any, size: int = 0) -> None:
        message, _ = data
        is_informational = 100 <= message.code < 200
        self._informational = self._informational + 1 if is_informational else 0
        self._received = 0
        if self._informational <= MAX_INFORMATIONAL:
            super().feed_data(data, size)
        else:
            self._give_up("the source sends informational answers without end")

    def _give_up(self, reason: str) -> None:
        error = aiohttp.ClientPayloadError(reason)
        if self._payload is not None:
            self._payload.set_exception(error)
        self.set_exception(error)
        if self.transport is not None:
            self.transport.abort()


def bound(connector: aiohttp.BaseConnector) -> aiohttp.BaseConnector:
    """Has its connections be `BoundedHandler`s, for which aiohttp (3.14) has no public way."""
    connector._factory = partial(BoundedHandler, loop=asyncio.get_running_loop())  # type: ignore[assignment]
    return connector
