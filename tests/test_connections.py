"""A connection ends some day, and with it what a caller left unread or unsaid; callers that behave notice nothing."""

from __future__ import annotations

import asyncio
import gc
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc
import pytest
from fake_engine import FakeEngine, Serving, serving
from server_calls import EMBED, request
from waiting import until

from rtp_mm.config import load_settings
from rtp_mm.server import app
from rtp_mm.server.client import RemoteEngine
from rtp_mm.types import MultimodalInput

AGE_MS = 1500  # and as long a grace: what must be seen meanwhile takes milliseconds
SHORT_AGE_MS = 200
DATA, HEADERS, SETTINGS = 0, 1, 4  # HTTP/2's frames
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW_SIZE = 4


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def call_headers(address: str) -> bytes:
    """Literal header fields (RFC 7541, 6.2.2), each shorter than 127 bytes."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": EMBED,
        ":authority": address,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(
        bytes([0, len(name)]) + name.encode() + bytes([len(value)]) + value.encode() for name, value in fields.items()
    )


@asynccontextmanager
async def unread_call(server: Serving, message: bytes, *, is_whole: bool) -> AsyncIterator[asyncio.StreamReader]:
    """A call whose caller grants the reply no window and sends nothing more: at most half of the message, or all."""
    body = bytes(1) + struct.pack(">I", len(message)) + (message if is_whole else message[: len(message) // 2])
    host, port = server.grpc_address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
        + frame(HEADERS, END_HEADERS, 1, call_headers(server.grpc_address))
        + frame(DATA, END_STREAM if is_whole else 0, 1, body)
    )
    try:
        yield reader
    finally:
        writer.close()


async def test_what_nobody_reads_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_CARRIAGE_MS", AGE_MS)
    message = request("img:1000").SerializeToString()
    async with (
        serving(mm_max_connection_age_ms=AGE_MS, mm_timeout_ms=1) as server,
        unread_call(server, message, is_whole=True) as reader,
    ):
        await until(lambda: server.engine.asked and not server.engine.running and server.state.calls == 1)
        await until(lambda: server.state.calls == 0)
        await asyncio.wait_for(reader.read(), 10)  # the connection's end


async def test_half_a_message_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "_CARRIAGE_MS", AGE_MS)
    message = request("img:1").SerializeToString()
    async with serving(mm_max_connection_age_ms=AGE_MS, mm_timeout_ms=1) as server:
        before = len(asyncio.all_tasks())
        async with unread_call(server, message, is_whole=False) as reader:
            await until(lambda: len(asyncio.all_tasks()) > before)
            await asyncio.wait_for(reader.read(), 10)
        await until(lambda: len(asyncio.all_tasks()) == before)
        assert not server.engine.asked


@pytest.mark.parametrize(
    "start", [b"", b"GET /health HTTP/1.1\r\nHost: a", b"GET /health HTTP/1.1\r\nHost: a\r\n\r\nGET /"]
)
async def test_half_an_http_request_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch, start: bytes) -> None:
    """Nor one that comes in drops."""
    monkeypatch.setattr(app, "_HTTP_IDLE_S", AGE_MS / 1e3)
    async with serving() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.settings.start_port)
        writer.write(start)
        ends = asyncio.ensure_future(reader.read())
        while start and not ends.done():
            writer.write(b"a")
            await asyncio.sleep(AGE_MS / 7e3)
        answer = await asyncio.wait_for(ends, 10)
        assert answer.startswith(b"HTTP/1.1 200") if start.count(b"GET") == 2 else answer == b""
        writer.close()


async def test_a_call_that_has_ended_waits_for_no_garbage_collector() -> None:
    """Whether it was answered or refused: a cycle of gRPC's objects would stay until the next collection."""
    async with serving() as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        call = channel.unary_unary(EMBED)
        await call(request("img:1").SerializeToString())
        gc.collect()
        gc.disable()
        try:
            for url in ("img:1", "img:2", "fail:WrongFormatError", "fail:WrongFormatError"):
                with suppress(grpc.aio.AioRpcError):
                    await call(request(url).SerializeToString())
            await until(lambda: server.state.calls == 0)
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = {type(found).__name__ for found in gc.garbage}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert not left & {"_ServicerContext", "RPCState"}


async def test_calls_go_on_over_the_next_connection() -> None:
    """Slow ones, too: only what is older than the grace is cut off."""
    async with serving(FakeEngine(), mm_max_connection_age_ms=SHORT_AGE_MS) as server:
        engine = RemoteEngine(server.grpc_address, load_settings(None))
        async with grpc.aio.insecure_channel(server.grpc_address) as channel, asyncio.timeout(60):
            call = channel.unary_unary(EMBED)
            slow = [asyncio.ensure_future(call(request("slow:1").SerializeToString())) for _ in range(3)]
            while len({caller.peer for _, caller, _ in server.engine.asked}) < 6:
                assert await call(request("img:3").SerializeToString())
                assert len((await engine.embed([MultimodalInput("img:3")])).embeddings[0]) == 3
            assert all(await asyncio.gather(*slow))
        engine.close()


@pytest.mark.parametrize("option", ["mm_max_connection_age_ms", "mm_timeout_ms"])
async def test_times_beyond_what_grpc_counts_are_never(option: str) -> None:
    async with serving(**{option: 1 << 40}) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        assert await channel.unary_unary(EMBED)(request("img:1").SerializeToString())
