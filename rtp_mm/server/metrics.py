"""What `/metrics` says, from a registry of its own: the calls as the servicer saw them, and what the engine says when
it is asked. docs/OPERATION.md lists every name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from rtp_mm import __version__
from rtp_mm.server.call import Call
from rtp_mm.server.state import ServerState
from rtp_mm.types import EngineStats, MMUrlType

STAGES = ("fetch", "preprocess", "queue", "forward")
# From a cached answer to MM_TIMEOUT_MS.
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

_GAUGES: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("rtp_mm_requests_running", "Requests in the engine", lambda s: s.requests_running),
    ("rtp_mm_queue_items", "Prepared items that wait for the device", lambda s: s.items_waiting),
    ("rtp_mm_queue_patches", "Patches that wait for the device", lambda s: s.patches_waiting),
    ("rtp_mm_in_flight_bytes", "Host memory held for requests in progress", lambda s: s.bytes_in_flight),
    ("rtp_mm_batch_budget_patches", "Patches that one forward may hold", lambda s: s.batch_patches_budget),
    ("rtp_mm_batch_fill_ratio", "Patches per forward over the budget, since the start", lambda s: _fill(s)),
    ("rtp_mm_workers", "Preprocess workers", lambda s: s.workers),
    ("rtp_mm_workers_busy", "Preprocess workers with an item", lambda s: s.workers_busy),
)
_COUNTERS: tuple[tuple[str, str, Callable[[EngineStats], float]], ...] = (
    ("rtp_mm_batches", "Forwards", lambda s: s.batches),
    ("rtp_mm_batch_items", "Items in all forwards", lambda s: s.batch_items),
    ("rtp_mm_batch_patches", "Patches in all forwards", lambda s: s.batch_patches),
    ("rtp_mm_forward_failures", "Forwards that failed", lambda s: s.forward_failures),
    ("rtp_mm_fetched_bytes", "Bytes of downloads and local files", lambda s: s.fetched_bytes),
    ("rtp_mm_decoded_frames", "Frames of videos decoded", lambda s: s.decoded_frames),
    ("rtp_mm_device_decodes", "Items decoded on the device", lambda s: s.device_decodes),
)
_COUNTERS_BY: tuple[tuple[str, str, str, Callable[[EngineStats], Mapping[str, int]]], ...] = (
    ("rtp_mm_rejections", "Requests refused because the server was full", "reason", lambda s: s.rejections),
    ("rtp_mm_worker_restarts", "Preprocess workers replaced", "cause", lambda s: s.worker_restarts),
    ("rtp_mm_cpu_decodes", "Items meant for the device, decoded on the CPU", "reason", lambda s: s.cpu_decodes),
)
_CACHE_GAUGES = (
    ("rtp_mm_cache_items", "Entries in a cache", "items"),
    ("rtp_mm_cache_used_bytes", "Bytes in a cache", "used_bytes"),
    ("rtp_mm_cache_budget_bytes", "Bytes that a cache may hold", "budget_bytes"),
)
_CACHE_COUNTERS = (
    ("rtp_mm_cache_hits", "Look-ups answered by a cache", "hits"),
    ("rtp_mm_cache_misses", "Look-ups not answered by a cache", "misses"),
    ("rtp_mm_cache_evictions", "Entries that made room for others", "evictions"),
)


class Metrics:
    """The metrics of one server process."""

    def __init__(self, state: ServerState) -> None:
        self._registry = registry = CollectorRegistry()
        requests = Counter(
            "rtp_mm_requests",
            "Embedding calls by gRPC status and error name",
            ["status", "error"],
            registry=registry,
        )
        self._seconds = Histogram(
            "rtp_mm_request_duration_seconds",
            "Time from a parsed request to its reply, errors included",
            buckets=_SECONDS,
            registry=registry,
        )
        stages = Histogram(
            "rtp_mm_stage_duration_seconds",
            "Time a request's slowest item spent in a stage",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        items = Counter("rtp_mm_items", "Items asked for, by type", ["type"], registry=registry)
        self._tokens = Counter("rtp_mm_tokens", "Embedding rows answered", registry=registry)
        self._received = Counter(
            "rtp_mm_received_bytes", "Bytes of URLs, data URLs and tensors in requests", registry=registry
        )
        self._sent = Counter("rtp_mm_sent_bytes", "Bytes of replies", registry=registry)
        unauthenticated = Counter(
            "rtp_mm_unauthenticated", "Calls without the right credentials", ["protocol"], registry=registry
        )
        # By label, each looked up once.
        self._requests, self._stages, self._items = cache(requests.labels), cache(stages.labels), cache(items.labels)
        self._unauthenticated = cache(unauthenticated.labels)
        self._declare_labels()
        registry.register(_EngineCollector(state))
        ProcessCollector(registry=registry)

    def _declare_labels(self) -> None:
        """Series that exist from the start, so that a rate sees the first event."""
        self._requests("OK", "")
        for stage in STAGES:
            self._stages(stage)
        for mm_type in MMUrlType:
            self._items(mm_type.name.lower())
        for protocol in ("grpc", "http"):
            self._unauthenticated(protocol)

    def observe(self, call: Call) -> None:
        """A call that has ended."""
        self._requests(call.status, call.failure.name if call.failure else "").inc()
        self._seconds.observe(call.seconds or 0.0)
        for stage, milliseconds in call.timings_ms.items():
            self._stages(stage).observe(milliseconds / 1e3)
        for mm_type, count in call.types.items():
            self._items(mm_type).inc(count)
        for counter, amount in (
            (self._tokens, call.tokens),
            (self._received, call.received_bytes),
            (self._sent, call.sent_bytes),
        ):
            if amount:
                counter.inc(amount)

    def refused(self, protocol: str) -> None:
        """A call without the right credentials; `protocol` is grpc or http."""
        self._unauthenticated(protocol).inc()

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All metrics in the format that an `Accept` header asks for, and its content type."""
        try:
            encode, content_type = choose_encoder(accept)
        except (ValueError, TypeError):  # from a version that is none
            encode, content_type = choose_encoder("")
        return encode(self._registry), content_type


class _EngineCollector(Collector):
    """Asks the engine whenever somebody reads the metrics; zeros while nothing is loaded."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        loaded = self._state.loaded
        stats = loaded.engine.stats() if loaded else EngineStats()
        yield _gauge("rtp_mm_serving", "1 while calls are taken and the device answers", self._state.is_serving)
        info = GaugeMetricFamily("rtp_mm_build_info", "Always 1", labels=["version", "model", "dtype", "device"])
        model, dtype, device = (loaded.model, loaded.dtype, loaded.device) if loaded else ("", "", "")
        info.add_metric([__version__, model, dtype, device], 1)
        yield info
        for name, help_, read in _GAUGES:
            yield _gauge(name, help_, read(stats))
        for name, help_, read in _COUNTERS:
            yield CounterMetricFamily(name, help_, read(stats))
        for name, help_, label, read_by in _COUNTERS_BY:
            counter = CounterMetricFamily(name, help_, labels=[label])
            for value, count in read_by(stats).items():
                counter.add_metric([value], count)
            yield counter
        for name, help_, attribute in _CACHE_GAUGES:
            yield _by_cache(GaugeMetricFamily(name, help_, labels=["cache"]), stats, attribute)
        for name, help_, attribute in _CACHE_COUNTERS:
            yield _by_cache(CounterMetricFamily(name, help_, labels=["cache"]), stats, attribute)


def _gauge(name: str, help_: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, help_, float(value))


def _by_cache(
    family: GaugeMetricFamily | CounterMetricFamily, stats: EngineStats, attribute: str
) -> GaugeMetricFamily | CounterMetricFamily:
    for name, figures in stats.caches.items():
        family.add_metric([name], getattr(figures, attribute))
    return family


def _fill(stats: EngineStats) -> float:
    room = stats.batches * stats.batch_patches_budget
    return stats.batch_patches / room if room else 0.0
