"""Downloads that are kept: used while good, asked after when not, and never where a source forbids it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web
from blake3 import blake3
from fetching import REMOTE
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.errors import DownloadFailedError, DownloadRefusedError, WrongFormatError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.freshness import ResponseHead, lifetime_s
from rtp_mm.types import Blob, MMUrlType, MultimodalInput

BODY = bytes(range(256)) * 100
TTL_S = 60.0


class Client:
    """A fetcher on a clock that a test turns."""

    def __init__(self, source: Source, **options: Any) -> None:
        self.now = 1000.0
        self._source = source
        settings = load_settings(mm_allow_private_network=True, mm_fetch_retries=0, **options)
        self.fetcher = Fetcher(settings, clock=lambda: self.now)

    async def fetch(self, url: str, mm_type: MMUrlType = MMUrlType.IMAGE) -> Blob:
        return await self.fetcher.fetch(MultimodalInput(url, mm_type), REMOTE)

    async def asked(self, url: str) -> int:
        """Requests that one fetch costs the source."""
        before = len(self._source.requests)
        await self.fetch(url)
        return len(self._source.requests) - before

    @property
    def hits_and_misses(self) -> tuple[int, int]:
        stats = self.fetcher.cache_stats()
        return stats.hits, stats.misses


@asynccontextmanager
async def client(source: Source, **options: Any) -> AsyncIterator[Client]:
    client = Client(source, **options)
    async with client.fetcher:
        yield client


DATE = datetime(2026, 3, 4, 5, 6, 7, tzinfo=UTC)


def date(seconds: float = 0) -> str:
    return format_datetime(DATE + timedelta(seconds=seconds), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "lifetime"),
    [
        ({}, TTL_S),
        ({"Cache-Control": ""}, TTL_S),
        ({"Cache-Control": "public, , immutable"}, TTL_S),
        ({"Cache-Control": "max-age=300"}, 300),
        ({"Cache-Control": "private, MAX-AGE=300"}, 300),  # private to this server, who is one client
        ({"Cache-Control": 'max-age="300"'}, 300),
        ({"Cache-Control": "max-age=300, max-age=20"}, 20),
        ({"Cache-Control": "max-age=9, max-age=10"}, 9),
        ({"Cache-Control": "max-age=300, s-maxage=5"}, 300),  # s-maxage is for caches that serve many clients
        ({"Cache-Control": "max-age=300", "Age": "100"}, 200),
        ({"Cache-Control": "max-age=300", "Age": "400"}, 0),
        ({"Cache-Control": "max-age=300", "Age": "soon"}, 300),
        ({"Cache-Control": "max-age=0"}, 0),
        ({"Cache-Control": "max-age=-1"}, 0),
        ({"Cache-Control": "max-age=1.5"}, 0),
        ({"Cache-Control": "max-age"}, 0),
        ({"Cache-Control": "max-age=" + "9" * 4000}, 9999999999),
        ({"Cache-Control": "no-cache, max-age=300"}, 0),
        ({"Cache-Control": 'no-cache="Set-Cookie", max-age=300'}, 0),
        ({"Cache-Control": "no-store, max-age=300"}, None),
        ({"Cache-Control": "max-age=300; no-store"}, None),  # malformed: nobody knows what was meant
        ({"Cache-Control": "max-age=300\n"}, None),
        ({"Cache-Control": "a," + " " * 1_000_000 + ";"}, None),  # read in one pass
        ({"Cache-Control": 'ext="no-store, max-age=5", max-age=300'}, 300),
        ({"Cache-Control": "max-age=300" + "," * 4085}, 300),
        ({"Cache-Control": "max-age=300" + "," * 4086}, None),  # more than anybody means
        ({"Vary": "Accept, User-Agent"}, TTL_S),
        ({"Vary": "*"}, None),
        ({"Vary": "Accept, *", "Cache-Control": "max-age=300"}, None),
        ({"Expires": date(120), "Date": date()}, 120),
        ({"Expires": date(120), "Date": date(), "Cache-Control": "max-age=300"}, 300),
        ({"Expires": date(120), "Date": date(), "Age": "20"}, 100),
        ({"Expires": date(-5), "Date": date()}, 0),
        ({"Expires": "0", "Date": date()}, 0),
        ({"Expires": "Mon, 12 Jan 2026 99999999999999999999:00:00 GMT", "Date": date()}, 0),
        ({"Expires": date(120)}, 0),  # by no clock but the source's
        ({"Expires": "Wed, 04 Mar 2026 05:06:07 -0000", "Date": date()}, 0),
    ],
    ids=str,
)
def test_a_download_is_good_for_as_long_as_its_source_says(headers: dict[str, str], lifetime: float | None) -> None:
    assert lifetime_s([ResponseHead("http://h/x", 200, headers)], TTL_S) == lifetime


async def test_headers_that_are_kept_count(source: Source) -> None:
    url = source.answers_with("/x", body=BODY, headers={"ETag": '"' + "e" * 7000 + '"'})
    async with client(source) as c:
        await c.fetch(url)
        assert 7000 < c.fetcher.cache_stats().used_bytes - len(BODY) < 11000
        await c.fetch(url + "?" + "\N{GRINNING FACE}" + "a" * 3000)  # four bytes a character
        assert c.fetcher.cache_stats().used_bytes - 2 * len(BODY) > 2 * 7000 + 12000


def test_the_shortest_lived_answer_on_the_way_counts() -> None:
    def hop(status: int, cache_control: str) -> ResponseHead:
        return ResponseHead("http://h/x", status, {"Cache-Control": cache_control} if cache_control else {})

    assert lifetime_s([hop(301, "max-age=9000"), hop(200, "max-age=300")], TTL_S) == 300
    assert lifetime_s([hop(302, "max-age=10"), hop(200, "max-age=300")], TTL_S) == 10
    assert lifetime_s([hop(302, ""), hop(200, "max-age=300")], TTL_S) == TTL_S
    assert lifetime_s([hop(302, "no-store"), hop(200, "max-age=300")], TTL_S) is None
    assert lifetime_s([hop(206, "max-age=300")], TTL_S) is None  # a part


async def test_a_fresh_download_costs_its_source_nothing(source: Source) -> None:
    url = source.answers_with("/x", body=BODY, headers={"Cache-Control": "max-age=300"})
    async with client(source) as c:
        first = await c.fetch(url)
        c.now += 299.9
        assert await c.fetch(url) is first  # hash and all
        assert first == Blob(BODY, blake3(BODY).digest(), url)
        assert c.hits_and_misses == (1, 1)
        c.now += 0.1
        assert await c.asked(url) == 1
        assert c.hits_and_misses == (1, 2)


async def test_a_source_that_says_nothing_is_asked_again_after_the_ttl(source: Source) -> None:
    url = source.answers_with("/x", body=BODY)
    async with client(source, mm_bytes_cache_ttl_s=7) as c:
        assert [await c.asked(url), await c.asked(url)] == [1, 0]
        c.now += 7
        assert await c.asked(url) == 1
    async with client(source, mm_bytes_cache_ttl_s=0) as c:
        assert [await c.asked(url), await c.asked(url)] == [1, 1]
        assert c.fetcher.cache_stats().items == 0


@pytest.mark.parametrize("cache_control", ["no-store", "no-store, max-age=300", "max-age=0"])
async def test_what_may_not_be_kept_or_never_used_is_not_kept(source: Source, cache_control: str) -> None:
    url = source.answers_with("/x", body=BODY, headers={"Cache-Control": cache_control})
    async with client(source) as c:
        assert [await c.asked(url), await c.asked(url)] == [1, 1]
        assert c.fetcher.cache_stats().items == 0


def changing(source: Source, path: str, **headers: str) -> tuple[str, dict[str, Any]]:
    """A URL whose `etag` and `body` a test changes, and that answers 304 to who knows the tag."""
    state: dict[str, Any] = {"etag": '"1"', "body": BODY, "headers": headers}

    async def answer(request: web.Request) -> web.StreamResponse:
        sent = {"ETag": state["etag"], **state["headers"]}
        if request.headers.get("If-None-Match") == state["etag"]:
            return web.Response(status=304, headers=sent)
        return web.Response(body=state["body"], headers=sent)

    return source.answers_by(path, answer), state


async def test_a_stale_download_comes_again_only_if_it_changed(source: Source) -> None:
    url, state = changing(source, "/x", **{"Cache-Control": "max-age=10"})
    async with client(source) as c:
        first = await c.fetch(url)
        c.now += 10
        assert await c.fetch(url) is first
        assert source.requests[-1].headers["If-None-Match"] == '"1"'
        assert c.hits_and_misses == (1, 1)
        assert await c.asked(url) == 0  # the 304 made it fresh again
        c.now += 10
        state.update(etag='"2"', body=b"changed")
        assert (await c.fetch(url)).data == b"changed"
        assert c.hits_and_misses == (2, 2)
        c.now += 10
        await c.fetch(url)
        assert source.requests[-1].headers["If-None-Match"] == '"2"'


async def test_a_tag_that_no_header_may_carry_is_not_sent(source: Source) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.write(b'HTTP/1.1 200 OK\r\nETag: "\x01"\r\nContent-Length: 4\r\n\r\nbody')
        request.transport.close()
        return web.Response()

    url = source.answers_by("/x", answer)
    async with client(source) as fetches:
        await fetches.fetch(url)
        fetches.now += TTL_S
        assert await fetches.asked(url) == 1
    assert "If-None-Match" not in source.requests[-1].headers


async def test_no_cache_asks_every_time(source: Source) -> None:
    url, _ = changing(source, "/x", **{"Cache-Control": "no-cache"})
    async with client(source) as c:
        first = await c.fetch(url)
        assert await c.fetch(url) is first
        assert [await c.asked(url), await c.asked(url)] == [1, 1]
        assert c.hits_and_misses == (3, 1)


async def test_last_modified_will_do_to_ask_by(source: Source) -> None:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.headers.get("If-Modified-Since") == date():
            return web.Response(status=304)
        return web.Response(body=BODY, headers={"Last-Modified": date()})

    url = source.answers_by("/x", answer)
    async with client(source) as c:
        first = await c.fetch(url)
        c.now += TTL_S
        assert await c.fetch(url) is first


async def test_a_304_may_change_how_long_it_is_good(source: Source) -> None:
    url, state = changing(source, "/x", **{"Cache-Control": "max-age=10", "Age": "9"})
    async with client(source) as c:
        await c.fetch(url)
        c.now += 1
        state["headers"] = {}  # says nothing: what was said stands, but for the age it came with
        assert [await c.asked(url), await c.asked(url)] == [1, 0]
        c.now += 10
        state["headers"] = {"Cache-Control": "no-store"}
        assert [await c.asked(url), await c.asked(url)] == [1, 1]
        assert c.fetcher.cache_stats().items == 0


async def test_conditions_go_only_to_the_source_that_set_them(source: Source) -> None:
    changing(source, "/end")
    source.redirects("/start", "/end")
    async with client(source) as c:
        first = await c.fetch(source.url + "/start")
        c.now += TTL_S
        assert await c.fetch(source.url + "/start") is first
        source.answers_with("/elsewhere", body=b"elsewhere")
        source.redirects("/start", "/elsewhere")
        c.now += TTL_S
        assert (await c.fetch(source.url + "/start")).data == b"elsewhere"
    asked = [(request.path, request.headers.get("If-None-Match")) for request in source.requests]
    assert asked == [
        ("/start", None), ("/end", None), ("/start", None), ("/end", '"1"'), ("/start", None), ("/elsewhere", None)
    ]  # fmt: skip


async def test_a_304_that_nobody_asked_for_is_a_refusal(source: Source) -> None:
    url = source.answers_with("/x", status=304)
    async with client(source) as c:
        with pytest.raises(DownloadRefusedError, match="the source answered 304"):
            await c.fetch(url)


async def test_what_is_gone_is_forgotten_and_what_fails_for_now_is_not(source: Source) -> None:
    url, _ = changing(source, "/x")
    changes = source.answers["/x"]
    async with client(source) as c:
        first = await c.fetch(url)
        c.now += TTL_S
        source.answers_with("/x", status=503)
        with pytest.raises(DownloadFailedError):  # never stale
            await c.fetch(url)
        source.answers["/x"] = changes
        assert await c.fetch(url) is first
        c.now += TTL_S
        source.answers_with("/x", status=404)
        with pytest.raises(DownloadRefusedError):
            await c.fetch(url)
        assert c.fetcher.cache_stats().items == 0


async def test_the_least_recently_used_goes_first(source: Source) -> None:
    urls = [source.answers_with(f"/{i}", body=bytes(300_000)) for i in range(4)]
    async with client(source, mm_bytes_cache_mb=1) as c:  # holds three
        for url in urls[:3]:
            await c.fetch(url)
        assert await c.asked(urls[0]) == 0
        await c.fetch(urls[3])
        stats = c.fetcher.cache_stats()
        assert (stats.items, stats.evictions, stats.budget_bytes) == (3, 1, 1 << 20)
        assert 900_000 < stats.used_bytes <= 1 << 20
        assert [await c.asked(url) for url in urls[2:]] == [0, 0]
        assert await c.asked(urls[0]) == 0
        assert await c.asked(urls[1]) == 1


async def test_what_exceeds_the_budget_is_served_and_not_kept(source: Source) -> None:
    small = source.answers_with("/small", body=BODY)
    large = source.answers_with("/large", body=bytes((1 << 20) + 1))
    async with client(source, mm_bytes_cache_mb=1) as c:
        await c.fetch(small)
        assert [await c.asked(large), await c.asked(large)] == [1, 1]
        assert await c.asked(small) == 0
    async with client(source, mm_bytes_cache_mb=0) as c:
        assert [await c.asked(small), await c.asked(small)] == [1, 1]
        assert c.fetcher.cache_stats().budget_bytes == 0


async def test_a_kept_download_meets_the_limit_of_who_asks(source: Source) -> None:
    url = source.answers_with("/x", body=bytes(5000))
    async with client(source, mm_image_max_file_size_kb=4) as c:
        await c.fetch(url, MMUrlType.VIDEO)
        with pytest.raises(WrongFormatError, match="MM_IMAGE_MAX_FILE_SIZE_KB"):
            await c.fetch(url, MMUrlType.IMAGE)


async def test_a_kept_download_that_does_not_say_what_it_is_meets_the_limit_of_what_it_is(source: Source) -> None:
    image = source.answers_with("/image", body=b"GIF89a" + bytes(5000))
    clip = source.answers_with("/clip", body=b"\x1a\x45\xdf\xa3" + bytes(5000))
    async with client(source, mm_image_max_file_size_kb=4, mm_video_max_file_size_kb=8) as c:
        for url in (image, clip):
            await c.fetch(url, MMUrlType.VIDEO)
        assert c.fetcher.at_hand(MultimodalInput(clip)) is not None
        with pytest.raises(WrongFormatError, match="MM_IMAGE_MAX_FILE_SIZE_KB"):
            c.fetcher.at_hand(MultimodalInput(image))


async def test_urls_that_differ_in_a_byte_are_two(source: Source) -> None:
    url = source.answers_with("/x", body=BODY)
    async with client(source) as c:
        assert [await c.asked(url + "?a=1"), await c.asked(url + "?a=2"), await c.asked(url + "?a=1")] == [1, 1, 0]


async def test_an_empty_answer_is_not_kept(source: Source) -> None:
    url = source.answers_with("/x", body=b"")
    async with client(source) as c:
        for _ in range(2):
            with pytest.raises(WrongFormatError, match="the source is empty"):
                await c.fetch(url)
    assert len(source.requests) == 2
