"""Downloads over http and https. `_get` is the one place that makes connections; every hop of a redirect passes it, and
there the host is checked. `addresses.py` says which hosts and addresses pass.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import socket
import time
import unicodedata
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

import aiohttp
from aiohttp.abc import AbstractResolver
from blake3 import blake3
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
from rtp_mm.media.addresses import CheckedResolver, Destinations, SystemResolver
from rtp_mm.media.freshness import ResponseHead
from rtp_mm.media.http_body import read_body
from rtp_mm.media.http_connection import bound
from rtp_mm.media.limits import PixelLimit, SizeLimit
from rtp_mm.media.redact import redact

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

REDIRECTS = {301, 302, 303, 307, 308}
TRANSIENT = {408, 429}  # the 4xx that asking again may mend
REFUSALS_KEPT = 4096
REFUSAL_TTL_S = 5.0
BACKOFF_S = 0.25  # before the second try, doubled for each further one, times 0.5 to 1.5 at random
RETRY_AFTER_MAX_S = 10.0  # a source that asks for more is not asked again
MAX_CONNECTIONS = 512  # well under the usual 1024 descriptors; who waits for one waits at most the connect timeout
MAX_CONNECTIONS_A_HOST = 384  # so that one that has become slow leaves some for the others

# Compression wins nothing on media and hides their size, so it is not asked for. Both may be overridden.
DEFAULT_HEADERS = {"User-Agent": "rtp_mm", "Accept-Encoding": "identity"}

LONGEST_NAME = 253  # characters of a host, as DNS has it
LONGEST_HOST = 100  # characters of a host, its user and port, where these are not ASCII
_AUTHORITY = re.compile(r"(?<=//)[^/?#]*")
_DROPPED = dict.fromkeys(map(ord, "\t\r\n"))  # yarl takes a URL without these
_WELL_FORMED = re.compile(r"[A-Za-z0-9\-._~:/?#\[\]@!$&'()*+,;=%]+")  # RFC 3986


class _UnavailableError(Exception):
    """The source answered 408, 429 or 5xx, and asks not to be asked again for `retry_after_s`."""

    def __init__(self, status: int, retry_after_s: float) -> None:
        super().__init__(status)
        self.status = status
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class Download:
    """What a URL led to. `body` is `None` where the source says that it has not changed.

    heads: of the sources on the way, redirects first.
    """

    body: bytes | None
    heads: tuple[ResponseHead, ...]


class HttpSource:
    """A pool of connections. Belongs to the event loop of its first download."""

    def __init__(
        self,
        settings: Settings,
        clock: Callable[[], float] = time.monotonic,
        *,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        resolver: Callable[[], AbstractResolver] = SystemResolver,
        connector: Callable[..., aiohttp.BaseConnector] = aiohttp.TCPConnector,
    ) -> None:
        """`clock` tells the age of refusals, `sleep` waits before another try, both in seconds; the resolver and the
        connector are made on the event loop.
        """
        self._headers = settings.download_headers
        self._timeout_s = settings.mm_fetch_timeout_ms / 1000
        self._max_redirects = settings.mm_max_redirects
        self._retries = settings.mm_fetch_retries
        self._proxy = settings.mm_fetch_proxy
        self._destinations = Destinations(settings)
        self._refusals: TTLCache[bytes, str] = TTLCache(REFUSALS_KEPT, REFUSAL_TTL_S, timer=clock)
        self._sleep = sleep
        self._make_resolver = resolver
        self._make_connector = connector
        self._resolver: AbstractResolver | None = None
        self._session: aiohttp.ClientSession | None = None

    async def close(self) -> None:
        """Closes all connections; idempotent."""
        if self._session is not None:
            await self._session.close()
        if self._resolver is not None:
            await self._resolver.close()

    async def download(
        self, url: str, limit: SizeLimit, pixels: PixelLimit | None = None, known: ResponseHead | None = None
    ) -> Download:
        """The body behind `url`, as far as `limit` and, if given, `pixels` let it come; no body if it has not changed
        since the source answered `known`.

        A passing failure is tried again, `MM_FETCH_RETRIES` times. A refusal is remembered for `REFUSAL_TTL_S`, so that
        a client that retries does not hammer the source; the URL alone is the key, because the headers are the same
        for all. Raises `DownloadRefusedError` (4xx, too many redirects), `DownloadFailedError` (408, 429, 5xx, no
        connection, silence, an early end), `NotSupportedError` (a host or address that is not allowed, a redirect away
        from http), `WrongFormatError` (no URL, or a body over a limit).
        """
        key = blake3(url.encode(errors="surrogatepass")).digest()
        if (refusal := self._refusals.get(key)) is not None:
            raise DownloadRefusedError(refusal)
        target = _parse(url)
        tries = 0
        while True:
            try:
                return await self._follow(target, limit, pixels, known)
            except DownloadRefusedError as error:
                self._refusals[key] = str(error)
                raise
            except (_UnavailableError, aiohttp.ClientError, TimeoutError, OSError) as error:
                pause_s = _pause_s(error, tries) if tries < self._retries else None
                if pause_s is None:
                    raise self._failure(error) from None
            except ValueError:  # of a user, or a zone, that no request can carry; certificate errors are some, too
                raise WrongFormatError("not a URL that can be fetched") from None
            await self._sleep(pause_s)
            tries += 1

    async def _follow(
        self, url: URL, limit: SizeLimit, pixels: PixelLimit | None, known: ResponseHead | None
    ) -> Download:
        headers = self._headers
        heads: list[ResponseHead] = []
        for _ in range(self._max_redirects + 1):
            conditions = known.conditions if known is not None and known.url == str(url) else {}
            async with self._get(url, headers, conditions) as response:
                heads.append(ResponseHead.of(str(url), response.status, response.headers))
                if known is not None and conditions and response.status == HTTPStatus.NOT_MODIFIED:
                    return Download(None, (*heads[:-1], known.confirmed_by(heads[-1])))
                if response.status not in REDIRECTS or "Location" not in response.headers:
                    _check_status(response)
                    return Download(await read_body(response, limit, pixels), tuple(heads))
                target = _redirect_target(url, response.headers["Location"])
            if target.origin() != url.origin():
                headers = {}  # they may hold secrets, and were meant for the first origin only: not even back to it
            url = target
        raise DownloadRefusedError(f"more than {self._max_redirects} redirects (MM_MAX_REDIRECTS)")

    def _get(
        self, url: URL, headers: Mapping[str, str], conditions: Mapping[str, str]
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        self._destinations.check(url.raw_host or "")
        if self._session is None:
            self._session = self._open()
        sent = CIMultiDict(DEFAULT_HEADERS)
        sent.update(headers)
        sent.update(conditions)
        if url.user is not None or url.password is not None:
            sent.popall("Authorization", None)  # the URL's own credentials win
        return self._session.get(url, headers=sent, allow_redirects=False, proxy=self._proxy)

    def _open(self) -> aiohttp.ClientSession:
        self._resolver = self._make_resolver()
        if self._proxy is None:  # else all that is resolved here is the proxy, wherever that may be
            self._resolver = CheckedResolver(self._resolver, self._destinations)
        # `connect` covers name, TCP and TLS; `sock_read` is the longest silence, not the whole download.
        return aiohttp.ClientSession(
            connector=bound(
                self._make_connector(
                    limit=MAX_CONNECTIONS, limit_per_host=MAX_CONNECTIONS_A_HOST, resolver=self._resolver
                )
            ),
            timeout=aiohttp.ClientTimeout(total=None, connect=self._timeout_s, sock_read=self._timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    def _failure(self, error: _UnavailableError | aiohttp.ClientError | TimeoutError | OSError) -> MMError:
        """What to tell the caller: never the exception's own text, which may hold the whole URL."""
        match error:
            case _UnavailableError():
                return DownloadFailedError(f"the source answered {error.status}")
            case aiohttp.InvalidURL():
                return WrongFormatError("not a URL that can be fetched")
            case aiohttp.ConnectionTimeoutError():
                return DownloadFailedError(f"no connection within {self._timeout_s:g} s (MM_FETCH_TIMEOUT_MS)")
            case TimeoutError():
                return DownloadFailedError(f"the source was silent for {self._timeout_s:g} s (MM_FETCH_TIMEOUT_MS)")
            case aiohttp.ClientHttpProxyError():
                return DownloadFailedError(f"the proxy answered {error.status} (MM_FETCH_PROXY)")
            case aiohttp.ClientProxyConnectionError() | aiohttp.ClientConnectorDNSError() if self._proxy is not None:
                return DownloadFailedError("no connection to the proxy (MM_FETCH_PROXY)")
            case aiohttp.ClientConnectorError():
                return DownloadFailedError(f"no connection to {error.host}:{error.port}: {_reason(error)}")
            case aiohttp.ClientPayloadError() | aiohttp.ServerDisconnectedError() | OSError():
                return DownloadFailedError("the source broke the connection off")
            case _:
                return DownloadFailedError(f"the source does not speak HTTP ({type(error).__name__})")


def _pause_s(error: Exception, tries: int) -> float | None:
    """Seconds to wait before asking again after `tries` tries more than the first; `None`: asking again is no use.

    Tried again is only what failed before the body began, and failed fast: waiting out another silence would cost the
    caller's deadline.
    """
    backoff_s = BACKOFF_S * 2.0**tries * random.uniform(0.5, 1.5)
    match error:
        case _UnavailableError():
            return max(backoff_s, error.retry_after_s) if error.retry_after_s <= RETRY_AFTER_MAX_S else None
        case TimeoutError() | aiohttp.ClientSSLError():
            return None
        case aiohttp.ClientConnectorDNSError():
            return backoff_s if error.errno == socket.EAI_AGAIN else None
        case aiohttp.ClientConnectionError():  # refused, or broken off before the answer
            return backoff_s
        case _:
            return None


def _retry_after_s(value: str) -> float:
    """A Retry-After header, seconds or a date (RFC 9110), as seconds from now; 0 for what is neither."""
    if value.isdecimal():
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _reason(error: aiohttp.ClientConnectorError) -> str:
    """Why there is no connection, without the address that a name stands for, which asyncio puts into its text."""
    if isinstance(error, aiohttp.ClientSSLError) or not error.errno or error.errno < 0:  # not the system's numbers
        return error.strerror or type(error).__name__
    return os.strerror(error.errno)


def _parse(url: str) -> URL:
    """Raises `WrongFormatError`."""
    try:
        return _complete(_url(url))
    except ValueError:
        raise WrongFormatError("a malformed URL") from None


def _redirect_target(url: URL, location: str) -> URL:
    try:
        target = url.join(_url(location))
        if target.scheme in ("http", "https"):
            return _complete(target)
    except ValueError:
        raise DownloadRefusedError("the source redirects to a malformed URL") from None
    raise NotSupportedError(f"the source redirects to {redact(str(target))}; only http and https are followed")


def _url(text: str) -> URL:
    """Well-formed text as it stands (signatures count every byte), any other quoted. Raises `ValueError`, also for a
    host of other letters than ASCII's that is long: to encode it would hold up the event loop.
    """
    if _WELL_FORMED.fullmatch(text) is not None:
        return URL(text, encoded=True)
    authority = _AUTHORITY.search(text.translate(_DROPPED))
    host = authority[0] if authority is not None else ""
    if not host.isascii() and (len(host) > LONGEST_HOST or len(unicodedata.normalize("NFKC", host)) > LONGEST_HOST):
        raise ValueError
    return URL(text)


def _complete(url: URL) -> URL:
    """Raises `ValueError` for one that names no host, or no port that there is."""
    if not url.raw_host or len(url.raw_host) > LONGEST_NAME or url.port == 0:  # `host` would decode an xn-- name
        raise ValueError
    return url


def _check_status(response: aiohttp.ClientResponse) -> None:
    if 200 <= response.status < 300:
        return
    if response.status in TRANSIENT or response.status >= 500:
        raise _UnavailableError(response.status, _retry_after_s(response.headers.get("Retry-After", "")))
    raise DownloadRefusedError(f"the source answered {response.status}")
