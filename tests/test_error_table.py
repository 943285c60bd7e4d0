"""Every cause of the error table, brought about for real: a served engine, a loopback source, and what gRPC says."""

from __future__ import annotations

import asyncio
import base64
import io
import re
import urllib.parse
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from aiohttp import web
from fake_engine import Serving, free_start_port, serving
from PIL import Image
from server_calls import call_raw, refusal
from waiting import until
from web_source import Source

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.models.registry import load_model
from rtp_mm.server import wire
from rtp_mm.server.proto import MMPreprocessConfigPB, MultimodalInputPB, MultimodalInputsPB
from rtp_mm.server.state import Phase
from rtp_mm.types import MMUrlType

Row = tuple[str, str]  # name and status
README = (Path(__file__).parents[1] / "README.md").read_text()


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), (200, 30, 90)).save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


GOOD = data_url(png(60, 60))


def item(url: str, mm_type: MMUrlType = MMUrlType.IMAGE, **config: Any) -> Any:
    return MultimodalInputPB(
        multimodal_url=url, multimodal_type=mm_type, mm_preprocess_config=MMPreprocessConfigPB(**config)
    )


def message(*items: Any) -> Any:
    return MultimodalInputsPB(multimodal_inputs=items)


@pytest.fixture(scope="module")
def model(tiny_qwen2_5_vl: Path) -> MultimodalMixin:
    return load_model(
        load_settings(None, checkpoint_path=tiny_qwen2_5_vl, act_type="fp32", device="cpu", mm_max_pixels=10_000)
    )


@asynccontextmanager
async def served(model: MultimodalMixin, **options: Any) -> AsyncIterator[Serving]:
    engine: Any = MMProcessEngine(model, load_settings(None, **{"mm_fetch_retries": 0} | options))
    try:
        async with serving(engine, **options) as server:
            yield server
    finally:
        await engine.aclose()


async def said(server: Serving, request: Any, row: Row, pattern: str) -> grpc.aio.AioRpcError:
    """The refusal, once it is seen to be the one expected."""
    name, status = row
    error = await refusal(server.grpc_address, request)
    assert error.code().name == status, error.details()
    assert re.match(rf"\[{name}\] ", error.details()), error.details()
    assert re.search(pattern, error.details()), error.details()
    assert len(error.details().encode()) <= 1024
    return error


ROWS = (
    WRONG_FORMAT := ("MM_WRONG_FORMAT_ERROR", "INVALID_ARGUMENT"),
    NOT_SUPPORTED := ("MM_NOT_SUPPORTED_ERROR", "INVALID_ARGUMENT"),
    REFUSED := ("MM_DOWNLOAD_FAILED", "INVALID_ARGUMENT"),
    UNREACHABLE := ("MM_DOWNLOAD_FAILED", "UNAVAILABLE"),
    DEADLINE := ("MM_PROCESS_ERROR", "DEADLINE_EXCEEDED"),
    FULL := ("MM_PROCESS_ERROR", "RESOURCE_EXHAUSTED"),
    DRAINING := ("MM_REMOTE_RPC_FAILED", "UNAVAILABLE"),
    LOADING := ("MM_EMPTY_ENGINE_ERROR", "UNAVAILABLE"),
    TOO_LONG := ("MM_LONG_PROMPT_ERROR", "INVALID_ARGUMENT"),
    FAULT := ("MM_PROCESS_ERROR", "INTERNAL"),
    UNAUTHENTICATED := ("MM_NOT_SUPPORTED_ERROR", "UNAUTHENTICATED"),
)

LOCAL: dict[str, tuple[Any, dict[str, Any], Row, str]] = {
    "undecodable": (item(data_url(b"no image")), {}, WRONG_FORMAT, r"item 1 \(data:"),
    "too many pixels": (item(data_url(png(101, 100))), {}, WRONG_FORMAT, "10100.*MM_MAX_PIXELS"),
    "file too large": (
        item(data_url(bytes(1025))),
        {"mm_image_max_file_size_kb": 1},
        WRONG_FORMAT,
        "MM_IMAGE_MAX_FILE_SIZE_KB",
    ),
    "bad config": (item(GOOD, crop_positions=[0, 0, 1]), {}, WRONG_FORMAT, "crop_positions must be"),
    "blocked address": (item("http://127.0.0.1/x"), {}, NOT_SUPPORTED, "127.0.0.1"),
    "blocked path": (item("/etc/passwd"), {"mm_local_media": False}, NOT_SUPPORTED, "MM_LOCAL_MEDIA"),
    "blocked scheme": (item("gopher://h/x"), {}, NOT_SUPPORTED, "gopher"),
    "igraph": (item(GOOD, MMUrlType.IGRAPH), {}, NOT_SUPPORTED, "(?i)igraph"),
    "a modality the model lacks": (item(GOOD, MMUrlType.AUDIO), {}, NOT_SUPPORTED, "(?i)audio"),
    "an absent file": (item("/nowhere/x.png"), {}, REFUSED, r"item 1 \(/nowhere"),
}


@pytest.mark.parametrize("cause", LOCAL)
async def test_an_item_that_cannot_be_served(model: MultimodalMixin, cause: str) -> None:
    bad, options, row, pattern = LOCAL[cause]
    async with served(model, **options) as server:
        error = await said(server, message(item(GOOD), bad, item(GOOD)), row, pattern)
        assert "item 1 " in error.details()
        assert "item 0 " not in error.details()
        await call_raw(server.grpc_address, message(item(GOOD)).SerializeToString())


@pytest.mark.parametrize(
    ("answer", "row"),
    [
        *((code, REFUSED) for code in (400, 401, 403, 404, 410, 451)),
        *((code, UNREACHABLE) for code in (408, 429, 500, 502, 503, 504)),
    ],
)
async def test_a_source_that_refuses(model: MultimodalMixin, answer: int, row: Row) -> None:
    """A final refusal is remembered, since RTP-LLM's client asks again; a passing one is not."""
    async with Source.serving() as source, served(model, mm_allow_private_network=True) as server:
        url = source.answers_with("/x", status=answer)
        for _ in range(2):
            await said(server, message(item(url)), row, str(answer))
        assert len(source.requests) == (1 if row == REFUSED else 2)


async def test_a_source_that_is_not_there(model: MultimodalMixin) -> None:
    async with served(model, mm_allow_private_network=True) as server:
        url = f"http://127.0.0.1:{free_start_port()}/x?key=secret"
        error = await said(server, message(item(url)), UNREACHABLE, "item 0")
        assert "secret" not in error.details()


@asynccontextmanager
async def stalling() -> AsyncIterator[tuple[Source, str]]:
    async def stall(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits that long")

    async with Source.serving() as source:
        yield source, source.answers_by("/x", stall)


async def test_a_deadline_of_the_item_or_of_the_server(model: MultimodalMixin) -> None:
    async with stalling() as (_, url):
        for options, config, who in (
            ({}, {"mm_timeout_ms": 100}, "mm_timeout_ms"),
            ({"mm_timeout_ms": 100}, {}, "MM_TIMEOUT_MS"),
        ):
            async with served(model, mm_allow_private_network=True, **options) as server:
                request = message(item(url, **config))
                error = await said(server, request, DEADLINE, rf"within 0\.100 s, {who} \(fetch \d\.\d+ s\)$")
                assert float(dict(error.trailing_metadata())["rtp-mm-fetch-ms"]) > 0


async def test_a_full_queue(model: MultimodalMixin) -> None:
    async with stalling() as (source, url), served(model, mm_allow_private_network=True, mm_max_queue_size=1) as server:
        first = asyncio.create_task(call_raw(server.grpc_address, message(item(url)).SerializeToString()))
        await until(lambda: source.requests)
        request = message(item(GOOD))
        error = await said(server, request, FULL, "MM_MAX_QUEUE_SIZE")
        assert int(dict(error.trailing_metadata())["retry-after-ms"]) > 0
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await until(lambda: server.state.calls == 0)
        await call_raw(server.grpc_address, request.SerializeToString())


async def test_loading_and_draining(model: MultimodalMixin) -> None:
    async with served(model) as server:
        request = message(item(GOOD))
        server.state.phase = Phase.DRAINING
        await said(server, request, DRAINING, "going down")
        server.state.phase, server.state.loaded = Phase.LOADING, None
        await said(server, request, LOADING, "loading")


async def test_a_reply_at_the_message_limit_leaves_and_one_byte_more_is_refused(
    model: MultimodalMixin, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(model) as server:
        request = message(item(GOOD))
        reply, _ = await call_raw(server.grpc_address, request.SerializeToString())
        for limit in (len(reply) + 1, len(reply)):
            monkeypatch.setattr(wire.write_result, "__defaults__", (limit,))
            assert (await call_raw(server.grpc_address, request.SerializeToString()))[0] == reply
        monkeypatch.setattr(wire.write_result, "__defaults__", (len(reply) - 1,))
        pattern = f"takes {len(reply)} bytes, one message at most {len(reply) - 1}"
        await said(server, request, TOO_LONG, pattern)


def nan(forward: Callable[..., Any], *arguments: Any) -> Any:
    return [(embedding * float("nan"), ids) for embedding, ids in forward(*arguments)]


def out_of_memory(forward: Callable[..., Any], *arguments: Any) -> Any:
    raise torch.OutOfMemoryError("tried to allocate /secret/path")


def bug(forward: Callable[..., Any], *arguments: Any) -> Any:
    raise KeyError("/secret/path")


@pytest.mark.parametrize(
    ("fault", "pattern"), [(nan, "NaN or inf"), (out_of_memory, "OutOfMemoryError|out of memory"), (bug, "KeyError")]
)
async def test_a_fault_of_ours(
    model: MultimodalMixin, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], pattern: str
) -> None:
    async with served(model) as server:
        forward = model.mm_part.mm_process_batch
        with monkeypatch.context() as patched:
            patched.setattr(model.mm_part, "mm_process_batch", lambda *arguments: fault(forward, *arguments))
            error = await said(server, message(item(GOOD)), FAULT, pattern)
            assert "/secret/path" not in error.details()
        await call_raw(server.grpc_address, message(item(GOOD)).SerializeToString())


async def test_a_request_of_many_bad_items_fits_into_a_status(model: MultimodalMixin) -> None:
    long_name = urllib.parse.quote("\u732b" * 200)
    async with served(model) as server:
        items = [item(f"/nowhere/{i}/{long_name}") for i in range(100)]
        await said(server, message(*items), REFUSED, r"item 0 \(/nowhere/0/")


async def test_a_caller_without_the_token(model: MultimodalMixin) -> None:
    async with served(model, mm_auth_token="sekrit") as server:
        error = await said(server, message(item(GOOD)), UNAUTHENTICATED, "authorization must be Bearer")
        assert "sekrit" not in error.details()


def test_every_row_of_the_readmes_table_is_here() -> None:
    rows = set(re.findall(r"\| (MM_[A-Z_]+) \| ([A-Z_]+)", README))
    assert len(rows) >= 10
    assert rows <= set(ROWS)
