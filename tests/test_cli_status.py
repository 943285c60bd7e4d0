"""`rtp-mm status`: the figures of a running server."""

from __future__ import annotations

import asyncio

import pytest
from fake_engine import serving

from rtp_mm.cli import main
from rtp_mm.cli.status import quantile


async def test_status_shows_figures_of_a_running_server(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("MM_AUTH_TOKEN", "sekrit")
    async with serving(mm_auth_token="sekrit") as server:
        assert await asyncio.to_thread(main, ["embed", "img:3", "--server", server.grpc_address]) == 0
        assert await asyncio.to_thread(main, ["status", server.grpc_address]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        monkeypatch.setenv("MM_AUTH_TOKEN", "wrong")
        assert await asyncio.to_thread(main, ["status", server.grpc_address]) == 1
        refused = capsys.readouterr().err
    for figure in ("fake bf16 on cpu", "1 OK", "room for 7 more", "0.0 of 0.0 MiB", "0 of 0 busy"):
        assert figure in shown, figure
    assert "must be Bearer" in refused
    assert "sekrit" not in shown + refused


def test_quantiles_are_between_bounds() -> None:
    buckets = [({"le": "0.001"}, 1.0), ({"le": "0.25"}, 6.0), ({"le": "1.0"}, 9.0), ({"le": "+Inf"}, 10.0)]
    assert quantile(buckets, 0.1) == "0 to 1 ms"
    assert quantile(buckets, 0.5) == "1 ms to 250 ms"
    assert quantile(buckets, 0.9) == "250 ms to 1 s"
    assert quantile(buckets, 0.99) == "1 s to more"
    assert quantile([], 0.5) == quantile([({"le": "+Inf"}, 0.0)], 0.5) == "no calls"
