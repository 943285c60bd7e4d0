"""Calls to a server in tests: raw gRPC, the client, HTTP."""

from __future__ import annotations

import ssl
from typing import Any

import aiohttp
import grpc
import pytest
from fake_engine import Serving

from rtp_mm.config import load_settings
from rtp_mm.server.client import RemoteEngine
from rtp_mm.server.proto import MMPreprocessConfigPB, MultimodalInputPB, MultimodalInputsPB, method_path
from rtp_mm.types import MultimodalInput

EMBED = method_path("RemoteMultimodalEmbedding")


def request(*urls: str, **config: Any) -> Any:
    items = [MultimodalInputPB(multimodal_url=url, mm_preprocess_config=MMPreprocessConfigPB(**config)) for url in urls]
    return MultimodalInputsPB(multimodal_inputs=items)


async def call_raw(address: str, message: bytes, **kwargs: Any) -> tuple[bytes, dict[str, str]]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.unary_unary(EMBED)(message, **kwargs)
        reply = await call
        return reply, dict(await call.trailing_metadata())


async def refusal(address: str, message: Any, **kwargs: Any) -> grpc.aio.AioRpcError:
    """How the call ends."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_raw(address, message.SerializeToString(), **kwargs)
    return caught.value


async def embed(server: Serving, **options: Any) -> int:
    """Rows that a `RemoteEngine` with these options gets."""
    engine = RemoteEngine(server.grpc_address, load_settings(None, **options))
    try:
        return len((await engine.embed([MultimodalInput("img:3")], timeout_s=20)).embeddings[0])
    finally:
        engine.close()


async def http_status(server: Serving, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{server.http_url}{path}") as response:
        return response.status, await response.json()


async def get(server: Serving, path: str, context: ssl.SSLContext | None = None, **headers: str) -> int:
    """The status that HTTP answers; a failed handshake raises."""
    scheme = "https" if context else "http"
    url = f"{scheme}://127.0.0.1:{server.settings.start_port}{path}"
    async with aiohttp.ClientSession() as http, http.get(url, ssl=context or True, headers=headers) as response:
        return response.status
