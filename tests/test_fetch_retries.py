"""Which failures of a download are tried again, how often, and after which pause."""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import socket
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from pretend_network import PretendNetwork
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.errors import DownloadFailedError, DownloadRefusedError, MMError
from rtp_mm.media.http import HttpSource
from rtp_mm.media.limits import SizeLimit

LIMIT = SizeLimit(1 << 16, "MM_IMAGE_MAX_FILE_SIZE_KB")
ADDRESS = "93.184.215.14"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbody"
RESET = b"RESET"


@pytest.fixture
def network(source: Source) -> PretendNetwork:
    network = PretendNetwork(source.port)
    network.name("a.example", [ADDRESS])
    return network


async def download(network: PretendNetwork, url: str = "http://a.example/x", **options: Any) -> bytes | None:
    async with network.source(reuse=False, **options) as source:
        return (await source.download(url, LIMIT)).body


async def failure(network: PretendNetwork, url: str = "http://a.example/x", **options: Any) -> MMError:
    with pytest.raises(MMError) as caught:
        await download(network, url, **options)
    assert caught.value.__cause__ is None
    return caught.value


def answers_in_turn(source: Source, *responses: dict[str, Any]) -> None:
    """At /x; the last one for ever."""
    rest = list(responses)

    async def answer(request: web.Request) -> web.StreamResponse:
        return web.Response(**(rest.pop(0) if len(rest) > 1 else rest[0]))

    source.answers_by("/x", answer)


@contextlib.asynccontextmanager
async def raw(*answers: bytes) -> AsyncIterator[PretendNetwork]:
    """A server that writes these bytes, one answer a connection, the last one for ever; `RESET` breaks it off there."""
    rest = list(answers)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        answer = rest.pop(0) if len(rest) > 1 else rest[0]
        writer.write(answer.removesuffix(RESET))
        await writer.drain()
        if answer.endswith(RESET):
            reset_on_close = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset_on_close)
        writer.close()

    async with await asyncio.start_server(handle, "127.0.0.1", 0) as server:
        network = PretendNetwork(server.sockets[0].getsockname()[1])
        network.name("a.example", [ADDRESS])
        yield network


async def test_a_passing_failure_is_tried_again_after_growing_pauses(network: PretendNetwork, source: Source) -> None:
    answers_in_turn(source, {"status": 503}, {"status": 429}, {"body": b"body"})
    assert await download(network) == b"body"
    assert len(source.requests) == 3
    first, second = network.pauses
    assert 0.125 <= first <= 0.375
    assert 0.25 <= second <= 0.75


async def test_pauses_differ_so_that_clients_do_not_return_as_one(network: PretendNetwork, source: Source) -> None:
    answers_in_turn(source, {"status": 503})
    for _ in range(4):
        await failure(network, mm_fetch_retries=1)
    assert len(set(network.pauses)) == 4


@pytest.mark.parametrize("retries", [0, 1, 4])
async def test_a_download_is_tried_retries_plus_one_times(
    network: PretendNetwork, source: Source, retries: int
) -> None:
    answers_in_turn(source, {"status": 503})
    error = await failure(network, mm_fetch_retries=retries)
    assert type(error) is DownloadFailedError
    assert str(error) == "the source answered 503"
    assert len(source.requests) == retries + 1
    assert len(network.pauses) == retries


@pytest.mark.parametrize(
    ("status", "tries"), [(304, 1), (400, 1), (403, 1), (404, 1), (408, 3), (429, 3), (500, 3), (502, 3), (599, 3)]
)
async def test_only_what_asking_again_may_mend_is_tried_again(
    network: PretendNetwork, source: Source, status: int, tries: int
) -> None:
    answers_in_turn(source, {"status": status})
    error = await failure(network)
    assert type(error) is (DownloadRefusedError if tries == 1 else DownloadFailedError)
    assert len(source.requests) == tries


async def test_a_refused_connection_is_tried_again(network: PretendNetwork) -> None:
    network.down = {ADDRESS}
    error = await failure(network)
    assert str(error) == "no connection to a.example:80: Connection refused"  # without the address
    assert network.dialled == [ADDRESS] * 3


@pytest.mark.parametrize("broken", [b"", RESET])
async def test_a_connection_broken_before_the_answer_is_tried_again(broken: bytes) -> None:
    async with raw(broken, broken, OK) as network:  # aiohttp asks a second time by itself, and at once
        assert await download(network) == b"body"
        assert len(network.dialled) == 3
        assert len(network.pauses) == 1


@pytest.mark.parametrize(
    "answer",
    [
        OK[:-1],
        OK[:-1] + RESET,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel" + RESET,
        b"SSH-2.0-OpenSSH_9.9\r\n\r\n",
    ],
)
async def test_an_answer_that_broke_off_or_made_no_sense_is_not(answer: bytes) -> None:
    async with raw(answer, OK) as network:
        assert type(await failure(network)) is DownloadFailedError
        assert len(network.dialled) == 1


async def test_silence_is_not_tried_again(source: Source, network: PretendNetwork) -> None:
    async def silence(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    source.answers_by("/x", silence)
    error = await failure(network, mm_fetch_timeout_ms=100)
    assert str(error) == "the source was silent for 0.1 s (MM_FETCH_TIMEOUT_MS)"
    assert len(source.requests) == 1


async def test_a_source_without_tls_is_not(network: PretendNetwork) -> None:
    error = await failure(network, "https://a.example/x")
    assert "no connection to a.example:443: " in str(error)
    assert "not permitted" not in str(error)  # TLS counts its errors from 1, and so does the system
    assert network.dialled == [ADDRESS]


async def test_a_name_is_asked_for_again_only_where_its_server_was_away(network: PretendNetwork) -> None:
    network.name("a.example", socket.gaierror(socket.EAI_AGAIN, "Temporary failure"), [ADDRESS])
    network.name("b.example", socket.gaierror(socket.EAI_NONAME, "Name or service not known"), [ADDRESS])
    network.down = {ADDRESS}
    await failure(network)
    assert network.asked == ["a.example"] * 3
    assert (
        str(await failure(network, "http://b.example/x")) == "no connection to b.example:80: Name or service not known"
    )
    assert network.asked.count("b.example") == 1


def date(seconds: float) -> str:
    return email.utils.formatdate(time.time() + seconds, usegmt=True)


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("3", 3, 3), ("10", 10, 10), ("0", 0.1, 0.4), ("-5", 0.1, 0.4), ("soon", 0.1, 0.4), (date(-60), 0.1, 0.4)],
)
async def test_a_source_that_says_when_is_asked_then(
    network: PretendNetwork, source: Source, asked: str, least: float, most: float
) -> None:
    answers_in_turn(source, {"status": 503, "headers": {"Retry-After": asked}}, {"body": b"body"})
    assert await download(network) == b"body"
    (pause,) = network.pauses
    assert least <= pause <= most


async def test_a_date_to_come_is_waited_for(network: PretendNetwork, source: Source) -> None:
    headers = {"Retry-After": date(8)}
    answers_in_turn(source, {"status": 503, "headers": headers}, {"body": b"body"})
    assert await download(network) == b"body"
    assert 0.3 < network.pauses[0] <= 8


@pytest.mark.parametrize("asked", ["11", "9" * 500, date(3600)])
async def test_a_source_that_asks_for_long_is_not_asked_again(
    network: PretendNetwork, source: Source, asked: str
) -> None:
    answers_in_turn(source, {"status": 429, "headers": {"Retry-After": asked}}, {"body": b"body"})
    assert str(await failure(network)) == "the source answered 429"
    assert len(source.requests) == 1


async def test_a_download_that_is_cancelled_in_a_pause_ends_there(source: Source) -> None:
    answers_in_turn(source, {"status": 503, "headers": {"Retry-After": "10"}})
    http = HttpSource(load_settings(mm_allow_private_network=True))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.3):
            await http.download(source.url + "/x", LIMIT)
    await http.close()
    assert len(source.requests) == 1
