"""The token: who gets in, who does not, and that nobody hears it."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
from fake_engine import serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from server_calls import EMBED, embed, get, refusal, request

from rtp_mm import errors
from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.logs import KeyValueFormatter
from rtp_mm.server.client import RemoteEngine
from rtp_mm.server.proto import MultimodalRpcServiceStub, StatusVersionPB
from rtp_mm.server.security import Guard, bearer_token, is_loopback

TOKEN = "correct-horse.battery~staple"


async def test_with_a_token_calls_need_it_and_health_does_not() -> None:
    async with serving(mm_auth_token=TOKEN) as server:
        error = await refusal(server.grpc_address, request("img:1"))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert error.details().startswith("[MM_NOT_SUPPORTED_ERROR] metadata authorization must be Bearer")
        with pytest.raises(errors.UnauthenticatedError):
            await embed(server)
        assert not server.engine.asked
        assert await embed(server, mm_auth_token=TOKEN) == 3
        for path in ("/health", "/ready", "/live"):
            assert await get(server, path) == 200
        for path in ("/", "/metrics", "/debug/profile", "/nowhere"):
            assert await get(server, path) == 401
        assert await get(server, "/metrics", Authorization=f"Bearer {TOKEN}") == 200
        async with grpc.aio.insecure_channel(server.grpc_address) as channel:
            reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
            assert reply.status == health_pb2.HealthCheckResponse.SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await MultimodalRpcServiceStub(channel).GetWorkerStatus(StatusVersionPB())
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            listed = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter([reflection_pb2.ServerReflectionRequest(list_services="")])
            )
            with pytest.raises(grpc.aio.AioRpcError):
                await listed.read()


async def test_the_status_methods_of_a_client_show_the_token() -> None:
    async with serving(mm_auth_token=TOKEN) as server:
        engine = RemoteEngine(server.grpc_address, load_settings(None, mm_auth_token=TOKEN))
        assert (await asyncio.to_thread(engine.worker_status)).is_alive
        assert (await asyncio.to_thread(engine.cache_status)).version == 9
        engine.close()


async def test_a_refused_call_is_refused_before_its_request_is_read() -> None:
    """A megabyte that a unary handler would wait for; the caller sends the half of it and hears the refusal."""

    async def half_a_request() -> Any:
        yield bytes(1 << 20)
        await asyncio.Event().wait()

    async with serving(mm_auth_token=TOKEN) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asyncio.wait_for(channel.stream_unary(EMBED)(half_a_request()), 20)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_refusals_are_counted_and_no_token_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(mm_auth_token=TOKEN) as server:
        wrong = (("authorization", "Bearer wrong-guess"),)
        await refusal(server.grpc_address, request("img:1"), metadata=wrong)
        await get(server, "/metrics", Authorization="Bearer wrong-guess")
        url, headers = f"{server.http_url}/metrics", {"Authorization": f"Bearer {TOKEN}"}
        async with aiohttp.ClientSession() as http, http.get(url, headers=headers) as response:
            text = await response.text()
        assert 'rtp_mm_unauthenticated_total{protocol="grpc"} 1.0' in text
        assert 'rtp_mm_unauthenticated_total{protocol="http"} 1.0' in text
        assert await embed(server, mm_auth_token=TOKEN) == 3
    lines = [KeyValueFormatter().format(record) for record in caplog.records]
    assert any(" refused peer=ipv4:127.0.0.1:" in line and "status=UNAUTHENTICATED" in line for line in lines)
    assert not any(TOKEN in line or "wrong-guess" in line for line in lines)
    assert TOKEN not in repr(server.settings)


async def test_no_line_for_a_refusal_where_calls_have_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with serving(mm_auth_token=TOKEN, disable_access_log=True) as server:
        await refusal(server.grpc_address, request("img:1"))
    assert not [record for record in caplog.records if record.name == "rtp_mm.access"]


async def test_a_new_token_in_the_file_counts_at_once(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")
    async with serving(mm_auth_token_file=file) as server:
        assert await embed(server, mm_auth_token_file=file) == 3
        file.write_text("the-next-one")
        assert await embed(server, mm_auth_token="the-next-one") == 3
        with pytest.raises(errors.UnauthenticatedError):
            await embed(server, mm_auth_token=TOKEN)
        file.unlink()
        assert await embed(server, mm_auth_token="the-next-one") == 3


@pytest.mark.parametrize(
    ("header", "is_admitted"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer  {TOKEN} ", True),
        (f"Bearer {TOKEN}x", False),
        (f"Bearer {TOKEN[:-1]}", False),
        (f"Basic {TOKEN}", False),
        (TOKEN, False),
        ("Bearer ", False),
        ("Bearer", False),
        ("Bearer \udcff", False),
        (b"Bearer \xff", False),
        ("", False),
        (None, False),
    ],
)
def test_only_the_token_itself_is_admitted(header: Any, is_admitted: bool) -> None:
    assert Guard(lambda: TOKEN).admits(header) is is_admitted
    assert Guard(None).admits(header)


@pytest.mark.parametrize("token", ["", " ", "two words", "line\nline", "schl\u00fcssel", "\u732b"])
def test_a_token_that_no_header_carries_ends_the_start_and_is_not_repeated(token: str, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text(f" {token}\n", "utf-8")
    with pytest.raises(StartError, match=r"MM_AUTH_TOKEN_FILE=.*visible ASCII") as caught:
        bearer_token(load_settings(None, mm_auth_token_file=file))
    assert not token.strip() or token not in str(caught.value)
    if token:
        with pytest.raises(StartError, match=r"MM_AUTH_TOKEN: .*visible ASCII"):
            bearer_token(load_settings(None, mm_auth_token=token))


def test_a_token_and_a_token_file_together_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="one of the two") as caught:
        bearer_token(load_settings(None, mm_auth_token=TOKEN, mm_auth_token_file=tmp_path / "x"))
    assert TOKEN not in str(caught.value)


def test_a_token_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="No such file"):
        bearer_token(load_settings(None, mm_auth_token_file=tmp_path / "x"))


@pytest.mark.parametrize(("host", "expected"), [("::1", True), ("::ffff:127.0.0.1", True), ("10.0.0.1", False)])
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
