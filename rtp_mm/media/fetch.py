"""Fetch: an item of a request goes in, its bytes (or its array) come out, with their content hash.

Access comes first and costs no I/O beyond resolving a path, so that caches can stand between it and the fetch.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from typing import Any, Self, TypeVar

import numpy as np
from blake3 import blake3

from rtp_mm.config import Settings
from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.array import as_array
from rtp_mm.media.data_url import DataUrl
from rtp_mm.media.http import HttpSource
from rtp_mm.media.limits import PixelLimit, SizeLimit
from rtp_mm.media.local import LocalFiles, local_path
from rtp_mm.media.redact import redact
from rtp_mm.types import Blob, Caller, MMUrlType, MultimodalInput

T = TypeVar("T")

_SCHEME = re.compile(r"(data|file)(?=:)|([a-z][a-z0-9+.-]*)(?=://)", re.IGNORECASE)
_SMALL = 1 << 18  # bytes hashed or decoded in less time (0.1 ms) than a thread takes to answer under load


class Fetcher:
    """Fetches items; one per event loop."""

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` tells the age of remembered refusals, in seconds."""
        self._settings = settings
        self._http = HttpSource(settings, clock)
        self._files = LocalFiles(settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes all connections; idempotent."""
        await self._http.close()

    def check_access(self, item: MultimodalInput, caller: Caller) -> None:
        """Raises `NotSupportedError` if this caller may not have this item. Fetches nothing."""
        if item.mm_type is MMUrlType.IGRAPH:
            raise NotSupportedError("IGRAPH items are not supported")
        if item.mm_type is MMUrlType.TENSOR:
            return
        match _scheme(item.url):
            case "http" | "https" | "data":
                return
            case "file" | "":
                self._files.check(local_path(item.url), caller)
            case scheme:
                raise NotSupportedError(f"scheme {scheme[:20]!r}; allowed are http, https, file, data and plain paths")

    async def fetch(self, item: MultimodalInput, caller: Caller, meter: Callable[[int], None] | None = None) -> Blob:
        """The item's bytes, or a TENSOR item's array as `as_array` gives it. `meter`: see `SizeLimit`.

        Raises, besides `check_access`'s: `DownloadRefusedError`, `DownloadFailedError`, `WrongFormatError` (malformed,
        empty, or over a limit for its type). Cancelling closes the connection.
        """
        self.check_access(item, caller)
        if item.mm_type is MMUrlType.TENSOR:
            return await asyncio.to_thread(_tensor_blob, item.tensor)
        data = await self._fetch_bytes(item, SizeLimit.of(self._settings, item.mm_type).metered(meter))
        if not data:
            raise WrongFormatError("the source is empty")
        return Blob(data, await _run(len(data), lambda: blake3(data).digest()), redact(item.url))

    async def _fetch_bytes(self, item: MultimodalInput, limit: SizeLimit) -> bytes:
        url = item.url
        match _scheme(url):
            case "http" | "https":
                return await self._http.download(url, limit, PixelLimit.of(self._settings, item.mm_type))
            case "data":
                return await _run(len(url), lambda: DataUrl.parse(url).decode(limit))
            case _:
                return await asyncio.to_thread(self._files.read, local_path(url), limit)


def _scheme(url: str) -> str:
    """Lower-case, empty for a plain path: only `data:`, `file:` and what has `://` counts as a scheme."""
    match = _SCHEME.match(url)
    return match[0].lower() if match else ""


async def _run(nbytes: int, function: Callable[[], T]) -> T:
    """Calls a function whose time grows with `nbytes`: in a thread unless they are few."""
    return function() if nbytes <= _SMALL else await asyncio.to_thread(function)


def _tensor_blob(tensor: Any) -> Blob:
    array = as_array(tensor)
    header = f"{array.dtype.str}{array.shape}".encode()
    digest = blake3(header).update(array.reshape(-1).view(np.uint8).data).digest()
    return Blob(array, digest, f"tensor {array.dtype} {list(array.shape)}")
