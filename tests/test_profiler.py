"""`/debug/profile`: off unless a folder is named, local or authenticated callers only, one at a time."""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch
from fake_engine import Serving, serving

from rtp_mm.server import http as http_module
from rtp_mm.server.profiler import Profiler

PROFILE = "/debug/profile"


async def ask(server: Serving, method: str, path: str, token: str | None = None) -> tuple[int, Any]:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    async with aiohttp.ClientSession(headers=headers) as http, http.request(method, server.http_url + path) as response:
        body = await response.read()
        return response.status, json.loads(body) if response.content_type == "application/json" else body


@contextmanager
def working_thread() -> Iterator[None]:
    """A thread that is there before the profiler and multiplies matrices."""
    stop = threading.Event()

    def work() -> None:
        matrix = torch.ones(8, 8)
        while not stop.wait(0.001):
            torch.mm(matrix, matrix)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


async def test_a_trace_holds_what_other_threads_did_and_can_be_fetched(tmp_path: Path) -> None:
    async with serving(mm_profile_dir=tmp_path) as server:
        with working_thread():
            status, made = await ask(server, "POST", f"{PROFILE}?seconds=0.2")
        assert status == 201
        assert await ask(server, "GET", PROFILE) == (200, [made])
        status, body = await ask(server, "GET", f"{PROFILE}/{made['trace']}")
    assert status == 200
    assert len(body) == made["bytes"]
    events = json.loads(gzip.decompress(body))["traceEvents"]
    assert "aten::mm" in {event.get("name") for event in events}
    assert [path.name for path in tmp_path.iterdir()] == [made["trace"]]


async def test_one_at_a_time_and_the_end_of_the_server_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    is_recording, has_ended = threading.Event(), threading.Event()

    def record(self: Profiler, seconds: float) -> Path:
        is_recording.set()
        if self._stop.wait(30):
            has_ended.set()
        return tmp_path

    monkeypatch.setattr(Profiler, "_record", record)
    async with serving(mm_profile_dir=tmp_path) as server:
        first = asyncio.create_task(ask(server, "POST", f"{PROFILE}?seconds=60"))
        await asyncio.to_thread(is_recording.wait, 20)
        assert (await ask(server, "POST", PROFILE))[0] == 409
    await asyncio.gather(first, return_exceptions=True)
    assert has_ended.wait(20)


@pytest.mark.parametrize("seconds", ["0", "-1", "60.5", "nan", "inf", "soon", ""])
async def test_seconds_are_a_number_within_limits(seconds: str, tmp_path: Path) -> None:
    async with serving(mm_profile_dir=tmp_path) as server:
        assert (await ask(server, "POST", f"{PROFILE}?seconds={seconds}"))[0] == 400


async def test_it_is_off_where_no_folder_is_named() -> None:
    async with serving() as server:
        for method in ("GET", "POST"):
            status, body = await ask(server, method, PROFILE)
            assert (status, body) == (404, b"set MM_PROFILE_DIR to a folder for traces\n")


async def test_callers_from_elsewhere_need_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_module, "is_loopback", lambda _: False)
    async with serving(mm_profile_dir=tmp_path) as server:
        for method, path in (("POST", f"{PROFILE}?seconds=0.01"), ("GET", PROFILE), ("GET", f"{PROFILE}/x")):
            assert (await ask(server, method, path))[0] == 403
    async with serving(mm_profile_dir=tmp_path, mm_auth_token="t") as server:
        assert (await ask(server, "GET", PROFILE))[0] == 401
        assert (await ask(server, "GET", PROFILE, "t")) == (200, [])


async def test_only_traces_leave_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (tmp_path / "partial-1.json.gz").write_text("x")
    async with serving(mm_profile_dir=tmp_path) as server:
        for name in ("secret", "partial-1.json.gz", "..%2Fsecret", "%2Fetc%2Fpasswd"):
            assert (await ask(server, "GET", f"{PROFILE}/{name}"))[0] == 404
