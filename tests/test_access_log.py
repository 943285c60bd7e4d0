"""One line a call."""

from __future__ import annotations

import logging
import re

import pytest
from fake_engine import serving
from server_calls import call_raw, refusal, request

from rtp_mm.logs import KeyValueFormatter
from rtp_mm.server.proto import MultimodalInputPB, MultimodalInputsPB


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
