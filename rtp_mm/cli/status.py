"""`rtp-mm status`: what a running server is doing, from its gRPC status and its `/metrics`."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table

from rtp_mm.config import Settings, load_settings
from rtp_mm.errors import StartError
from rtp_mm.server.client import RemoteEngine
from rtp_mm.server.security import authorization, bearer_token, client_context
from rtp_mm.types import CacheStatus, WorkerStatus

Samples = dict[str, list[tuple[dict[str, str], float]]]
_TIMEOUT_S = 10.0


def run(server: str) -> None:
    """`server` is the gRPC address; HTTP is on the port before. Raises `MMError` and `StartError`."""
    settings = load_settings()
    engine = RemoteEngine(server, settings)
    try:
        worker, cache = engine.worker_status(), engine.cache_status()
    finally:
        engine.close()
    Console().print(table(engine.address, worker, cache, _metrics(engine.address, settings)))


def table(address: str, worker: WorkerStatus, cache: CacheStatus, metrics: Samples) -> Table:
    shown = Table("", "", title=address, show_header=False)
    for name, value in [*_status_rows(worker, cache), *_metric_rows(metrics)]:
        shown.add_row(name, value)
    return shown


def _metrics(grpc_address: str, settings: Settings) -> Samples:
    host, _, port = grpc_address.rpartition(":")
    context = client_context(settings)
    url = f"{'https' if context else 'http'}://{host}:{int(port) - 1}/metrics"
    request = urllib.request.Request(url, headers=dict(authorization(bearer_token(settings))))
    handlers: list[urllib.request.BaseHandler] = [urllib.request.ProxyHandler({})]  # the environment's is for others
    if context is not None:
        handlers.append(urllib.request.HTTPSHandler(context=context))
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=_TIMEOUT_S) as response:
            text = response.read().decode()
    except (urllib.error.URLError, ssl.SSLError, TimeoutError) as error:
        raise StartError(f"{url}: {getattr(error, 'reason', error)}") from None
    samples: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            samples.setdefault(sample.name, []).append((sample.labels, sample.value))
    return samples


def _status_rows(worker: WorkerStatus, cache: CacheStatus) -> Iterator[tuple[str, str]]:
    yield "takes calls", "yes" if worker.is_alive else "no"
    yield "requests", f"{worker.running} running, room for {worker.available_concurrency} more"
    yield "waiting for the device", f"{worker.waiting} items"
    yield "last forward", f"{worker.step_latency_ms:.1f} ms, {worker.iterations:,} so far"
    used = cache.total_bytes - cache.available_bytes
    yield "embedding cache", f"{used / 2**20:,.1f} of {cache.total_bytes / 2**20:,.1f} MiB"


def _metric_rows(metrics: Samples) -> Iterator[tuple[str, str]]:
    def value(name: str) -> float:
        return sum(value for _, value in metrics.get(name, []))

    for labels, _ in metrics.get("rtp_mm_build_info", []):
        yield "model", "{model} {dtype} on {device}, rtp_mm {version}".format(**labels)
    calls = [(labels["error"] or "OK", count) for labels, count in metrics.get("rtp_mm_requests_total", [])]
    yield "calls", ", ".join(f"{int(count):,} {name}" for name, count in calls)
    for share in (0.5, 0.95, 0.99):
        yield f"p{share * 100:g}", f"{quantile(metrics.get('rtp_mm_request_duration_seconds_bucket', []), share)}"
    yield "tokens", f"{value('rtp_mm_tokens_total'):,.0f}"
    yield "batch fill", f"{value('rtp_mm_batch_fill_ratio'):.0%}"
    for labels, hits in metrics.get("rtp_mm_cache_hits_total", []):
        misses = sum(v for other, v in metrics.get("rtp_mm_cache_misses_total", []) if other == labels)
        yield f"{labels['cache']} cache", f"{hits:,.0f} hits, {misses:,.0f} misses"
    yield "workers", f"{value('rtp_mm_workers_busy'):.0f} of {value('rtp_mm_workers'):.0f} busy"
    yield "server's memory", f"{value('process_resident_memory_bytes') / 2**20:,.0f} MiB"


def quantile(buckets: list[tuple[dict[str, str], float]], share: float) -> str:
    """Between which bounds of a histogram that share of its values lies: `10 ms to 25 ms`."""
    total = buckets[-1][1] if buckets else 0
    if not total:
        return "no calls"
    below = "0"
    for labels, count in buckets:
        if count >= share * total:
            return f"{below} to {_time(labels['le'])}"
        below = _time(labels["le"])
    raise ValueError("the last bucket of a histogram must hold everything")


def _time(bound: str) -> str:
    if bound == "+Inf":
        return "more"
    seconds = float(bound)
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1e3:g} ms"
