"""The chaos run in its short form; `python tests/chaos.py --requests 20000` is the long one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import chaos
import pytest
from chaos_weather import good_files
from running_server import running_server

REQUESTS = 250
SLACK = 8  # descriptors and threads of connections and pools that stay open


@pytest.mark.timeout(900)  # half a minute where nothing else runs
@pytest.mark.parametrize("seed", [1])
def test_every_request_gets_its_right_answer_or_its_right_error_and_nothing_leaks(
    tiny_qwen2_5_vl: Path, tmp_path: Path, seed: int
) -> None:
    files = good_files(tmp_path)
    right = chaos.right_answers(tiny_qwen2_5_vl, files)
    with running_server(tiny_qwen2_5_vl, **chaos.OPTIONS) as server:
        report, before, after = asyncio.run(chaos.run(server, files, right, requests=REQUESTS, seed=seed))
        assert server.health() == 200
        assert server.terminate() == 0
    assert not report.wrong
    assert report.outcomes["good afterwards", "right"] == len(files)
    assert after.processes <= before.processes
    assert after.descriptors <= before.descriptors + SLACK
    assert after.threads <= before.threads + SLACK
    assert after.pss_bytes <= before.pss_bytes + chaos.PSS_SLACK
