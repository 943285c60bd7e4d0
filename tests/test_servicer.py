"""The embedding call: its answers, its errors, its deadline and its caller."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import weakref
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
import torch
from fake_engine import TIMINGS_MS, FakeEngine, serving
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from server_calls import EMBED, call_raw, refusal, request
from waiting import until

from rtp_mm import errors
from rtp_mm.config import load_settings
from rtp_mm.engine.interface import time_limit
from rtp_mm.logs import KeyValueFormatter
from rtp_mm.server import proto, wire
from rtp_mm.server.proto import MultimodalRpcServiceStub, TensorPB
from rtp_mm.server.servicer import caller_of
from rtp_mm.server.tensors import trans_tensor
from rtp_mm.types import MMEmbeddingRes, MMPreprocessConfig, MultimodalInput


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


@pytest.mark.parametrize("form", ["items", "concat"])
@pytest.mark.parametrize("is_large", [True, False])
async def test_a_large_reply_is_not_joined_on_the_event_loop(
    is_large: bool, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written_by = []

    def write(*args: Any) -> bytes:
        written_by.append(threading.current_thread() is threading.main_thread())
        return write_result(*args)

    write_result = wire.write_result
    monkeypatch.setattr(wire, "write_result", write)
    if is_large:
        monkeypatch.setattr("rtp_mm.server.servicer.COPIED_ON_LOOP", 0)
    async with serving() as server:
        metadata = ((wire.WIRE_METADATA, form),)
        reply, _ = await call_raw(server.grpc_address, request("img:3", "img:1").SerializeToString(), metadata=metadata)
    assert [len(embedding) for embedding in wire.read_result(reply).embeddings] == [3, 1]
    assert written_by == [not is_large]


async def test_an_answer_that_is_sent_is_held_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []

    def answer(engine: FakeEngine, rows: Sequence[int]) -> MMEmbeddingRes:
        result = made(engine, rows)
        answers.append(weakref.ref(result))
        return result

    made = FakeEngine.answer
    monkeypatch.setattr(FakeEngine, "answer", answer)
    gc.collect()
    gc.disable()  # what hangs in a cycle would stay until it comes by
    try:
        async with serving() as server:
            await call_raw(server.grpc_address, request("img:3").SerializeToString())
            await until(lambda: [held() for held in answers] == [None])
    finally:
        gc.enable()


async def test_no_items_and_garbage_are_the_callers_fault() -> None:
    async with serving() as server:
        assert (await refusal(server.grpc_address, request())).details() == (
            "[MM_WRONG_FORMAT_ERROR] no items: multimodal_inputs is empty"
        )
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_raw(server.grpc_address, b"\xff\xff")
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert caught.value.details().startswith("[MM_WRONG_FORMAT_ERROR] ")


async def test_a_compressed_message_is_refused_unopened() -> None:
    async with serving() as server:
        error = await refusal(server.grpc_address, request("img:1"), compression=grpc.Compression.Gzip)
        await call_raw(server.grpc_address, request("img:1").SerializeToString())
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert len(server.engine.asked) == 1


async def test_too_many_items_are_refused_before_they_are_parsed() -> None:
    async with serving() as server:
        most = request(*["img:0"] * proto.MAX_ITEMS).SerializeToString()
        await call_raw(server.grpc_address, most)
        for rest in (b"\x0a\0", b"\x78\x01", b"\x0a\0" * 1_000_000):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_raw(server.grpc_address, most + rest)
            assert caught.value.details().startswith("[MM_WRONG_FORMAT_ERROR] over the limit of 1024 items")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(server.engine.asked) == 1


@pytest.mark.parametrize(
    ("remaining_s", "items_ms", "limit_s", "source"),
    [
        (None, [], 120.0, "MM_TIMEOUT_MS"),
        (None, [-1, 0], 120.0, "MM_TIMEOUT_MS"),
        (5.0, [-1], 5.0, "the caller's deadline"),
        (None, [100, 3000, -1], 3.0, "mm_timeout_ms"),
        (2.0, [3000], 2.0, "the caller's deadline"),
        (None, [500_000], 120.0, "MM_TIMEOUT_MS"),
        (-0.5, [], 0.0, "the caller's deadline"),
    ],
)
def test_the_smallest_limit_counts(remaining_s: float | None, items_ms: list[int], limit_s: float, source: str) -> None:
    inputs = [MultimodalInput("x", config=MMPreprocessConfig(mm_timeout_ms=ms)) for ms in items_ms]
    assert time_limit(inputs, remaining_s, load_settings()) == (limit_s, source)


async def test_the_calls_deadline_reaches_the_engine() -> None:
    async with serving() as server:
        await call_raw(server.grpc_address, request("img:1").SerializeToString(), timeout=17.0)
        await call_raw(server.grpc_address, request("img:1", mm_timeout_ms=4000).SerializeToString())
    assert 10 < server.engine.asked[0][2] < 18  # gRPC rounds it up on its way
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
