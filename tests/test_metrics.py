"""`/metrics`: every documented name, in Prometheus's own words, with what really happened behind it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from fake_engine import TIMINGS_MS, FakeEngine, Serving, serving
from prometheus_client.parser import text_string_to_metric_families
from server_calls import call_raw, refusal, request
from waiting import until

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.logs import KeyValueFormatter
from rtp_mm.models.registry import load_model
from rtp_mm.types import CacheStats, EngineStats

OPERATION = (Path(__file__).parents[1] / "docs" / "OPERATION.md").read_text()
FIGURES = EngineStats(
    requests_running=3,
    items_waiting=4,
    patches_waiting=500,
    bytes_in_flight=6000,
    batches=7,
    batch_patches=2800,
    batch_items=90,
    batch_patches_budget=1000,
    forward_failures=1,
    rejections={"requests": 2, "bytes": 3},
    caches={"embeddings": CacheStats(1, 20, 300, 4, 5, 6), "bytes": CacheStats(hits=9)},
    workers=8,
    workers_busy=5,
    worker_restarts={"crash": 2},
    device_decodes=8,
    cpu_decodes={"codec": 2},
    fetched_bytes=12345,
    decoded_frames=67,
)
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


async def scrape(server: Serving, accept: str = "*/*") -> str:
    headers = {"Accept": accept}
    async with aiohttp.ClientSession() as http, http.get(f"{server.http_url}/metrics", headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Type"].startswith("text/plain; version=")
        return await response.text()


def samples(text: str) -> Samples:
    families = text_string_to_metric_families(text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


async def test_the_documented_metrics_are_those_that_are_there() -> None:
    documented = {
        name.removesuffix("_total"): (kind, {label for label in labels.split(", ") if label})
        for name, kind, labels in re.findall(r"^\| `(rtp_mm_\w+)` \| (\w+) \| ([\w, ]*) ?\|", OPERATION, re.MULTILINE)
        for labels in [labels.strip()]
    }
    engine = FakeEngine()
    engine.figures = FIGURES
    async with serving(engine) as server:
        families = [f for f in text_string_to_metric_families(await scrape(server)) if f.name.startswith("rtp_mm_")]
    there = {f.name: (f.type, set(f.samples[0].labels) - {"le"}) for f in families if not f.name.endswith("_created")}
    assert there == documented
    assert all(family.documentation for family in families)


async def test_calls_are_counted_as_they_ended() -> None:
    async with serving() as server:
        await call_raw(server.grpc_address, request("img:3", "img:4").SerializeToString())
        reply, _ = await call_raw(server.grpc_address, request("img:2").SerializeToString())
        await refusal(server.grpc_address, request("fail:DownloadFailedError"))
        await refusal(server.grpc_address, request())
        await until(lambda: server.state.calls == 0)
        found = samples(await scrape(server))
    ended = {labels: value for (name, labels), value in found.items() if name == "rtp_mm_requests_total"}
    assert ended == {
        (("error", ""), ("status", "OK")): 2,
        (("error", "MM_DOWNLOAD_FAILED"), ("status", "UNAVAILABLE")): 1,
        (("error", "MM_WRONG_FORMAT_ERROR"), ("status", "INVALID_ARGUMENT")): 1,
    }
    assert found["rtp_mm_request_duration_seconds_count", ()] == 4
    assert found["rtp_mm_items_total", (("type", "default"),)] == 4
    assert found["rtp_mm_tokens_total", ()] == 9
    assert found["rtp_mm_received_bytes_total", ()] == len("img:3img:4img:2fail:DownloadFailedError")
    assert found["rtp_mm_sent_bytes_total", ()] > 2 * len(reply)
    for stage, count in {"fetch": 2, "forward": 2, "preprocess": 0, "queue": 0}.items():
        labels = (("stage", stage),)
        assert found["rtp_mm_stage_duration_seconds_count", labels] == count
        expected = count * TIMINGS_MS.get(stage, 0) / 1e3
        assert found["rtp_mm_stage_duration_seconds_sum", labels] == pytest.approx(expected)
    assert found["rtp_mm_stage_duration_seconds_bucket", (("le", "0.001"), ("stage", "fetch"))] == 0
    assert found["rtp_mm_stage_duration_seconds_bucket", (("le", "0.0025"), ("stage", "fetch"))] == 2


async def test_a_call_whose_caller_left_is_counted_too() -> None:
    async with serving() as server:
        with pytest.raises(Exception, match="Deadline"):
            await call_raw(server.grpc_address, request("slow:60").SerializeToString(), timeout=0.1)
        await until(lambda: server.state.calls == 0)
        found = samples(await scrape(server))
    assert sum(value for (name, _), value in found.items() if name == "rtp_mm_requests_total") == 1


async def test_the_engine_is_asked_at_every_scrape() -> None:
    engine = FakeEngine()
    async with serving(engine) as server:
        before = samples(await scrape(server))
        engine.figures = FIGURES
        after = samples(await scrape(server))
    assert before["rtp_mm_queue_patches", ()] == before["rtp_mm_batch_fill_ratio", ()] == 0
    expected: dict[Any, float] = {
        ("rtp_mm_requests_running", ()): 3,
        ("rtp_mm_queue_items", ()): 4,
        ("rtp_mm_queue_patches", ()): 500,
        ("rtp_mm_in_flight_bytes", ()): 6000,
        ("rtp_mm_batches_total", ()): 7,
        ("rtp_mm_batch_fill_ratio", ()): 0.4,
        ("rtp_mm_forward_failures_total", ()): 1,
        ("rtp_mm_rejections_total", (("reason", "bytes"),)): 3,
        ("rtp_mm_cache_used_bytes", (("cache", "embeddings"),)): 20,
        ("rtp_mm_cache_budget_bytes", (("cache", "embeddings"),)): 300,
        ("rtp_mm_cache_hits_total", (("cache", "bytes"),)): 9,
        ("rtp_mm_cache_misses_total", (("cache", "embeddings"),)): 5,
        ("rtp_mm_cache_evictions_total", (("cache", "embeddings"),)): 6,
        ("rtp_mm_workers_busy", ()): 5,
        ("rtp_mm_worker_restarts_total", (("cause", "crash"),)): 2,
        ("rtp_mm_device_decodes_total", ()): 8,
        ("rtp_mm_cpu_decodes_total", (("reason", "codec"),)): 2,
        ("rtp_mm_fetched_bytes_total", ()): 12345,
        ("rtp_mm_decoded_frames_total", ()): 67,
        ("rtp_mm_serving", ()): 1,
    }
    assert {key: after[key] for key in expected} == expected


async def test_before_the_model_is_there_metrics_are_zeros() -> None:
    async with serving(is_loaded=False) as server:
        found = samples(await scrape(server))
    assert found["rtp_mm_serving", ()] == 0
    assert found["rtp_mm_requests_running", ()] == 0
    assert found["process_resident_memory_bytes", ()] > 0
    assert found["process_cpu_seconds_total", ()] > 0


async def test_a_version_that_is_none_is_answered_as_no_version() -> None:
    async with serving() as server:
        assert samples(await scrape(server, "application/openmetrics-text; version=a.b"))["rtp_mm_serving", ()] == 1


async def test_two_servers_in_a_process_count_apart() -> None:
    async with serving() as first, serving() as second:
        await call_raw(first.grpc_address, request("img:3").SerializeToString())
        counts = [samples(await scrape(server))["rtp_mm_tokens_total", ()] for server in (first, second)]
    assert counts == [3, 0]


async def test_an_engine_with_a_tower_fills_its_part(
    tiny_qwen2_5_vl: Path, photo_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "rtp_mm.access")
    settings = load_settings(None, checkpoint_path=tiny_qwen2_5_vl, act_type="fp32", device="cpu")
    engine: Any = MMProcessEngine(load_model(settings), settings)
    async with serving(engine) as server:
        for _ in range(2):
            await call_raw(server.grpc_address, request(str(photo_path)).SerializeToString())
        found = samples(await scrape(server))
    await engine.aclose()
    assert found["rtp_mm_batches_total", ()] == found["rtp_mm_batch_items_total", ()] == 1
    assert found["rtp_mm_batch_patches_total", ()] == 32 * 22
    budget = found["rtp_mm_batch_budget_patches", ()]
    assert found["rtp_mm_batch_fill_ratio", ()] == pytest.approx(32 * 22 / budget)
    embeddings = (("cache", "embeddings"),)
    assert found["rtp_mm_cache_hits_total", embeddings] == found["rtp_mm_cache_misses_total", embeddings] == 1
    assert found["rtp_mm_cache_used_bytes", embeddings] > 0
    for stage, count in {"fetch": 2, "preprocess": 1, "queue": 1, "forward": 1}.items():
        assert found["rtp_mm_stage_duration_seconds_count", (("stage", stage),)] == count
    lines = [KeyValueFormatter().format(record) for record in caplog.records]
    assert [re.findall(r" cached=(\d)", line) for line in lines] == [["0"], ["1"]]
