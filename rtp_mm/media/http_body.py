"""The body of an HTTP answer, within its limits."""

from __future__ import annotations

import asyncio
import io
import zlib

import aiohttp

from rtp_mm.errors import DownloadFailedError, DownloadRefusedError, WrongFormatError
from rtp_mm.media.limits import START_BYTES, PixelLimit, SizeLimit

PIECE_BYTES = 4096  # inflated at a time, to 1032 times as many at most, before the server is asked for room
MAX_MEMBERS = 1024  # of gzip, whose files may follow one another: each, though empty, takes its time
_GZIP_OR_ZLIB = zlib.MAX_WBITS | 32  # told from the header
_GZIP = b"\x1f\x8b"


async def read_body(response: aiohttp.ClientResponse, limit: SizeLimit, pixels: PixelLimit | None) -> bytes:
    """The body, decompressed. Content-Length is believed only to refuse early.

    Raises `WrongFormatError` over a limit or for a malformed compression, `DownloadRefusedError` for an unknown one,
    `DownloadFailedError` for one that ends early.
    """
    limit.check(response.content_length or 0)
    encoding = response.headers.get("Content-Encoding", "identity").strip().lower()
    body = io.BytesIO()
    async for chunk in response.content.iter_any():
        limit.check(body.tell() + len(chunk))
        body.write(chunk)
        if encoding == "identity" and body.tell() >= START_BYTES:
            limit = _told(body, limit)
        if pixels is not None and encoding == "identity" and body.tell() >= pixels.next_look:
            with body.getbuffer() as here:
                pixels.check(here, len(here))
    if encoding == "identity":
        return body.getvalue()
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise DownloadRefusedError(
            f"the source answered in Content-Encoding {encoding[:20]!r}, which it was not asked for"
        )
    return await asyncio.to_thread(_inflate, body.getvalue(), limit)


def _told(body: io.BytesIO, limit: SizeLimit) -> SizeLimit:
    if limit.clip is None:
        return limit
    with body.getbuffer() as here:
        limit = limit.told(bytes(here[:START_BYTES]))
    limit.check(body.tell())
    return limit


def _inflate(data: bytes, limit: SizeLimit) -> bytes:
    inflater = zlib.decompressobj(wbits=_GZIP_OR_ZLIB)
    body = io.BytesIO()
    start, members = 0, 1
    try:
        while start < len(data):
            piece = data[start : start + PIECE_BYTES]
            body.write(inflater.decompress(piece, limit.most + 1 - body.tell()))
            limit.check(body.tell())
            if body.tell() >= START_BYTES:
                limit = _told(body, limit)
            start += len(piece) - len(inflater.unused_data)
            if inflater.eof:
                if not data.startswith(_GZIP, start):
                    return body.getvalue()
                if (members := members + 1) > MAX_MEMBERS:
                    raise WrongFormatError(f"the body has over {MAX_MEMBERS} gzip members")
                inflater = zlib.decompressobj(wbits=_GZIP_OR_ZLIB)
    except zlib.error:
        raise WrongFormatError("the body is not what its Content-Encoding says") from None
    raise DownloadFailedError("the compressed body ends early")
