"""Connections of downloads: how many there are, and who may hold them."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from fetching import LOOPBACK, REMOTE
from waiting import until
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.media import http
from rtp_mm.media.fetch import Fetcher
from rtp_mm.types import MultimodalInput


class Drip:
    """Answers with a byte now and then, for ever."""

    def __init__(self) -> None:
        self.begun, self.closed = asyncio.Event(), asyncio.Event()

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"x")
                self.begun.set()
                await asyncio.sleep(0.01)
        finally:
            self.closed.set()


async def test_cancelling_a_slow_drip_closes_its_connection(source: Source) -> None:
    drip = Drip()
    url = source.answers_by("/x", drip)
    async with Fetcher(load_settings(**LOOPBACK)) as fetcher:
        task = asyncio.create_task(fetcher.fetch(MultimodalInput(url), REMOTE))
        await drip.begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(drip.closed.wait(), 10)  # while the fetcher is still open


async def test_a_slow_host_leaves_connections_to_the_others(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "MAX_CONNECTIONS", 3)
    monkeypatch.setattr(http, "MAX_CONNECTIONS_A_HOST", 2)
    drips = [Drip() for _ in range(4)]
    async with Source.serving() as other, Fetcher(load_settings(**LOOPBACK)) as fetcher:
        urls = [source.answers_by(f"/{i}", drip) for i, drip in enumerate(drips)]
        tasks = [asyncio.create_task(fetcher.fetch(MultimodalInput(url), REMOTE)) for url in urls]
        await until(lambda: sum(drip.begun.is_set() for drip in drips) == 2)
        good = MultimodalInput(other.answers_with("/good", body=b"good"))
        assert (await asyncio.wait_for(fetcher.fetch(good, REMOTE), 10)).data == b"good"
        assert sum(drip.begun.is_set() for drip in drips) == 2
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def test_one_fetcher_serves_many_at_once_over_few_connections(source: Source) -> None:
    async with Fetcher(load_settings(**LOOPBACK)) as fetcher:
        urls = [source.answers_with(f"/{i}", body=str(i).encode()) for i in range(40)]
        blobs = await asyncio.gather(*(fetcher.fetch(MultimodalInput(url), REMOTE) for url in urls))
        for url in urls:
            await fetcher.fetch(MultimodalInput(url), REMOTE)
    assert [blob.data for blob in blobs] == [str(i).encode() for i in range(40)]
    assert len({id(request.transport) for request in source.requests}) <= 40
