"""What the engine takes at once, and what it refuses, and how early."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path

import pytest
from aiohttp import web
from waiting import until
from watched_engine import STRANGER, padded, watched
from web_source import Source

from rtp_mm.errors import BadItemsError, QueueFullError
from rtp_mm.types import MMPreprocessConfig


@pytest.mark.parametrize(("side", "limit", "is_admitted"), [(4, 17, True), (4, 16, True), (4, 15, False)])
async def test_patches_per_item_are_limited_before_decoding(
    side: int, limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, urls: list[str]
) -> None:
    config = MMPreprocessConfig(width=14 * side, height=14 * side)
    async with watched(tiny_qwen2_5_vl, mm_max_patches_per_item=limit) as w:
        if is_admitted:
            assert len((await w.ask(urls[0], config=config)).embeddings[0]) == 4
            return
        with pytest.raises(BadItemsError, match=r"16 patches, over the limit of 15 \(MM_MAX_PATCHES_PER_ITEM\)"):
            await w.ask(urls[0], config=config)
        assert w.prepared == 0
        assert not w.engine.stats().rejections  # of a full server's: this one needs no other server


async def test_a_huge_size_of_a_small_image_is_refused_by_default(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        for config in (
            MMPreprocessConfig(width=8000, height=8000, max_pixels=1 << 30),
            MMPreprocessConfig(-1, -1, 1 << 26, 1 << 26),
        ):
            with pytest.raises(BadItemsError, match="MM_MAX_PATCHES_PER_ITEM"):
                await w.ask(urls[0], config=config)
        assert w.prepared == 0


async def test_pixels_are_limited_before_decoding(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl, mm_max_pixels=60 * 60) as w:
        assert await w.ask(urls[0])
    async with watched(tiny_qwen2_5_vl, mm_max_pixels=60 * 60 - 1) as w:
        with pytest.raises(BadItemsError, match="MM_MAX_PIXELS"):
            await w.ask(urls[0])
        assert w.prepared == 0


@pytest.mark.parametrize(("limit", "is_admitted"), [(33, True), (32, True), (31, False)])
async def test_patches_in_the_queue_are_limited(
    limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, urls: list[str]
) -> None:
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=limit) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        second = w.ask(urls[1])
        if is_admitted:
            await until(lambda: w.prepared == 2)
            w.may_forward.set()
            assert await second
        else:
            with pytest.raises(QueueFullError, match="MM_MAX_QUEUE_PATCHES") as caught:
                await second
            assert caught.value.retry_after_ms > 0
            assert w.engine.stats().rejections == {"patches": 1}
            assert w.prepared == 1
            w.may_forward.set()
        await first


async def test_nothing_is_downloaded_for_a_full_queue(tiny_qwen2_5_vl: Path, urls: list[str], source: Source) -> None:
    """Unless somebody else downloads it anyway, or it is there already. Nor is anything else of its request begun."""
    url = source.answers_with("/image", body=base64.b64decode(urls[1].partition(",")[2]))
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=16) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        with pytest.raises(QueueFullError, match="MM_MAX_QUEUE_PATCHES"):
            await w.ask(url)
        with pytest.raises(QueueFullError, match="MM_MAX_QUEUE_PATCHES"):
            await w.ask("data:image/png;base64,AAAA", url)
        assert not source.requests
        w.may_forward.set()
        await first
        assert await w.ask(url)
        assert len(source.requests) == 1


async def test_an_idle_server_takes_one_item_however_large(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=1, mm_max_bytes_in_flight_mb=1) as w:
        assert len((await w.ask(padded(urls[0], 4 << 20))).embeddings) == 1
        assert len((await w.ask(*urls)).embeddings) == len(urls)


async def test_one_request_holds_no_more_than_the_server_may(
    tiny_qwen2_5_vl: Path, urls: list[str], source: Source
) -> None:
    """Not even on an idle server: of many files that come at once."""
    body = base64.b64decode(urls[0].partition(",")[2]) + bytes(3 << 19)
    many = [source.answers_with(f"/{number}", body=body) for number in range(8)]
    async with watched(tiny_qwen2_5_vl, mm_max_bytes_in_flight_mb=1) as w:
        with pytest.raises(BadItemsError, match=r"more than 1 MiB \(MM_MAX_BYTES_IN_FLIGHT_MB\): send fewer at once"):
            await w.ask(*many)
        assert w.engine.stats().bytes_in_flight == 0
        assert await w.ask(urls[0])


async def test_bytes_in_flight_are_limited(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    """A message that does not fit beside another is refused at the door; alone it is welcome."""
    async with watched(tiny_qwen2_5_vl, mm_max_bytes_in_flight_mb=1) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        held = w.engine.stats().bytes_in_flight
        assert held >= len(urls[0])
        room = (1 << 20) - held
        fits, too_large = (padded(urls[1], n) for n in (room // 3, room + 1))  # its file counts too
        with pytest.raises(QueueFullError, match="MM_MAX_BYTES_IN_FLIGHT_MB"):
            await w.ask(too_large)
        assert w.engine.stats().rejections == {"bytes": 1}
        w.may_forward.set()
        await asyncio.gather(first, w.ask(fits))
        assert await w.ask(too_large)


async def test_a_download_is_refused_while_it_comes(tiny_qwen2_5_vl: Path, urls: list[str], source: Source) -> None:
    """By its Content-Length, or where there is none, by what has come; alone it is welcome."""
    body = b"x" * (3 << 19)

    async def chunked(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(body)
        return response

    announced, streamed = source.answers_with("/announced", body=body), source.answers_by("/streamed", chunked)
    async with watched(tiny_qwen2_5_vl, mm_max_bytes_in_flight_mb=1) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        for url in (announced, streamed):
            with pytest.raises(QueueFullError, match="MM_MAX_BYTES_IN_FLIGHT_MB"):
                await w.ask(url)
        w.may_forward.set()
        await first
        for url in (announced, streamed):
            with pytest.raises(BadItemsError, match="no image"):
                await w.ask(url)


async def test_an_answer_counts_until_nobody_holds_it(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    """A server holds it until its caller has read it; a library's caller may keep it for ever."""
    async with watched(tiny_qwen2_5_vl) as w:
        library, server = await w.ask(urls[0]), await w.ask(urls[0], caller=STRANGER)
        assert w.engine.stats().bytes_in_flight == server.embeddings[0].nbytes == library.embeddings[0].nbytes
        del server
        await until(lambda: w.engine.stats().bytes_in_flight == 0)


async def test_what_cannot_come_in_time_is_refused_at_once(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl) as w:
        await w.ask(urls[0])  # it learns how fast the device is
        w.engine._items.batcher._mean_patches, w.engine._items.batcher._mean_device_s = 16.0, 1.0
        w.may_forward.clear()
        first = w.ask(urls[1])
        await until(lambda: len(w.forwards) == 2)
        with pytest.raises(QueueFullError, match="more than the deadline leaves") as caught:
            await w.ask(urls[2], timeout_s=0.5)
        assert caught.value.retry_after_ms == 1000
        patient = w.ask(urls[3], timeout_s=30)
        w.may_forward.set()
        await asyncio.gather(first, patient)
        assert w.engine.stats().rejections == {"deadline": 1}


async def test_a_bad_item_beside_a_full_queue_says_what_no_retry_mends(tiny_qwen2_5_vl: Path, urls: list[str]) -> None:
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=16) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])
        await until(lambda: len(w.forwards) == 1)
        with pytest.raises(BadItemsError) as caught:
            await w.ask(urls[1], "data:image/png;base64,AAAA")
        assert caught.value.status == "INVALID_ARGUMENT"
        with pytest.raises(QueueFullError):
            await w.ask(urls[1], urls[2])
        w.may_forward.set()
        await first
