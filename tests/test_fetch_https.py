"""Downloads over TLS: from a source whose certificate is trusted, and from no other."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp.connector
import pytest
from aiohttp import web
from authority import Authority
from fetching import LOOPBACK, fetch, refusal

from rtp_mm.errors import DownloadFailedError

BODY = bytes(range(256)) * 4000  # many TLS records


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
async def url(authority: Authority) -> AsyncIterator[str]:
    """Of a source at 127.0.0.1."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=BODY)

    pair = authority.issue("source")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pair.cert, pair.key)
    app = web.Application()
    app.router.add_get("/x", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    listener = socket.create_server(("127.0.0.1", 0))
    await web.SockSite(runner, listener, ssl_context=context).start()
    yield f"https://127.0.0.1:{listener.getsockname()[1]}/x"
    await runner.cleanup()


async def test_a_trusted_source_is_read(authority: Authority, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trusting = ssl.create_default_context(cafile=authority.cert)
    monkeypatch.setattr(aiohttp.connector, "_SSL_CONTEXT_VERIFIED", trusting)
    assert (await fetch(url, **LOOPBACK, mm_image_max_file_size_kb=2000)).data == BODY


async def test_a_certificate_that_nobody_vouches_for_ends_the_download(url: str) -> None:
    caught = await refusal(url, **LOOPBACK)
    assert type(caught) is DownloadFailedError
    assert "certificate verify failed" in str(caught)
