"""Downloads, from a loopback server that misbehaves in every way it can."""

from __future__ import annotations

import asyncio
import base64
import gzip
import io
import re
import socket
import zlib
from functools import partial
from threading import Event, Semaphore
from typing import Any

import fetching
import pytest
from aiohttp import web
from blake3 import blake3
from fetching import LOOPBACK, REMOTE
from PIL import Image
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.errors import (
    DownloadFailedError,
    DownloadRefusedError,
    MMError,
    QueueFullError,
    StartError,
    WrongFormatError,
)
from rtp_mm.media.addresses import SystemResolver
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.probe import probe
from rtp_mm.types import MMUrlType, MultimodalInput

LIMIT = 64 * 1024
BODY = bytes(range(256)) * 100
OK = b"HTTP/1.1 200 OK\r\n"
fetch = partial(fetching.fetch, **LOOPBACK, mm_image_max_file_size_kb=LIMIT // 1024)
refusal = partial(fetching.refusal, **LOOPBACK, mm_image_max_file_size_kb=LIMIT // 1024)


async def raw(answer: bytes, *, then_wait: bool = False) -> tuple[asyncio.Server, str]:
    """A server that writes these bytes, valid HTTP or not."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        if then_wait:
            await reader.read()
        writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    return server, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/x"


async def test_a_body_comes_back_whole_with_its_hash(source: Source) -> None:
    blob = await fetch(source.answers_with("/cat.jpg", body=BODY) + "?signature=secret")
    assert blob.data == BODY
    assert blob.content_hash == blake3(BODY).digest()
    assert blob.source == f"{source.url}/cat.jpg?..."


async def test_a_signed_url_is_sent_as_it_stands(source: Source) -> None:
    source.answers_with("/a b/c.jpg", body=BODY)
    query = "/a%20b/c.jpg?X-Credential=AK%2F2026%2fus&sig=a%2Bb%3D%3d&x=~*'()&e=a/b:c@d"
    await fetch(source.url + query + "#top")
    assert source.requests[0].raw_path == query
    await fetch(f"{source.url}/a b/c.jpg?ü=1")  # and one that no request line can carry is quoted
    assert source.requests[1].raw_path == "/a%20b/c.jpg?%C3%BC=1"


@pytest.mark.parametrize(
    ("status", "error"),
    [(400, DownloadRefusedError), (401, DownloadRefusedError), (403, DownloadRefusedError), (404, DownloadRefusedError),
     (410, DownloadRefusedError), (304, DownloadRefusedError), (408, DownloadFailedError), (429, DownloadFailedError),
     (500, DownloadFailedError), (503, DownloadFailedError)],
)  # fmt: skip
async def test_the_status_decides_whether_to_ask_again(source: Source, status: int, error: type[MMError]) -> None:
    caught = await refusal(source.answers_with("/x", status=status, body=b"a secret page"))
    assert type(caught) is error
    assert str(caught) == f"the source answered {status}"
    assert caught.name == "MM_DOWNLOAD_FAILED"


async def test_a_refusal_is_remembered_for_5_seconds_and_no_failure_is(source: Source) -> None:
    now = 100.0
    refused = MultimodalInput(source.answers_with("/404", status=404))
    failed = MultimodalInput(source.answers_with("/503", status=503))
    async with Fetcher(load_settings(**LOOPBACK), clock=lambda: now) as fetcher:

        async def asked(item: MultimodalInput) -> int:
            before = len(source.requests)
            with pytest.raises((DownloadRefusedError, DownloadFailedError), match=r"answered (404|503)"):
                await fetcher.fetch(item, REMOTE)
            return len(source.requests) - before

        assert [await asked(refused), await asked(refused)] == [1, 0]
        assert [await asked(failed), await asked(failed)] == [1, 1]
        now = 104.9
        assert await asked(refused) == 0
        now = 105.1
        assert await asked(refused) == 1


async def test_content_length_over_the_limit_is_refused_unread() -> None:
    server, url = await raw(OK + f"Content-Length: {LIMIT + 1}\r\n\r\n".encode(), then_wait=True)
    async with server:
        caught = await refusal(url)
    assert type(caught) is WrongFormatError
    assert str(caught) == "65537 bytes or more, over the limit of 65536 (MM_IMAGE_MAX_FILE_SIZE_KB)"


async def test_a_body_without_length_is_cut_at_the_limit(source: Source) -> None:
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 8192)
            sent += 8192

    caught = await refusal(source.answers_by("/x", endless))
    assert "over the limit of 65536" in str(caught)
    assert sent < 100 * LIMIT  # what the sockets between us hold


def large_png(side: int, before: bytes = b"") -> bytes:
    """The header of a PNG, chunks before its pixels, and as many zeros as a download never wants."""
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + header + bytes(4) + before


async def sent_before_the_end(source: Source, head: bytes, error: str | None, **options: Any) -> int:
    """Chunks of 0.1 MB that the source could send after `head`, until it was refused with this error."""
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(head)
        for _ in range(200):
            await response.write(bytes(102_400))
            sent += 1
        return response

    options = {"mm_image_max_file_size_kb": 25_000, "mm_max_pixels": 10_000, **options}
    if error is None:
        await fetch(source.answers_by("/x", endless), **options)
    else:
        assert str(await refusal(source.answers_by("/x", endless), **options)) == error
    return sent


async def test_a_download_ends_once_its_header_tells_too_many_pixels(source: Source) -> None:
    error = "101x101 is 10201 pixels, over the limit of 10000 (MM_MAX_PIXELS)"
    assert await sent_before_the_end(source, large_png(101), error) < 120  # of 200: sockets hold some
    assert await sent_before_the_end(source, large_png(100), None) == 200
    assert await sent_before_the_end(source, large_png(101), None, mm_type=MMUrlType.VIDEO,
                                     mm_video_max_file_size_kb=25_000) == 200  # fmt: skip


async def test_a_header_behind_the_first_look_is_found_by_a_later_one(source: Source) -> None:
    photo = io.BytesIO()
    Image.new("RGB", (101, 101)).save(photo, "JPEG")
    segment = b"\xff\xe1\xff\xff" + bytes(65533)
    head = photo.getvalue()[:2] + 5 * segment + photo.getvalue()[2:]
    error = "101x101 is 10201 pixels, over the limit of 10000 (MM_MAX_PIXELS)"
    assert await sent_before_the_end(source, head, error) < 120


async def test_a_video_that_looks_like_a_huge_tga_is_not_refused_for_that(source: Source) -> None:
    mpeg = b"\0\0\1\xba" + b"\0" * 8 + b"\xff\xff\xff\xff" + b"\x18\0" + bytes(30)
    header = probe(mpeg)
    assert header is not None
    assert header[:3] == ("TGA", 65535, 65535)
    assert await sent_before_the_end(source, mpeg, None, mm_type=MMUrlType.DEFAULT) == 200


async def test_the_limit_itself_passes_and_video_has_its_own(source: Source) -> None:
    url = source.answers_with("/x", body=b"x" * LIMIT)
    assert (await fetch(url)).nbytes == LIMIT
    url = source.answers_with("/y", body=b"x" * (LIMIT + 1))
    for mm_type in (MMUrlType.VIDEO, MMUrlType.AUDIO):
        assert (await fetch(url, mm_type)).nbytes == LIMIT + 1
        with pytest.raises(WrongFormatError, match="MM_VIDEO_MAX_FILE_SIZE_KB"):
            await fetch(url, mm_type, mm_video_max_file_size_kb=1)
    with pytest.raises(WrongFormatError, match="MM_IMAGE_MAX_FILE_SIZE_KB"):
        await fetch(url, MMUrlType.DEFAULT)


@pytest.mark.parametrize("headers", [{}, {"Content-Encoding": "gzip"}], ids=repr)
async def test_what_does_not_say_what_it_is_has_the_limit_of_what_it_turns_out_to_be(
    source: Source, headers: dict[str, str]
) -> None:
    clip, image = b"\x1a\x45\xdf\xa3" + bytes(2 * LIMIT), b"\x89PNG\r\n\x1a\n" + bytes(2 * LIMIT)
    bodies = {path: gzip.compress(data) if headers else data for path, data in (("/clip", clip), ("/image", image))}
    urls = {path: source.answers_with(path, body=body, headers=headers) for path, body in bodies.items()}
    assert (await fetch(urls["/clip"], MMUrlType.DEFAULT)).data == clip
    with pytest.raises(WrongFormatError, match="MM_VIDEO_MAX_FILE_SIZE_KB"):
        await fetch(urls["/clip"], MMUrlType.DEFAULT, mm_video_max_file_size_kb=127)
    with pytest.raises(WrongFormatError, match="MM_IMAGE_MAX_FILE_SIZE_KB"):
        await fetch(urls["/image"], MMUrlType.DEFAULT)
    with pytest.raises(WrongFormatError, match="MM_IMAGE_MAX_FILE_SIZE_KB"):
        await fetch(urls["/clip"], MMUrlType.IMAGE)


CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"


async def test_a_flood_of_tiny_chunks_is_cut_off() -> None:
    server, url = await raw(CHUNKED + b"1\r\na\r\n" * 1_000_000)
    async with server:
        caught = await refusal(url, mm_image_max_file_size_kb=10_000)
    assert type(caught) is DownloadFailedError


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 16 + OK + b"Content-Length: 3\r\n\r\nabc",
        CHUNKED + b"1\r\na\r\n1\r\nb\r\n1\r\nc\r\n0\r\n\r\n",
    ],
    ids=["hints before", "small chunks"],
)
async def test_what_sources_say_beside_a_body_is_borne(answer: bytes) -> None:
    server, url = await raw(answer)
    async with server:
        assert (await fetch(url)).data == b"abc"


@pytest.mark.parametrize(
    ("answer", "error", "text"),
    [
        (b"", DownloadFailedError, "broke the connection off"),
        (OK + b"Content-Length: 1000\r\n\r\nonly this", DownloadFailedError, "broke the connection off"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", DownloadFailedError, "broke the connection off"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", DownloadFailedError, ""),
        (OK + b"Content-Length: 5\r\n\r\nhello, world", DownloadFailedError, "does not speak HTTP"),
        (OK + b"Content-Length: -5\r\n\r\n", DownloadFailedError, "does not speak HTTP"),
        (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", DownloadFailedError, "does not speak HTTP"),
        (OK + b"X: " + b"y" * 100_000 + b"\r\n\r\n", DownloadFailedError, "does not speak HTTP"),
        (OK + b"Content-Length: 0\r\n\r\n", WrongFormatError, "the source is empty"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", WrongFormatError, "the source is empty"),
        (b"HTTP/1.1 302 Found\r\n\r\n", DownloadRefusedError, "answered 302"),
        (b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100_000, DownloadFailedError, "broke the connection off"),
    ],
)
async def test_broken_http_is_an_error_of_the_source(answer: bytes, error: type[MMError], text: str) -> None:
    server, url = await raw(answer)
    async with server:
        caught = await refusal(url)
    assert type(caught) is error
    assert text in str(caught)


async def test_silence_ends_the_download(source: Source) -> None:
    for answer in (b"", OK + b"Content-Length: 100\r\n\r\nhello"):
        server, url = await raw(answer, then_wait=True)
        async with server:
            caught = await refusal(url, mm_fetch_timeout_ms=200)
        assert type(caught) is DownloadFailedError
        assert str(caught) == "the source was silent for 0.2 s (MM_FETCH_TIMEOUT_MS)"


async def test_no_connection_is_told_without_the_url() -> None:
    server, url = await raw(b"")
    server.close()
    await server.wait_closed()
    caught = await refusal(url + "?token=secret")
    assert type(caught) is DownloadFailedError
    assert re.fullmatch(r"no connection to 127\.0\.0\.1:\d+: Connection refused", str(caught))


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_a_compressed_body_is_inflated(source: Source, encoding: str, compress: Any) -> None:
    blob = await fetch(source.answers_with("/x", body=compress(BODY), headers={"Content-Encoding": encoding}))
    assert blob.data == BODY
    assert source.requests[0].headers["Accept-Encoding"] == "identity"


async def test_gzip_files_may_follow_one_another(source: Source) -> None:
    members = [gzip.compress(BODY[start : start + 1000]) for start in range(0, len(BODY), 1000)]
    headers = {"Content-Encoding": "gzip"}
    assert (await fetch(source.answers_with("/x", body=b"".join(members), headers=headers))).data == BODY
    padded = b"".join(members) + bytes(512)  # as from a tape
    assert (await fetch(source.answers_with("/y", body=padded, headers=headers))).data == BODY
    most, many = gzip.compress(b"") * 1023 + gzip.compress(BODY), gzip.compress(b"") * 1025
    assert (await fetch(source.answers_with("/most", body=most, headers=headers))).data == BODY
    assert "over 1024 gzip members" in str(await refusal(source.answers_with("/z", body=many, headers=headers)))


async def test_a_gzip_bomb_hits_the_limit(source: Source) -> None:
    bomb = gzip.compress(b"\0" * 50_000_000)
    assert len(bomb) < LIMIT
    caught = await refusal(source.answers_with("/x", body=bomb, headers={"Content-Encoding": "gzip"}))
    assert str(caught) == "65537 bytes or more, over the limit of 65536 (MM_IMAGE_MAX_FILE_SIZE_KB)"


async def test_a_body_is_metered_while_it_is_inflated(source: Source) -> None:
    url = source.answers_with("/x", body=gzip.compress(bytes(50 << 20)), headers={"Content-Encoding": "gzip"})
    sizes = []

    def meter(nbytes: int) -> None:
        sizes.append(nbytes)
        if nbytes > 4 << 20:
            raise QueueFullError("full", 100)

    async with Fetcher(load_settings(**LOOPBACK)) as fetcher:
        with pytest.raises(QueueFullError):
            await fetcher.fetch(MultimodalInput(url, MMUrlType.VIDEO), REMOTE, meter)
    assert max(sizes) < 6 << 20


@pytest.mark.parametrize(
    ("body", "encoding", "error"),
    [
        (gzip.compress(BODY)[:-20], "gzip", DownloadFailedError),
        (BODY, "gzip", WrongFormatError),
        (BODY, "br", DownloadRefusedError),
        (BODY, "gzip, gzip", DownloadRefusedError),
    ],
)
async def test_a_body_that_cannot_be_inflated_is_an_error(
    source: Source, body: bytes, encoding: str, error: type[MMError]
) -> None:
    assert type(await refusal(source.answers_with("/x", body=body, headers={"Content-Encoding": encoding}))) is error


async def test_names_that_hang_keep_no_one_else_waiting(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, is_over = Semaphore(0), Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        asked.release()
        is_over.wait(30)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", hang)
    large = "data:image/png;base64," + base64.b64encode(bytes(1 << 20)).decode()  # decoded in a thread
    async with Fetcher(load_settings(**LOOPBACK)) as fetcher:
        hanging = [
            asyncio.ensure_future(fetcher.fetch(MultimodalInput(f"http://{i}.example/"), REMOTE)) for i in range(40)
        ]
        try:
            await asyncio.sleep(0.1)
            assert asked.acquire(timeout=10)
            async with asyncio.timeout(10):
                assert (await fetcher.fetch(MultimodalInput(large), REMOTE)).nbytes == 1 << 20
        finally:
            is_over.set()
            outcomes = await asyncio.gather(*hanging, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {DownloadFailedError}


async def test_a_name_is_resolved_to_addresses_as_the_system_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = (socket.SOCK_STREAM, 6, "")
    found = [(socket.AF_INET, *stream, ("192.0.2.1", 80)), (socket.AF_INET6, *stream, ("fe80::1", 80, 0, 3))]
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: found)
    resolver = SystemResolver()
    answers = await resolver.resolve("cdn.example", 80)
    await resolver.close()
    assert [(a["hostname"], a["host"], a["port"], a["family"]) for a in answers] == [
        ("cdn.example", "192.0.2.1", 80, socket.AF_INET),
        ("cdn.example", "fe80::1%3", 80, socket.AF_INET6),
    ]


@pytest.mark.parametrize("headers", [{"X": "a\r\nY: b"}, {"": "x"}])
def test_headers_that_http_cannot_carry_stop_the_start(headers: dict[str, str]) -> None:
    with pytest.raises(StartError, match="DOWNLOAD_HEADERS"):
        Fetcher(load_settings(download_headers=headers))
