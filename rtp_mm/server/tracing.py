"""A span for every embedding call, one beneath it for every stage; OpenTelemetry is imported where it is on."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from rtp_mm.config import Settings
from rtp_mm.errors import StartError
from rtp_mm.logs import log_event
from rtp_mm.server.call import Call, Metadata
from rtp_mm.server.proto import SERVICE

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span

_log = logging.getLogger(__name__)
_TRACEPARENT = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")
_CLOSE_LIMIT_S = 2.0
_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracing(Protocol):
    def begin(self, metadata: Metadata) -> Trace:
        """The trace of a call that came with this metadata."""

    def close(self) -> None:
        """Sends what is left; blocks for `_CLOSE_LIMIT_S` at most."""


class Trace(Protocol):
    """`id` is W3C's trace id, 32 hex digits, or `None` where the call belongs to none."""

    @property
    def id(self) -> str | None: ...

    def end(self, call: Call) -> None:
        """The call has ended."""


def tracing(settings: Settings) -> Tracing:
    """Spans to the OTLP endpoint that `OTEL_*` variables name, where those or `MM_OTEL` ask for it.

    Raises `StartError` where `MM_OTEL=1` asks and the packages are missing.
    """
    is_on = any(map(os.environ.get, _ENDPOINTS)) if settings.mm_otel is None else settings.mm_otel
    if not is_on:
        return NoTracing()
    if not _is_installed():
        missing = "OpenTelemetry is not installed: pip install 'rtp_mm[otel]'"
        if settings.mm_otel:
            raise StartError(f"MM_OTEL=1: {missing}")
        log_event(_log, "no spans", logging.WARNING, reason=missing)  # the endpoint may be the whole cluster's
        return NoTracing()
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OpenTelemetry(OTLPSpanExporter())


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http.trace_exporter") is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


class NoTracing:
    """Makes no spans; the caller's trace id still reaches the log."""

    def begin(self, metadata: Metadata) -> Trace:
        match = _TRACEPARENT.fullmatch(str(dict(metadata).get("traceparent", "")))
        return _CallersTrace(match[1] if match else None)

    def close(self) -> None:
        pass


class _CallersTrace:
    def __init__(self, id_: str | None) -> None:
        self.id = id_

    def end(self, call: Call) -> None:
        pass


class OpenTelemetry:
    """Spans of a provider of its own: what the process around it has set up for itself stays as it is."""

    def __init__(self, exporter: SpanExporter) -> None:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = "OTEL_SERVICE_NAME" in os.environ or "service.name=" in os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
        resource = Resource.create({} if named else {SERVICE_NAME: "rtp_mm"})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("rtp_mm")

    def begin(self, metadata: Metadata) -> Trace:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind

        carrier = {key: value for key, value in metadata if isinstance(value, str)}
        span = self._tracer.start_span(
            f"{SERVICE}/RemoteMultimodalEmbedding",
            context=extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "rpc.system": "grpc",
                "rpc.service": SERVICE,
                "rpc.method": "RemoteMultimodalEmbedding",
            },
        )
        return _SpanTrace(self._tracer, span)

    def close(self) -> None:
        """A collector that is gone would hold up the end of the process for as long as the exporter tries again."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(_CLOSE_LIMIT_S)


class _SpanTrace:
    def __init__(self, tracer: Any, span: Span) -> None:
        self._tracer, self._span = tracer, span
        self._started_ns = time.time_ns()
        context = span.get_span_context()
        self.id = f"{context.trace_id:032x}" if context.is_valid else None

    def end(self, call: Call) -> None:
        """Stages stand one after the other from the start on: their lengths are measured, their places are not."""
        import grpc
        from opentelemetry.trace import Status, StatusCode, set_span_in_context

        beneath = set_span_in_context(self._span)
        at = self._started_ns
        for stage, milliseconds in call.timings_ms.items():
            child = self._tracer.start_span(stage, context=beneath, start_time=at)
            at += round(milliseconds * 1e6)
            child.end(at)
        figures = {
            "rpc.grpc.status_code": grpc.StatusCode[call.status].value[0],
            "rtp_mm.request_id": call.id,
            "rtp_mm.items": call.items,
            "rtp_mm.cached_items": call.cached_items,
            "rtp_mm.tokens": call.tokens,
            "rtp_mm.received_bytes": call.received_bytes,
            "rtp_mm.sent_bytes": call.sent_bytes,
        }
        self._span.set_attributes({name: value for name, value in figures.items() if value is not None})
        if call.failure is not None:
            self._span.set_status(Status(StatusCode.ERROR, call.failure.wire_message))
        self._span.end()


def outgoing_context() -> tuple[tuple[str, str], ...]:
    """The current trace context as metadata, where this process uses OpenTelemetry at all."""
    if "opentelemetry" not in sys.modules:
        return ()
    from opentelemetry.propagate import inject

    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple(carrier.items())
