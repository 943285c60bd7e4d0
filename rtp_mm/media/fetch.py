"""Fetch: an item of a request goes in, its bytes (or its array) come out, with their content hash.

Access comes first and costs no I/O, so that caches can stand between it and the fetch. Where a local file's path leads
is looked at when it is read: no cache knows a file by its path.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from typing import Any, Self, TypeVar

import numpy as np
from blake3 import blake3

from rtp_mm.config import Settings
from rtp_mm.errors import DownloadRefusedError, NotSupportedError, WrongFormatError
from rtp_mm.media.array import as_array
from rtp_mm.media.data_url import DataUrl
from rtp_mm.media.download_cache import DownloadCache
from rtp_mm.media.filesystems import Filesystems
from rtp_mm.media.freshness import ResponseHead
from rtp_mm.media.http import Download, HttpSource
from rtp_mm.media.limits import START_BYTES, PixelLimit, SizeLimit
from rtp_mm.media.local import LocalFiles, local_path
from rtp_mm.media.redact import redact
from rtp_mm.media.urls import MAX_URL_CHARACTERS, scheme_of
from rtp_mm.types import Blob, CacheStats, Caller, MMUrlType, MultimodalInput

T = TypeVar("T")
FILES_AT_ONCE = (
    16  # local ones, in threads apart from all others: those that a mount leaves hanging are lost for a while
)

_ESCAPED_WORK = 32  # times as long as without escapes
_SMALL = 1 << 18  # bytes hashed or decoded in less time (0.1 ms) than a thread takes to answer under load


class Fetcher:
    """Fetches items; one per event loop."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells the age of remembered refusals and downloads, in seconds."""
        self._settings = settings
        self._limits = {mm_type: SizeLimit.of(settings, mm_type) for mm_type in MMUrlType}
        self._clock = clock
        self._cache = DownloadCache(settings.mm_bytes_cache_mb << 20, settings.mm_bytes_cache_ttl_s, clock)
        self._http = HttpSource(settings, clock)
        self._filesystems = Filesystems(settings)
        self._files = LocalFiles(settings)
        self._file_threads = ThreadPoolExecutor(FILES_AT_ONCE, "rtp_mm-files")
        self.fetched_bytes = 0  # of downloads and local files

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections; idempotent."""
        self._filesystems.close()
        self._file_threads.shutdown(wait=False, cancel_futures=True)
        await self._http.close()

    def check_access(self, item: MultimodalInput, caller: Caller) -> None:
        """Raises `NotSupportedError` if this caller may not have this item, `WrongFormatError` for what nobody can ask
        for. Fetches nothing.
        """
        if item.mm_type is MMUrlType.IGRAPH:
            raise NotSupportedError("IGRAPH items are not supported")
        if item.mm_type is MMUrlType.TENSOR:
            return
        scheme = scheme_of(item.url)
        if scheme != "data" and len(item.url) > MAX_URL_CHARACTERS:
            raise WrongFormatError(f"a URL of {len(item.url)} characters, over the limit of {MAX_URL_CHARACTERS}")
        match scheme:
            case "http" | "https" | "data":
                return
            case "file" | "":
                self._files.check(item.url, caller)
            case _:
                self._filesystems.check(scheme, item.url)

    async def check_path(self, item: MultimodalInput) -> None:
        """Of a local file that something else than `fetch` will open: raises `NotSupportedError` if nobody may read it.
        `check_access` comes first.
        """
        if item.mm_type is not MMUrlType.TENSOR and scheme_of(item.url) in ("file", ""):
            await self._from_disk(self._files.check_path, local_path(item.url))

    def at_hand(self, item: MultimodalInput) -> Blob | None:
        """The bytes of a download that is still good, for a caller whose access was checked. Raises
        `WrongFormatError` for one over the limit of this item's type.
        """
        if item.mm_type is MMUrlType.TENSOR or scheme_of(item.url) in ("data", "file", ""):
            return None
        if (blob := self._cache.fresh(item.url)) is not None:
            _check_kept(blob, self.limit(item))
        return blob

    def limit(self, item: MultimodalInput) -> SizeLimit:
        """How large the item's file may be."""
        return self._limits[item.mm_type]

    async def fetch(self, item: MultimodalInput, caller: Caller, meter: Callable[[int], None] | None = None) -> Blob:
        """The item's bytes, or a TENSOR item's array as `as_array` gives it. `meter`: see `SizeLimit`.

        Raises, besides `check_access`'s: `DownloadRefusedError`, `DownloadFailedError`, `WrongFormatError` (malformed,
        empty, or over a limit for its type). Cancelling closes the connection.
        """
        self.check_access(item, caller)
        if item.mm_type is MMUrlType.TENSOR:
            return await asyncio.to_thread(_tensor_blob, item.tensor)
        url, limit = item.url, self.limit(item).metered(meter)
        match scheme_of(url):
            case "data":
                data_url = DataUrl.parse(url)
                work = _ESCAPED_WORK * len(url) if data_url.is_escaped else len(url)
                data = await _run(work, lambda: data_url.decode(limit))
            case "file" | "":
                data = await self._from_disk(self._files.read, local_path(url), limit)
                self.fetched_bytes += len(data)
            case _:
                return await self._downloaded(item, limit)
        return await _file_blob(data, url)

    async def _from_disk(self, look: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._file_threads, look, *arguments)

    def cache_stats(self) -> CacheStats:
        """Of the downloads that are kept."""
        return self._cache.stats()

    async def _downloaded(self, item: MultimodalInput, limit: SizeLimit) -> Blob:
        """From the cache if it is fresh there, else from the source, which is asked only for what has changed."""
        url = item.url
        if (blob := self.at_hand(item)) is None:
            stored = self._cache.stale(url)
            asked_at = self._clock()
            try:
                download = await self._download(item, limit, None if stored is None else stored.head)
            except DownloadRefusedError:
                self._cache.discard(url)
                raise
            if download.body is None and stored is not None:
                blob = self._cache.confirm(url, stored, download.heads, asked_at)
            else:
                body = download.body or b""
                self.fetched_bytes += len(body)
                blob = await _file_blob(body, url)
                self._cache.put(url, blob, download.heads, asked_at)
        _check_kept(blob, limit)
        return blob

    async def _download(self, item: MultimodalInput, limit: SizeLimit, known: ResponseHead | None) -> Download:
        url, pixels = item.url, PixelLimit.of(self._settings, item.mm_type)
        if scheme_of(url) in ("http", "https"):
            return await self._http.download(url, limit, pixels, known)
        body = await self._filesystems.read(url, limit, pixels)
        return Download(body, (ResponseHead(url, HTTPStatus.OK, {}),))  # says nothing of how long it is good


async def _run(nbytes: int, function: Callable[[], T]) -> T:
    """Calls a function whose time grows with `nbytes`: in a thread unless they are few."""
    return function() if nbytes <= _SMALL else await asyncio.to_thread(function)


def _check_kept(blob: Blob, limit: SizeLimit) -> None:
    """Of a download that may be kept from an item of another type. Raises `WrongFormatError`."""
    assert isinstance(blob.data, bytes)
    limit.told(blob.data[:START_BYTES]).check(blob.nbytes)


async def _file_blob(data: bytes, url: str) -> Blob:
    if not data:
        raise WrongFormatError("the source is empty")
    return Blob(data, await _run(len(data), lambda: blake3(data).digest()), redact(url))


def _tensor_blob(tensor: Any) -> Blob:
    array = as_array(tensor)
    header = f"{array.dtype.str}{array.shape}".encode()
    digest = blake3(header).update(array.reshape(-1).view(np.uint8).data).digest()
    return Blob(array, digest, f"tensor {array.dtype} {list(array.shape)}")
