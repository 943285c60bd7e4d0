"""Downloads over http and https. `_get` is the one place that makes connections; every hop of a redirect passes it."""

from __future__ import annotations

import asyncio
import io
import re
import time
import zlib
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp
from cachetools import TTLCache
from multidict import CIMultiDict
from yarl import URL

from rtp_mm.config import Settings
from rtp_mm.errors import (
    DownloadFailedError,
    DownloadRefusedError,
    MMError,
    NotSupportedError,
    WrongFormatError,
)
from rtp_mm.media.limits import SizeLimit
from rtp_mm.media.redact import redact

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

REDIRECTS = {301, 302, 303, 307, 308}
TRANSIENT = {408, 429}  # the 4xx that asking again may mend
REFUSALS_KEPT = 4096
REFUSAL_TTL_S = 5.0
MAX_CONNECTIONS = 512  # well under the usual 1024 descriptors; who waits for one waits at most the connect timeout

# Compression wins nothing on media and hides their size, so it is not asked for. Both may be overridden.
DEFAULT_HEADERS = {"User-Agent": "rtp_mm", "Accept-Encoding": "identity"}

_WELL_FORMED = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")  # RFC 3986


class HttpSource:
    """A pool of connections. Belongs to the event loop of its first download."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells the age of refusals, in seconds."""
        self._headers = settings.download_headers
        self._timeout_s = settings.mm_fetch_timeout_ms / 1000
        self._max_redirects = settings.mm_max_redirects
        self._refusals: TTLCache[str, str] = TTLCache(REFUSALS_KEPT, REFUSAL_TTL_S, timer=clock)
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes all connections; idempotent."""
        if self._session is not None:
            await self._session.close()

    async def download(self, url: str, limit: SizeLimit) -> bytes:
        """The body behind `url`.

        A refusal is remembered for `REFUSAL_TTL_S`, so that a client that retries does not hammer the source; the URL
        alone is the key, because the headers are the same for all. Raises `DownloadRefusedError` (4xx, too many
        redirects), `DownloadFailedError` (408, 429, 5xx, no connection, silence, an early end), `NotSupportedError`
        (a redirect away from http), `WrongFormatError` (no URL, or a body over the limit).
        """
        if (refusal := self._refusals.get(url)) is not None:
            raise DownloadRefusedError(refusal)
        try:
            return await self._follow(_parse(url), limit)
        except DownloadRefusedError as error:
            self._refusals[url] = str(error)
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise self._failure(error) from None

    async def _follow(self, url: URL, limit: SizeLimit) -> bytes:
        headers = self._headers
        for _ in range(self._max_redirects + 1):
            async with self._get(url, headers) as response:
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    _check_status(response.status)
                    return await _read(response, limit)
                target = _redirect_target(url, response.headers["Location"])
            if target.origin() != url.origin():
                headers = {}  # they may hold secrets, and were meant for the first origin only: not even back to it
            url = target
        raise DownloadRefusedError(f"more than {self._max_redirects} redirects (MM_MAX_REDIRECTS)")

    @asynccontextmanager
    async def _get(self, url: URL, headers: Mapping[str, str]) -> AsyncIterator[aiohttp.ClientResponse]:
        if self._session is None:
            # `connect` covers name, TCP and TLS; `sock_read` is the longest silence, not the whole download.
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=MAX_CONNECTIONS),
                timeout=aiohttp.ClientTimeout(total=None, connect=self._timeout_s, sock_read=self._timeout_s),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        sent = CIMultiDict(DEFAULT_HEADERS)
        sent.update(headers)
        if url.user is not None or url.password is not None:
            sent.popall("Authorization", None)  # the URL's own credentials win
        async with self._session.get(url, headers=sent, allow_redirects=False) as response:
            yield response

    def _failure(self, error: aiohttp.ClientError | TimeoutError | OSError) -> MMError:
        """What to tell the caller: never the exception's own text, which may hold the whole URL."""
        match error:
            case aiohttp.InvalidURL():
                return WrongFormatError("not a URL that can be fetched")
            case aiohttp.ConnectionTimeoutError():
                return DownloadFailedError(f"no connection within {self._timeout_s:g} s (MM_FETCH_TIMEOUT_MS)")
            case TimeoutError():
                return DownloadFailedError(f"the source was silent for {self._timeout_s:g} s (MM_FETCH_TIMEOUT_MS)")
            case aiohttp.ClientConnectorError():
                return DownloadFailedError(
                    f"no connection to {error.host}:{error.port}: {error.strerror or type(error).__name__}"
                )
            case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError() | OSError():
                return DownloadFailedError("the source broke the connection off")
            case _:
                return DownloadFailedError(f"the source does not speak HTTP ({type(error).__name__})")


def _parse(url: str) -> URL:
    """A well-formed URL is sent as it stands (signatures count every byte), any other is quoted first."""
    try:
        parsed = URL(url, encoded=_WELL_FORMED.fullmatch(url) is not None)
        has_host = bool(parsed.host) and parsed.port != 0
    except ValueError:
        has_host = False
    if not has_host:
        raise WrongFormatError("a malformed URL")
    return parsed


def _redirect_target(url: URL, location: str) -> URL:
    try:
        target = url.join(URL(location, encoded=_WELL_FORMED.fullmatch(location) is not None))
        has_host = bool(target.host)
    except ValueError:
        raise DownloadRefusedError("the source redirects to a malformed URL") from None
    if target.scheme not in ("http", "https"):
        raise NotSupportedError(f"the source redirects to {redact(str(target))}; only http and https are followed")
    if not has_host:
        raise DownloadRefusedError("the source redirects to a malformed URL")
    return target


def _check_status(status: int) -> None:
    if 200 <= status < 300:
        return
    if status in TRANSIENT or status >= 500:
        raise DownloadFailedError(f"the source answered {status}")
    raise DownloadRefusedError(f"the source answered {status}")


async def _read(response: aiohttp.ClientResponse, limit: SizeLimit) -> bytes:
    """The body, decompressed. Content-Length is believed only to refuse early."""
    limit.check(response.content_length or 0)
    body = io.BytesIO()
    async for chunk in response.content.iter_any():
        limit.check(body.tell() + len(chunk))
        body.write(chunk)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding == "identity":
        return body.getvalue()
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise DownloadRefusedError(
            f"the source answered in Content-Encoding {encoding[:20]!r}, which it was not asked for"
        )
    return await asyncio.to_thread(_inflate, body.getvalue(), limit)


def _inflate(data: bytes, limit: SizeLimit) -> bytes:
    inflater = zlib.decompressobj(wbits=zlib.MAX_WBITS | 32)  # gzip or zlib, told from the header
    try:
        inflated = inflater.decompress(data, limit.nbytes + 1)
    except zlib.error:
        raise WrongFormatError("the body is not what its Content-Encoding says") from None
    limit.check(len(inflated))
    if not inflater.eof:
        raise DownloadFailedError("the compressed body ends early")
    return inflated
