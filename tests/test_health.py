"""What a server says of itself: its phases over gRPC and HTTP, and its figures."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import grpc
import pytest
from fake_engine import FakeEngine, serving
from grpc_health.v1 import health_pb2, health_pb2_grpc
from server_calls import call_raw, http_status, refusal, request

from rtp_mm.server.proto import CacheVersionPB, MultimodalRpcServiceStub, StatusVersionPB
from rtp_mm.server.state import Loaded, Phase
from rtp_mm.types import WorkerStatus


async def test_before_and_after_serving_calls_are_refused_by_name() -> None:
    async with serving(is_loaded=False) as server, aiohttp.ClientSession() as http:

        async def health() -> tuple[int, Any]:
            async with http.get(f"{server.http_url}/health") as response:
                return response.status, await response.json()

        error = await refusal(server.grpc_address, request("img:1"))
        assert (error.code().name, error.details()[:24]) == ("UNAVAILABLE", "[MM_EMPTY_ENGINE_ERROR] ")
        assert await health() == (503, {"status": "loading"})
        server.state.serve(Loaded(server.engine, "fake", "bf16", "cpu"))
        await call_raw(server.grpc_address, request("img:1").SerializeToString())
        assert await health() == (200, {"status": "ok"})
        server.state.phase = Phase.DRAINING
        error = await refusal(server.grpc_address, request("img:1"))
        assert (error.code().name, error.details()[:23]) == ("UNAVAILABLE", "[MM_REMOTE_RPC_FAILED] ")
        assert await health() == (503, {"status": "draining"})


async def test_grpc_health_says_not_serving_until_loaded() -> None:
    async with serving(is_loaded=False) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "MultimodalRpcService"):
            reply = await stub.Check(health_pb2.HealthCheckRequest(service=name))
            assert reply.status == health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_lost_device_is_said_everywhere_and_a_device_that_is_back_too() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        statuses = health_pb2.HealthCheckResponse
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service="MultimodalRpcService"))
        assert (await watch.read()).status == statuses.SERVING
        server.engine.is_alive = False
        for path in ("/health", "/ready", "/live"):
            assert await http_status(server, path) == (503, {"status": "device lost"})
        assert not (await MultimodalRpcServiceStub(channel).GetWorkerStatus(StatusVersionPB())).alive
        assert (await watch.read()).status == statuses.NOT_SERVING
        server.engine.is_alive = True
        assert (await watch.read()).status == statuses.SERVING
        assert await http_status(server, "/health") == (200, {"status": "ok"})


async def test_live_is_not_ready_while_loading_and_draining() -> None:
    async with serving(is_loaded=False) as server:
        for phase in (Phase.LOADING, Phase.DRAINING):
            server.state.phase = phase
            assert await http_status(server, "/ready") == (503, {"status": phase})
            assert await http_status(server, "/live") == (200, {"status": "ok"})


async def test_the_root_page_says_what_this_is() -> None:
    async with serving() as server, aiohttp.ClientSession() as http, http.get(f"{server.http_url}/") as response:
        about = await response.json()
    assert about["name"] == "rtp_mm"
    assert about["model"] == "fake"
    assert about["grpc_port"] == server.settings.start_port + 1


async def test_bytes_that_are_no_http_are_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.settings.start_port)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        assert b" 400 " in await reader.readline()
        writer.close()
        await writer.wait_closed()
    (record,) = (r for r in caplog.records if "Error handling request" in r.message)
    assert record.message.endswith("from 127.0.0.1: no HTTP/1.1 request")
    assert (record.levelname, record.exc_info) == ("WARNING", None)


async def test_worker_status_follows_the_engine_and_the_phase() -> None:
    async with serving(is_loaded=False) as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = MultimodalRpcServiceStub(channel)
        empty = await stub.GetWorkerStatus(StatusVersionPB())
        assert (empty.role, empty.alive) == ("VIT", False)
        server.state.serve(Loaded(server.engine, "fake", "bf16", "cpu"))
        status = await stub.GetWorkerStatus(StatusVersionPB())
        assert (status.role, status.alive, status.precision, status.status_version) == ("VIT", True, "bf16", 11)
        assert (status.available_concurrency, status.waiting_query_len, status.running_query_len) == (7, 1, 0)
        assert (status.available_kv_cache, status.total_kv_cache, status.max_batch_tokens_size) == (100, 200, 300)
        server.state.phase = Phase.DRAINING
        assert not (await stub.GetWorkerStatus(StatusVersionPB())).alive


async def test_counts_that_outgrow_the_wire_stop_at_its_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    grown = WorkerStatus(1 << 40, 1 << 40, 1 << 40, 1.0, 1 << 31, 1 << 40, True, "bf16", 1 << 40, 1 << 41, 1 << 40)
    monkeypatch.setattr(FakeEngine, "worker_status", lambda _: grown)
    async with serving() as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        status = await MultimodalRpcServiceStub(channel).GetWorkerStatus(StatusVersionPB())
    largest = (1 << 31) - 1
    assert (status.available_concurrency, status.waiting_query_len, status.running_query_len) == (largest,) * 3
    assert status.iterate_count == largest
    assert (status.status_version, status.total_kv_cache, status.max_batch_tokens_size) == (1 << 40, 1 << 41, 1 << 40)


async def test_cache_keys_come_only_to_a_caller_that_is_behind_and_wants_them() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        stub = MultimodalRpcServiceStub(channel)

        async def keys(version: int, need: bool) -> dict[int, bool]:
            asked = CacheVersionPB(latest_cache_version=version, need_cache_keys=need)
            status = await stub.GetCacheStatus(asked)
            figures = status.available_kv_cache, status.total_kv_cache, status.block_size, status.version
            assert figures == (100, 200, 1, 9)
            return dict(status.cache_keys)

        assert await keys(8, True) == {-3: True, 1 << 60: True}
        assert await keys(9, True) == {}
        assert await keys(8, False) == {}
