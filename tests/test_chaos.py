"""The chaos run in its short form; `python tests/chaos.py --requests 20000` is the long one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import chaos
import pytest
from chaos_processes import unfinished
from running_server import running_server


@pytest.mark.timeout(900)  # half a minute each where nothing else runs
@pytest.mark.parametrize(("family", "requests", "seed"), [("qwen2_5_vl", 300, 1), ("qwen2_audio", 150, 2)])
def test_every_request_gets_its_right_answer_or_its_right_error_and_nothing_leaks(
    family: str, requests: int, seed: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint, supply = request.getfixturevalue(f"tiny_{family}"), chaos.SUPPLIES[family]()
    with chaos.calm_engine(checkpoint) as engine:
        right = [chaos.answer_of(engine, [good.item]) for good in supply.good]
        with running_server(checkpoint, **chaos.OPTIONS) as server:
            report, before, after = asyncio.run(
                chaos.run(server, supply, right, tmp_path, requests=requests, seed=seed)
            )
            assert server.health() == 200
            assert not unfinished(server)
            assert server.terminate() == 0
        chaos.judge(report, engine)
    print(f"{report.kills} workers killed; alone {report.before_s:.4f} s before, {report.after_s:.4f} s after; {after}")
    assert not report.wrong
    assert report.known <= {case for case, _ in report.outcomes}
    assert report.kills
    assert report.outcomes["good afterwards", "right"] == len(supply.good)
    assert after.is_within(before), (before, after)
