from __future__ import annotations

import asyncio
import inspect
import logging
import re
import socket
import time
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import pytest
import torch
from fake_engine import TIMINGS_MS, FakeEngine, free_start_port, serving
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from rtp_mm import errors
from rtp_mm.config import load_settings
from rtp_mm.engine.interface import time_limit_s
from rtp_mm.errors import StartError
from rtp_mm.logs import KeyValueFormatter
from rtp_mm.server import servicer, wire
from rtp_mm.server.app import open_ports
from rtp_mm.server.proto import (
    CacheVersionPB,
    MMPreprocessConfigPB,
    MultimodalInputPB,
    MultimodalInputsPB,
    MultimodalRpcServiceStub,
    StatusVersionPB,
    TensorPB,
    method_path,
)
from rtp_mm.server.servicer import caller_of
from rtp_mm.server.state import Loaded, Phase, ServerState
from rtp_mm.server.tensors import trans_tensor
from rtp_mm.types import MMPreprocessConfig, MultimodalInput, WorkerStatus

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
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call_raw(address, message.SerializeToString(), **kwargs)
    return caught.value


# --- answers


async def test_an_answer_carries_tensors_times_and_an_id() -> None:
    async with serving() as server:
        reply, trailing = await call_raw(server.grpc_address, request("img:3", "img:1").SerializeToString())
    expected = FakeEngine().answer([3, 1])
    result = wire.read_result(reply)
    assert all(map(torch.equal, result.embeddings, expected.embeddings))
    assert {stage: float(trailing[f"rtp-mm-{stage}-ms"]) for stage in TIMINGS_MS} == TIMINGS_MS
    assert len(trailing["rtp-mm-request-id"]) == 8


async def test_both_forms_come_over_the_wire_with_equal_tensors() -> None:
    async with serving(FakeEngine(has_extra_inputs=True)) as server:
        message = request("img:3", "img:0", "img:2").SerializeToString()
        replies = [
            (await call_raw(server.grpc_address, message, metadata=(("rtp-mm-wire", form),)))[0]
            for form in ("items", "concat")
        ]
    assert replies[0] != replies[1]
    items, concat = map(wire.read_result, replies)
    for name in ("embeddings", "position_ids", "extra_inputs"):
        assert all(map(torch.equal, getattr(items, name), getattr(concat, name)))


async def test_a_sync_stub_as_rtp_llm_has_it_gets_items() -> None:
    def ask(address: str) -> Any:
        with grpc.insecure_channel(address) as channel:
            return MultimodalRpcServiceStub(channel).RemoteMultimodalEmbedding(request("img:2", width=-1))

    async with serving(FakeEngine(has_position_ids=False)) as server:
        reply = await asyncio.to_thread(ask, server.grpc_address)
    assert trans_tensor(reply.multimodal_outputs[0].multimodal_embedding).shape == (2, 5)
    assert trans_tensor(reply.multimodal_outputs[0].multimodal_pos_id).shape == (0,)


async def test_a_client_built_from_reflection_alone_can_call() -> None:
    def ask(address: str) -> Any:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            assert set(database.get_services()) == {
                "MultimodalRpcService",
                "grpc.health.v1.Health",
                "grpc.reflection.v1alpha.ServerReflection",
            }
            pool = descriptor_pool.DescriptorPool(database)
            assert pool.FindServiceByName("grpc.health.v1.Health").methods_by_name["Check"]
            method = pool.FindServiceByName("MultimodalRpcService").methods_by_name["RemoteMultimodalEmbedding"]
            inputs = message_factory.GetMessageClass(method.input_type)()
            inputs.multimodal_inputs.add(multimodal_url="img:4", multimodal_type=1)
            invoke = channel.unary_unary(
                f"/{method.containing_service.full_name}/{method.name}",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=message_factory.GetMessageClass(method.output_type).FromString,
            )
            return invoke(inputs)

    async with serving() as server:
        reply = await asyncio.to_thread(ask, server.grpc_address)
        (output,) = reply.multimodal_outputs
        assert [*output.multimodal_embedding.shape] == [4, 5]
        assert output.multimodal_embedding.data_type == TensorPB.BF16
    async with serving(mm_wire="concat") as server:
        reply = await asyncio.to_thread(ask, server.grpc_address)
        assert [*reply.split_size] == [4]


@pytest.mark.parametrize("form", ["items", "concat"])
async def test_reflection_describes_files_that_stand_alone(form: str) -> None:
    def describe(address: str) -> list[str]:
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            file = database.FindFileContainingSymbol("MultimodalRpcService")
            descriptor_pool.DescriptorPool().Add(FileDescriptorProto.FromString(file.SerializeToString()))
            return [method.output_type for method in file.service[0].method]

    async with serving(mm_wire=form) as server:
        outputs = await asyncio.to_thread(describe, server.grpc_address)
    assert outputs[0] == (".MultimodalOutputsPB" if form == "items" else ".MultimodalOutputPB")


# --- errors

TABLE = [
    ("WrongFormatError", "MM_WRONG_FORMAT_ERROR", "INVALID_ARGUMENT"),
    ("NotSupportedError", "MM_NOT_SUPPORTED_ERROR", "INVALID_ARGUMENT"),
    ("DownloadRefusedError", "MM_DOWNLOAD_FAILED", "INVALID_ARGUMENT"),
    ("DownloadFailedError", "MM_DOWNLOAD_FAILED", "UNAVAILABLE"),
    ("DeadlineError", "MM_PROCESS_ERROR", "DEADLINE_EXCEEDED"),
    ("QueueFullError", "MM_PROCESS_ERROR", "RESOURCE_EXHAUSTED"),
    ("DrainingError", "MM_REMOTE_RPC_FAILED", "UNAVAILABLE"),
    ("LoadingError", "MM_EMPTY_ENGINE_ERROR", "UNAVAILABLE"),
    ("ReplyTooLargeError", "MM_LONG_PROMPT_ERROR", "INVALID_ARGUMENT"),
    ("ProcessError", "MM_PROCESS_ERROR", "INTERNAL"),
    ("UnauthenticatedError", "MM_NOT_SUPPORTED_ERROR", "UNAUTHENTICATED"),
    ("BadItemsError", "MM_WRONG_FORMAT_ERROR", "INVALID_ARGUMENT"),
]


def test_the_table_is_whole() -> None:
    raised = {
        name
        for name, cls in inspect.getmembers(errors, inspect.isclass)
        if issubclass(cls, errors.MMError) and name not in ("MMError", "RemoteCallError")  # the client's own
    }
    assert raised == {name for name, _, _ in TABLE}


async def test_every_error_arrives_with_its_name_and_status_and_the_server_goes_on() -> None:
    async with serving() as server:
        for cls, name, status in TABLE:
            error = await refusal(server.grpc_address, request("img:1", f"fail:{cls}"))
            assert error.code().name == status, cls
            assert error.details().startswith(f"[{name}] "), cls
            assert dict(error.trailing_metadata()).get("retry-after-ms") == ("250" if cls == "QueueFullError" else None)
        await call_raw(server.grpc_address, request("img:1").SerializeToString())


async def test_a_bad_item_is_named_to_the_client() -> None:
    async with serving() as server:
        error = await refusal(server.grpc_address, request("fail:BadItemsError"))
    assert error.details() == "[MM_WRONG_FORMAT_ERROR] item 1 (http://host/b.jpg): no image"


async def test_a_bug_leaks_neither_text_nor_stack_but_is_found_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server:
        error = await refusal(server.grpc_address, request("fail:ZeroDivisionError"))
    request_id = dict(error.trailing_metadata())["rtp-mm-request-id"]
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details() == f"[MM_PROCESS_ERROR] internal error, id {request_id}"
    (record,) = [record for record in caplog.records if record.exc_info]
    assert request_id in record.getMessage()
    assert "ZeroDivisionError: text of" in KeyValueFormatter().format(record)


@pytest.mark.parametrize("character", ["x", "猫", "\n", "\udcff"])
async def test_a_long_message_is_cut_to_a_kibibyte(monkeypatch: pytest.MonkeyPatch, character: str) -> None:
    def fail(_: FakeEngine, url: str) -> Any:
        raise errors.WrongFormatError(character * 100_000)

    monkeypatch.setattr(FakeEngine, "_rows", fail)
    async with serving() as server:
        error = await refusal(server.grpc_address, request("img:1"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert 1020 <= len(error.details().encode()) <= 1024
    assert error.details().endswith("...")


async def test_a_reply_over_the_limit_is_an_error_not_a_broken_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire.write_result, "__defaults__", (100,))
    async with serving() as server:
        error = await refusal(server.grpc_address, request("img:500"))
    assert error.details().startswith("[MM_LONG_PROMPT_ERROR] the reply takes ")


async def test_no_items_and_garbage_are_the_callers_fault() -> None:
    async with serving() as server:
        assert (await refusal(server.grpc_address, request())).details() == (
            "[MM_WRONG_FORMAT_ERROR] no items: multimodal_inputs is empty"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_raw(server.grpc_address, b"\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("[MM_WRONG_FORMAT_ERROR] ")


# --- time and callers


@pytest.mark.parametrize(
    ("remaining_s", "items_ms", "limit_s"),
    [
        (None, [], 120.0),
        (None, [-1, 0], 120.0),
        (5.0, [-1], 5.0),
        (None, [100, 3000, -1], 3.0),
        (2.0, [3000], 2.0),
        (None, [500_000], 120.0),
        (-0.5, [], 0.0),
    ],
)
def test_the_smallest_limit_counts(remaining_s: float | None, items_ms: list[int], limit_s: float) -> None:
    inputs = [MultimodalInput("x", config=MMPreprocessConfig(mm_timeout_ms=ms)) for ms in items_ms]
    assert time_limit_s(inputs, remaining_s, load_settings()) == limit_s


async def test_the_calls_deadline_reaches_the_engine() -> None:
    async with serving() as server:
        await call_raw(server.grpc_address, request("img:1").SerializeToString(), timeout=17.0)
        await call_raw(server.grpc_address, request("img:1", mm_timeout_ms=4000).SerializeToString())
    assert 10 < server.engine.asked[0][2] <= 17
    assert server.engine.asked[1][2] == 4


async def test_a_caller_that_leaves_cancels_the_work() -> None:
    async with serving() as server, grpc.aio.insecure_channel(server.grpc_address) as channel:
        call = channel.unary_unary(EMBED)(request("slow:60").SerializeToString())
        await until(lambda: server.engine.running == 1)
        call.cancel()
        await until(lambda: server.engine.cancelled == 1)
        await until(lambda: server.state.calls == 0)


@pytest.mark.parametrize(
    ("peer", "is_local"),
    [
        ("ipv4:127.0.0.1:5000", True),
        ("ipv4:127.9.9.9:5000", True),
        ("ipv6:%5B::1%5D:5000", True),
        ("ipv6:[::1]:5000", True),
        ("ipv6:%5B::ffff:127.0.0.1%5D:5000", True),
        ("unix:", True),
        ("unix:/run/a.sock", True),
        ("unix-abstract:a", True),
        ("ipv4:10.0.0.1:5000", False),
        ("ipv4:128.0.0.1:127", False),
        ("ipv6:%5B::ffff:10.0.0.1%5D:5000", False),
        ("ipv6:%5Bfe80::1%25eth0%5D:5000", False),
        ("ipv6:%5B::127.0.0.1%5D:5000", False),
        ("ipv4:127.0.0.1.evil.com:5000", False),
        ("ipv4:localhost:5000", False),
        ("unixoid:/x", False),
        ("vsock:1:2", False),
        ("127.0.0.1:5000", False),
        ("", False),
    ],
)
def test_who_is_local(peer: str, is_local: bool) -> None:
    assert caller_of(peer).is_local is is_local


async def test_a_loopback_call_is_local() -> None:
    async with serving() as server:
        await call_raw(server.grpc_address, request("img:1").SerializeToString())
    assert server.engine.asked[0][1].is_local


# --- phases, health and figures


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


async def http_status(server: Any, path: str) -> tuple[int, Any]:
    async with aiohttp.ClientSession() as http, http.get(f"{server.http_url}{path}") as response:
        return response.status, await response.json()


async def test_the_root_page_says_what_this_is() -> None:
    async with serving() as server, aiohttp.ClientSession() as http, http.get(f"{server.http_url}/") as response:
        about = await response.json()
    assert about["name"] == "rtp_mm"
    assert about["model"] == "fake"
    assert about["grpc_port"] == server.settings.start_port + 1


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


# --- logs and ports


async def test_each_call_leaves_one_line_that_no_url_can_forge(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rtp_mm")
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    async with serving() as server:
        message = request("img:3", "img:2").SerializeToString()
        reply, _ = await call_raw(
            server.grpc_address, message, metadata=(("traceparent", f"00-{trace}-00f067aa0ba902b7-01"),)
        )
        bad = MultimodalInputPB(multimodal_url='x" status=OK\nINFO call', multimodal_type=9)
        await refusal(server.grpc_address, MultimodalInputsPB(multimodal_inputs=[bad]))
        await refusal(server.grpc_address, request("fail:QueueFullError"))
    ok, refused, full = [KeyValueFormatter().format(r) for r in caplog.records if r.name == "rtp_mm.access"]
    assert re.fullmatch(
        rf"\S+ INFO call id=[0-9a-f]{{8}} trace={trace} peer=ipv4:127\.0\.0\.1:\d+ items=2 cached=0 tokens=5"
        rf" bytes_in=10 bytes_out={len(reply)} status=OK ms=[\d.]+ fetch_ms=1\.50 forward_ms=20\.25",
        ok,
    )
    assert "\n" not in refused
    assert " status=INVALID_ARGUMENT " in refused
    assert '\\" status=OK' in refused
    assert " status=RESOURCE_EXHAUSTED " in full
    assert full.endswith('retry_after_ms=250 error="[MM_PROCESS_ERROR] full"')


@pytest.mark.parametrize("traceparent", ["", "00-" + "0" * 32 + "-00f067aa0ba902b7-01", 'x" status=OK'])
async def test_a_traceparent_that_is_none_is_left_out(caplog: pytest.LogCaptureFixture, traceparent: str) -> None:
    caplog.set_level(logging.INFO, "rtp_mm")
    async with serving() as server:
        message = request("img:1").SerializeToString()
        await call_raw(server.grpc_address, message, metadata=(("traceparent", traceparent),))
    (line,) = [KeyValueFormatter().format(r) for r in caplog.records if r.name == "rtp_mm.access"]
    assert "trace=" not in line


async def test_the_access_log_can_be_turned_off(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rtp_mm")
    async with serving(disable_access_log=True) as server:
        await call_raw(server.grpc_address, request("img:3").SerializeToString())
    assert not [record for record in caplog.records if record.name == "rtp_mm.access"]


@pytest.mark.parametrize(("offset", "use"), [(0, "HTTP"), (1, "gRPC")])
async def test_a_taken_port_is_one_clear_line(offset: int, use: str, capfd: pytest.CaptureFixture[str]) -> None:
    port = free_start_port()
    settings = load_settings(None, start_port=port, mm_bind_address="127.0.0.1")
    line = f"cannot listen on 127.0.0.1:{port + offset} for {use}: Address already in use"
    with socket.create_server(("127.0.0.1", port + offset)), pytest.raises(StartError) as caught:
        async with open_ports(ServerState(), settings):
            pass
    assert str(caught.value) == line
    assert capfd.readouterr().err == ""


async def test_two_servers_never_share_a_port() -> None:
    async with serving(mm_bind_address="0.0.0.0") as server:
        settings = load_settings(None, start_port=server.settings.start_port + 1)
        with pytest.raises(StartError, match="Address already in use"):
            async with open_ports(ServerState(), settings):
                pass


def test_blanket_excepts_stand_at_the_edge_of_a_process_alone() -> None:
    """The server's, where an error becomes an answer, and a worker's, where it becomes a message to the server."""
    package = Path(servicer.__file__).parents[1]
    blanket = {path.name for path in package.rglob("*.py") if "except Exception" in path.read_text()}
    assert blanket == {"servicer.py", "worker.py"}


async def until(condition: Any) -> None:
    """Waits for what must happen soon; fails the test instead of hanging it."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, inspect.getsource(condition)
        await asyncio.sleep(0.005)
