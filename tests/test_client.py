from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import grpc
import pytest
import torch
from fake_engine import TIMINGS_MS, FakeEngine, free_start_port, serving
from test_servicer import TABLE
from test_wire import assert_same
from waiting import until

from rtp_mm import errors, library
from rtp_mm.config import Settings, load_settings
from rtp_mm.errors import StartError
from rtp_mm.library import create_engine
from rtp_mm.server import wire
from rtp_mm.server.client import RemoteEngine, server_address
from rtp_mm.server.proto import MultimodalRpcServiceServicer, add_MultimodalRpcServiceServicer_to_server
from rtp_mm.types import MMPreprocessConfig, MMUrlType, MultimodalInput


async def test_the_remote_engine_answers_as_the_local_one() -> None:
    local = FakeEngine(has_extra_inputs=True)
    async with serving(local) as server, remote(server.grpc_address) as engine:
        inputs = [MultimodalInput("img:3"), MultimodalInput("img:0"), MultimodalInput("img:2")]
        expected = local.answer([3, 0, 2])
        assert_same(await engine.embed(inputs), expected)
        answer = await asyncio.to_thread(engine.submit, ["img:3", "img:0", "img:2"])
        assert_same(answer, expected)
        assert answer.timings_ms == TIMINGS_MS
        assert await asyncio.to_thread(engine.worker_status) == local.worker_status()
        assert await asyncio.to_thread(engine.model) == "fake"
        statuses = await asyncio.to_thread(lambda: [engine.cache_status(with_keys=keys) for keys in (False, True)])
        assert [set(status.keys) for status in statuses] == [set(), {-3, 1 << 60}]


async def test_a_server_that_is_loading_tells_no_model() -> None:
    async with serving(is_loaded=False) as server, remote(server.grpc_address) as engine:
        assert await asyncio.to_thread(engine.model) is None


async def test_messages_over_grpcs_default_limit_go_both_ways() -> None:
    pixels = torch.zeros(1000, 1000, 3, dtype=torch.int32)  # 12 MB; gRPC's own limit is 4 MiB
    async with serving() as server, remote(server.grpc_address) as engine:
        answer = await asyncio.to_thread(engine.submit, ["img:1000000"], [MMUrlType.TENSOR], [pixels])
    assert answer.embeddings[0].shape == (1_000_000, 5)


async def test_types_configs_and_tensors_arrive() -> None:
    config = MMPreprocessConfig(width=56, height=84, crop_positions=[0, 0, 0.5, 1])
    pixels = torch.arange(12, dtype=torch.int32).view(2, 2, 3)
    async with serving() as server, remote(server.grpc_address) as engine:
        types = [MMUrlType.IMAGE, MMUrlType.TENSOR]
        await asyncio.to_thread(engine.submit, ["img:1", "x"], types, [None, pixels], [config, [-1, -1, 4, 9]])
        (first, second), _, _ = server.engine.asked[0]
    assert (first.mm_type, first.config, first.tensor) == (MMUrlType.IMAGE, config, None)
    assert second.config == MMPreprocessConfig(min_pixels=4, max_pixels=9)
    assert torch.equal(torch.tensor(second.tensor), pixels)


async def test_every_error_comes_back_as_the_class_that_was_raised() -> None:
    async with serving() as server, remote(server.grpc_address) as engine:
        for name, _, _ in TABLE:
            with pytest.raises(errors.MMError) as caught:
                await engine.embed([MultimodalInput(f"fail:{name}")])
            expected = "WrongFormatError" if name == "BadItemsError" else name  # the verdict's class
            assert type(caught.value).__name__ == expected
            if name == "QueueFullError":
                assert caught.value.retry_after_ms == 250
            if name == "BadItemsError":
                assert str(caught.value) == "item 1 (http://host/b.jpg): no image"


async def test_an_absent_server_is_named() -> None:
    address = f"127.0.0.1:{free_start_port()}"
    async with remote(address) as engine:
        with pytest.raises(errors.RemoteCallError, match=address):
            await engine.embed([MultimodalInput("img:1")])
        with pytest.raises(errors.RemoteCallError, match=address):
            await asyncio.to_thread(engine.worker_status)


async def test_the_http_port_in_place_of_grpcs_is_named() -> None:
    async with serving() as server, remote(f"127.0.0.1:{server.settings.start_port}") as engine:
        with pytest.raises(errors.RemoteCallError, match="an HTTP port; gRPC listens on the next one"):
            await engine.embed([MultimodalInput("img:1")])


async def test_time_limits_are_kept_on_both_sides() -> None:
    async with serving() as server, remote(server.grpc_address) as engine:
        with pytest.raises(errors.DeadlineError):
            await engine.embed([MultimodalInput("slow:60")], timeout_s=0.05)
        await until(lambda: server.engine.running == 0)
    async with serving() as server, remote(server.grpc_address, mm_timeout_ms=50) as engine:
        with pytest.raises(errors.DeadlineError):
            await asyncio.to_thread(engine.submit, ["slow:60"])


async def test_cancelling_cancels_on_the_server() -> None:
    async with serving() as server, remote(server.grpc_address) as engine:
        task = asyncio.create_task(engine.embed([MultimodalInput("slow:60")]))
        await until(lambda: server.engine.running == 1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: server.engine.cancelled == 1)


async def test_one_engine_serves_many_threads_and_loops() -> None:
    async with serving() as server, remote(server.grpc_address) as engine:

        def ask(rows: int) -> list[int]:
            sync = engine.submit([f"img:{rows}"]).embeddings
            own_loop = asyncio.run(engine.embed([MultimodalInput(f"img:{rows}")])).embeddings
            return [tensor.shape[0] for tensor in sync + own_loop]

        def ask_all() -> list[list[int]]:
            with ThreadPoolExecutor(8) as pool:
                return list(pool.map(ask, range(40)))

        assert await asyncio.to_thread(ask_all) == [[rows, rows] for rows in range(40)]


async def test_a_closed_engine_says_so() -> None:
    async with serving() as server:
        engine = RemoteEngine(server.grpc_address)
        engine.close()
        with pytest.raises(errors.DrainingError, match="closed"):
            await engine.embed([MultimodalInput("img:1")])


@pytest.mark.parametrize(
    "item",
    [
        MultimodalInput("\ud800"),
        MultimodalInput("x", config=MMPreprocessConfig(width=2**40, height=1)),
        MultimodalInput("", MMUrlType.TENSOR, tensor="pixels"),
    ],
)
def test_what_the_wire_cannot_carry_is_named(item: MultimodalInput) -> None:
    engine = RemoteEngine("127.0.0.1:1")
    with pytest.raises(errors.BadItemsError, match="item 0"):
        engine._start([item], None)
    engine.close()


# --- servers that are not ours


async def test_a_server_that_knows_one_form_only_is_understood() -> None:
    """RTP-LLM's own server ignores `rtp-mm-wire`."""
    result = FakeEngine(has_extra_inputs=True).answer([3, 0, 2])
    for form in ("items", "concat"):
        reply = wire.write_result(result, form)
        async with foreign(lambda context, reply=reply: answer(reply)) as address, remote(address) as engine:
            assert_same(await engine.embed([MultimodalInput("x")]), result)


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (grpc.StatusCode.INTERNAL, "Traceback", errors.RemoteCallError),
        (grpc.StatusCode.UNKNOWN, "[MM_PROCESS_ERROR] odd status", errors.RemoteCallError),
        (grpc.StatusCode.INTERNAL, "[MM_PROCESS_ERROR] NaN", errors.ProcessError),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", errors.DeadlineError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "[MM_PROCESS_ERROR] full", errors.QueueFullError),
    ],
)
async def test_foreign_errors_find_a_class(code: grpc.StatusCode, details: str, expected: type) -> None:
    async with foreign(lambda context: context.abort(code, details)) as address, remote(address) as engine:
        with pytest.raises(errors.MMError) as caught:
            await engine.embed([MultimodalInput("x")])
    assert type(caught.value) is expected


async def test_a_reply_that_is_none_is_the_servers_fault() -> None:
    async with foreign(lambda context: answer(b"\xff\xff")) as address, remote(address) as engine:
        with pytest.raises(errors.RemoteCallError, match="no reply"):
            await engine.embed([MultimodalInput("x")])


# --- the front door


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.1", "10.0.0.1:8089"),
        ("10.0.0.1:9", "10.0.0.1:9"),
        ("::1", "[::1]:8089"),
        ("[::1]", "[::1]:8089"),
        ("[::1]:9", "[::1]:9"),
        ("tower.local", "tower.local:8089"),
        ("tower.local:9", "tower.local:9"),
    ],
)
def test_an_address_gets_brackets_and_the_default_port(text: str, address: str) -> None:
    assert server_address(text) == address


def test_an_address_is_no_url() -> None:
    with pytest.raises(StartError, match=r"host\[:port\], not a URL"):
        RemoteEngine("http://127.0.0.1:12346")


async def test_create_engine_2_calls_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        monkeypatch.setenv("REMOTE_VIT_SERVER_IP", server.grpc_address)
        monkeypatch.setenv("VIT_SEPARATION", "2")
        engine = create_engine()
        try:
            answer = await asyncio.to_thread(engine.submit, ["img:6"])
        finally:
            engine.close()
            engine.close()
    assert answer.embeddings[0].shape == (6, 5)


@pytest.mark.parametrize(("asked", "used"), [({}, "0"), ({"mm_cuda_graphs": "1"}, "1")])
def test_beside_another_engine_graphs_are_for_those_who_ask(
    asked: dict[str, str], used: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A capture fails where that one waits for the device meanwhile."""
    loaded: list[Settings] = []
    monkeypatch.setattr(library, "load_engine", lambda settings: loaded.append(settings) or Mock())
    create_engine(checkpoint_path="/anywhere", **asked)
    assert [settings.mm_cuda_graphs for settings in loaded] == [used]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"vit_separation": 1}, "python -m rtp_mm.start_server"),
        ({"vit_separation": 2}, "REMOTE_VIT_SERVER_IP"),
        ({}, "CHECKPOINT_PATH is not set"),
        ({"checkpoint_path": "/nowhere"}, "/nowhere"),
        ({"act_type": "int4"}, "ACT_TYPE"),
    ],
)
def test_options_that_name_no_engine_say_so(options: dict[str, Any], line: str) -> None:
    with pytest.raises(StartError, match=line):
        create_engine(**options)


class remote:
    """A `RemoteEngine` that is closed at the end."""

    def __init__(self, address: str, **options: Any) -> None:
        self.engine = RemoteEngine(address, load_settings(None, **options))

    async def __aenter__(self) -> RemoteEngine:
        return self.engine

    async def __aexit__(self, *_: object) -> None:
        self.engine.close()


class foreign:
    """A server of somebody else's, whose one method is `handle`."""

    def __init__(self, handle: Callable[[Any], Awaitable[Any]]) -> None:
        class Servicer(MultimodalRpcServiceServicer):
            async def RemoteMultimodalEmbedding(self, request: Any, context: Any) -> Any:
                return await handle(context)

        self.servicer = Servicer()

    async def __aenter__(self) -> str:
        self.server = grpc.aio.server()
        add_MultimodalRpcServiceServicer_to_server(self.servicer, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.server.start()
        return f"127.0.0.1:{port}"

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(grace=0)


async def answer(reply: Any) -> Any:
    return reply


def test_no_thread_is_left_behind() -> None:
    before = threading.active_count()
    engine = RemoteEngine("127.0.0.1:1")
    with pytest.raises(errors.RemoteCallError):
        engine.submit(["x"])
    engine.close()
    assert threading.active_count() <= before + 1  # grpc's own poller may end a moment later
