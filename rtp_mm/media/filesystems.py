"""Object stores and whatever else fsspec reads, for the schemes that the operator allows (MM_ALLOWED_SCHEMES).

Where they lead is fsspec's business and its configuration's, credentials included: MM_ALLOW_PRIVATE_NETWORK and
MM_ALLOWED_MEDIA_DOMAINS say nothing about them. So only schemes should be allowed whose URLs name no hosts (s3, gs,
abfs), or callers may reach every host by them.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from rtp_mm.config import Settings
from rtp_mm.errors import DownloadFailedError, DownloadRefusedError, MMError, NotSupportedError
from rtp_mm.media.limits import START_BYTES, PixelLimit, SizeLimit

T = TypeVar("T")
CHUNK_BYTES = 1 << 20
THREADS = 32  # that wait for stores; apart from all others, since one that a store leaves hanging is lost for a while

# Asking again gives the same answer.
_PERMANENT = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Filesystems:
    """Reads files by fsspec, which is imported when the first one is asked for."""

    def __init__(self, settings: Settings) -> None:
        self._timeout_s = settings.mm_fetch_timeout_ms / 1000
        self._schemes = settings.mm_allowed_schemes
        self._threads = ThreadPoolExecutor(THREADS, "rtp_mm-fsspec")

    def close(self) -> None:
        """Waits for nothing; idempotent."""
        self._threads.shutdown(wait=False)

    def check(self, scheme: str, url: str) -> None:
        """Raises `NotSupportedError` for a scheme that is not allowed, and for a chain of URLs, which may name any."""
        if scheme not in self._schemes:
            allowed = ", ".join(("http", "https", "file", "data", *self._schemes, "plain paths"))
            raise NotSupportedError(f"scheme {scheme[:20]!r}; allowed are {allowed} (MM_ALLOWED_SCHEMES)")
        if "::" in url:
            raise NotSupportedError("chained URLs (with ::) are not allowed")

    async def read(self, url: str, limit: SizeLimit, pixels: PixelLimit | None) -> bytes:
        """The file, in chunks, as far as `limit` and `pixels` let it come; each chunk within MM_FETCH_TIMEOUT_MS.
        `check` comes first.

        Raises `DownloadRefusedError` for what is not there or not readable, `WrongFormatError` over a limit,
        `NotSupportedError` where fsspec lacks what the scheme needs, `DownloadFailedError` for all else.
        """
        file = await self._call(lambda: _open(url))
        try:
            limit.check(getattr(file, "size", None) or 0)
            body = io.BytesIO()
            while chunk := await self._call(lambda: file.read(CHUNK_BYTES)):
                if not body.tell():
                    limit = limit.told(chunk[:START_BYTES])
                limit.check(body.tell() + len(chunk))
                body.write(chunk)
                if pixels is not None and body.tell() >= pixels.next_look:
                    with body.getbuffer() as here:
                        pixels.check(here, len(here))
            return body.getvalue()
        finally:
            self._threads.submit(file.close)

    async def _call(self, function: Callable[[], T]) -> T:
        """In a thread. Whatever a store's library raises is a failure of the store."""
        future = asyncio.get_running_loop().run_in_executor(self._threads, function)
        try:
            await asyncio.wait([future], timeout=self._timeout_s)
            if not future.done():
                raise DownloadFailedError(f"the source was silent for {self._timeout_s:g} s (MM_FETCH_TIMEOUT_MS)")
            if (error := future.exception()) is not None:
                raise _failure(error) from None
            return future.result()
        finally:
            future.cancel()  # of one that still runs, nobody hears any more


def _open(url: str) -> Any:
    import fsspec

    scheme, _, rest = url.partition("://")
    filesystem, path = fsspec.url_to_fs(f"{scheme.lower()}://{rest}")
    return filesystem.open(path, "rb")


def _failure(error: BaseException) -> MMError:
    """Told by the kind of error: its text may hold anything, secrets among it."""
    match error:
        case ImportError():
            return NotSupportedError("the server lacks a package for this scheme (fsspec, or the scheme's own)")
        case _ if isinstance(error, _PERMANENT):
            return DownloadRefusedError(f"cannot read the file ({type(error).__name__})")
        case _:
            return DownloadFailedError(f"cannot read the file for now ({type(error).__name__})")
