"""Where a download is led, and what of a caller or a server goes along."""

from __future__ import annotations

from collections.abc import AsyncIterator
from functools import partial

import fetching
import pytest
import pytest_asyncio
from fetching import LOOPBACK, REMOTE
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.errors import DownloadRefusedError, NotSupportedError, WrongFormatError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.types import MultimodalInput

BODY = bytes(range(256)) * 100
fetch = partial(fetching.fetch, **LOOPBACK)
refusal = partial(fetching.refusal, **LOOPBACK)


@pytest_asyncio.fixture
async def other_origin() -> AsyncIterator[Source]:
    async with Source.serving() as source:
        yield source


async def test_redirects_are_followed_to_the_limit_and_no_further(source: Source) -> None:
    source.answers_with("/end", body=BODY)
    source.redirects("/1", "2?a=b", 301)  # relative
    source.redirects("/2", f"{source.url}/3", 303)
    source.redirects("/3", "/end", 308)
    assert (await fetch(source.url + "/1", mm_max_redirects=3)).data == BODY
    caught = await refusal(source.url + "/1", mm_max_redirects=2)
    assert type(caught) is DownloadRefusedError
    assert str(caught) == "more than 2 redirects (MM_MAX_REDIRECTS)"
    assert (await fetch(source.url + "/end", mm_max_redirects=0)).data == BODY


async def test_a_redirect_loop_ends(source: Source) -> None:
    caught = await refusal(source.redirects("/loop", "/loop"), mm_max_redirects=5)
    assert type(caught) is DownloadRefusedError
    assert len(source.requests) == 6


@pytest.mark.parametrize("location", ["file:///etc/passwd", "data:image/png;base64,AAAA", "ftp://h/x", "gopher://h/"])
async def test_a_redirect_away_from_http_is_refused(source: Source, location: str) -> None:
    caught = await refusal(source.redirects("/x", location))
    assert type(caught) is NotSupportedError
    assert "only http and https are followed" in str(caught)


# Slow to encode, by what yarl takes for a host.
LONG_NAMES = [
    *("http://" + "\ufdfa" * 16000, "http://\t" + "\ufdfa" * 16000, "http://" + "ä" * 101 + "/x"),
    *("http://" + "xn--80a." * 40 + "de/", "http://" + "a." * 127 + "com/"),
]


@pytest.mark.parametrize(
    "location", ["http://", "http://[::1", "//", "http://h:99999/", "http://h:0", "//" + "ä" * 101]
)
async def test_a_redirect_to_nowhere_is_refused(source: Source, location: str) -> None:
    assert type(await refusal(source.redirects("/x", location))) is DownloadRefusedError


@pytest.mark.parametrize("user", ["%E4%B8%AD:x", "a%3Ab"])
async def test_a_user_that_no_request_can_name_is_refused(user: str) -> None:
    assert type(await refusal(f"http://{user}@127.0.0.1:9/")) is WrongFormatError


@pytest.mark.parametrize(
    "url", ["http://", "http:///x", "http://[::1", "http://h:port/", "http://h:99999/", "http://?", *LONG_NAMES]
)
async def test_a_malformed_url_is_refused(url: str) -> None:
    caught = await refusal(url)
    assert type(caught) is WrongFormatError


async def test_download_headers_never_reach_another_origin(source: Source, other_origin: Source) -> None:
    headers = {"Authorization": "Bearer secret", "X-Token": "secret", "user-agent": "browser"}
    other_origin.redirects("/away", f"{source.url}/back")
    source.answers_with("/back", body=BODY)
    source.redirects("/near", "/far")
    source.redirects("/far", f"{other_origin.url}/away")
    await fetch(source.url + "/near", download_headers=headers)

    asked = {request.path: request.headers for request in source.requests + other_origin.requests}
    assert list(asked) == ["/near", "/far", "/back", "/away"]
    for path in ("/near", "/far"):
        assert asked[path]["X-Token"] == "secret"
        assert asked[path].getall("User-Agent") == ["browser"]
    for path in ("/away", "/back"):  # not even on the way back: the other origin chose where
        assert "secret" not in str(asked[path])
        assert asked[path]["User-Agent"] == "rtp_mm"


async def test_credentials_in_the_url_are_sent_and_not_shown(source: Source) -> None:
    url = source.answers_with("/x", body=BODY).replace("http://", "http://user:secret@")
    blob = await fetch(url, download_headers={"authorization": "Bearer other"})
    assert source.requests[0].headers.getall("Authorization") == ["Basic dXNlcjpzZWNyZXQ="]
    assert "secret" not in blob.source


async def test_cookies_do_not_travel_between_items(source: Source) -> None:
    source.answers_with("/set", body=BODY, headers={"Set-Cookie": "session=secret; Path=/"})
    source.answers_with("/get", body=BODY)
    async with Fetcher(load_settings(**LOOPBACK)) as fetcher:
        for path in ("/set", "/get"):
            url = source.url.replace("127.0.0.1", "localhost") + path  # cookie jars leave out numeric hosts
            await fetcher.fetch(MultimodalInput(url), REMOTE)
    assert "Cookie" not in source.requests[1].headers


async def test_the_environments_proxy_is_not_used(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert (await fetch(source.answers_with("/x", body=BODY))).data == BODY
