"""Spans: one per call, one beneath it per stage, in the caller's trace; and none where nobody asked."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from typing import Any

import pytest
from aiohttp import web
from fake_engine import TIMINGS_MS, free_start_port, serving
from opentelemetry import trace
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from server_calls import call_raw, refusal, request

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.logs import KeyValueFormatter
from rtp_mm.server import app
from rtp_mm.server import tracing as tracing_module
from rtp_mm.server.client import RemoteEngine
from rtp_mm.server.tracing import NoTracing, OpenTelemetry, tracing
from rtp_mm.types import MultimodalInput

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@pytest.fixture(autouse=True)
def _no_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "MM_OTEL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """What servers in this test export; there once the server is down."""
    exporter = InMemorySpanExporter()
    monkeypatch.setattr(exporter, "shutdown", lambda: None)  # else it forgets
    monkeypatch.setattr(app, "tracing", lambda _: OpenTelemetry(exporter))
    return exporter


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


async def test_a_call_is_a_span_in_the_callers_trace_with_its_stages_beneath(
    spans: InMemorySpanExporter, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rtp_mm")
    async with serving() as server:
        message = request("img:3", "img:2").SerializeToString()
        metadata = (("traceparent", f"00-{TRACE}-{SPAN}-01"),)
        _, trailing = await call_raw(server.grpc_address, message, metadata=metadata)
    found = by_name(spans)
    assert set(found) == {"MultimodalRpcService/RemoteMultimodalEmbedding", *TIMINGS_MS}
    call = found["MultimodalRpcService/RemoteMultimodalEmbedding"]
    assert call.kind is SpanKind.SERVER
    assert call.parent is not None
    assert (f"{call.context.trace_id:032x}", f"{call.parent.span_id:016x}") == (TRACE, SPAN)
    assert call.attributes is not None
    assert call.attributes["rpc.grpc.status_code"] == 0
    assert call.attributes["rtp_mm.tokens"] == 5
    assert call.attributes["rtp_mm.request_id"] == trailing["rtp-mm-request-id"]
    assert call.resource.attributes["service.name"] == "rtp_mm"
    end = call.start_time
    for stage, milliseconds in TIMINGS_MS.items():
        span = found[stage]
        assert span.parent is not None
        assert span.parent.span_id == call.context.span_id
        assert span.end_time - span.start_time == round(milliseconds * 1e6)
        assert span.start_time >= end
        end = span.end_time
    assert f" trace={TRACE} " in KeyValueFormatter().format(caplog.records[-1])


async def test_a_call_without_a_trace_begins_one_and_a_failure_is_its_status(spans: InMemorySpanExporter) -> None:
    async with serving() as server:
        await refusal(server.grpc_address, request("fail:QueueFullError"))
    (call,) = spans.get_finished_spans()
    assert call.parent is None
    assert call.status.status_code is StatusCode.ERROR
    assert call.status.description == "[MM_PROCESS_ERROR] full"
    assert call.attributes is not None
    assert call.attributes["rpc.grpc.status_code"] == 8


async def test_the_remote_engine_passes_the_current_context_on(spans: InMemorySpanExporter) -> None:
    provider = TracerProvider()
    async with serving() as server:
        engine = RemoteEngine(server.grpc_address)
        with trace.use_span(provider.get_tracer("caller").start_span("outer")) as outer:
            await engine.embed([MultimodalInput("img:1")])
        engine.close()
    call = by_name(spans)["MultimodalRpcService/RemoteMultimodalEmbedding"]
    assert call.parent is not None
    assert call.parent.span_id == outer.get_span_context().span_id
    assert call.context.trace_id == outer.get_span_context().trace_id


async def test_spans_reach_the_endpoint_that_the_environment_names(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []

    async def collect(incoming: web.Request) -> web.Response:
        received.append(ExportTraceServiceRequest.FromString(await incoming.read()))
        return web.Response()

    collector = web.Application()
    collector.router.add_post("/v1/traces", collect)
    runner = web.AppRunner(collector)
    await runner.setup()
    port = free_start_port()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    async with serving() as server:
        await call_raw(server.grpc_address, request("img:3").SerializeToString())
    await runner.cleanup()
    names = {
        span.name
        for message in received
        for resource in message.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert names == {"MultimodalRpcService/RemoteMultimodalEmbedding", *TIMINGS_MS}


@pytest.mark.parametrize(
    ("endpoint", "mm_otel", "is_on"),
    [(None, None, False), (None, True, True), ("http://127.0.0.1:1", None, True), ("http://127.0.0.1:1", False, False)],
)
def test_what_turns_it_on(
    monkeypatch: pytest.MonkeyPatch, endpoint: str | None, mm_otel: bool | None, is_on: bool
) -> None:
    if endpoint:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    chosen = tracing(load_settings(None, mm_otel=mm_otel))
    assert isinstance(chosen, OpenTelemetry if is_on else NoTracing)
    chosen.close()


def test_without_the_packages_asking_is_an_error_and_an_endpoint_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracing_module, "_is_installed", lambda: False)
    with pytest.raises(StartError, match=r"rtp_mm\[otel\]"):
        tracing(load_settings(None, mm_otel=True))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    assert isinstance(tracing(load_settings()), NoTracing)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_opentelemetry_is_not_imported_unless_it_is_on() -> None:
    code = """
import asyncio, sys
sys.path.insert(0, "tests")
from fake_engine import serving
from rtp_mm.server.tracing import outgoing_context
async def main():
    async with serving():
        assert outgoing_context() == ()
asyncio.run(main())
print(*[name for name in sys.modules if name.startswith(("opentelemetry", "torch"))])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


async def test_a_host_that_uses_opentelemetry_keeps_its_own_provider(spans: InMemorySpanExporter) -> None:
    before = trace.get_tracer_provider()
    async with serving():
        await asyncio.sleep(0)
    assert trace.get_tracer_provider() is before
