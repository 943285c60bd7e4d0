from __future__ import annotations

import json
import os
import platform
import resource
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
import torch
from fake_engine import free_start_port
from grpc_health.v1 import health_pb2, health_pb2_grpc

from rtp_mm.config import Settings
from rtp_mm.errors import DownloadRefusedError, DrainingError, LoadingError, RemoteCallError
from rtp_mm.library import create_engine
from rtp_mm.server.client import RemoteEngine
from rtp_mm.start_server import main
from rtp_mm.types import MMEmbeddingRes

ROOT = Path(__file__).parents[1]


class Process:
    """The fake engine's server in a process of its own."""

    def __init__(self, port: int, *flags: str) -> None:
        command = [sys.executable, "-m", "tests.fake_engine", "--start_port", str(port), *flags]
        self.popen = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.engine = RemoteEngine(f"127.0.0.1:{port + 1}")
        self.health_url = f"http://127.0.0.1:{port}/health"
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.popen.stderr is not None
        self.log.extend(iter(self.popen.stderr.readline, ""))

    def health(self) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(self.health_url) as response:
                return response.status, json.load(response)["status"]
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)["status"]
        except OSError:
            return 0, "down"

    def wait_for(self, status: str) -> None:
        end = time.monotonic() + 60
        while self.health()[1] != status:
            assert self.popen.poll() is None, self.log
            assert time.monotonic() < end, self.log
            time.sleep(0.02)

    def wait_for_log(self, text: str) -> str:
        end = time.monotonic() + 60
        while not (lines := [line for line in self.log if text in line]):
            assert time.monotonic() < end, self.log
            time.sleep(0.02)
        return lines[0]

    def call(self, *urls: str) -> Future[MMEmbeddingRes]:
        """A call in a thread of its own, once the server is at it."""
        call = ThreadPoolExecutor(1).submit(self.engine.submit, urls)
        end = time.monotonic() + 60
        while not self.engine.worker_status().running:
            assert time.monotonic() < end, self.log
        return call

    def exit_status(self) -> int:
        status = self.popen.wait(60)
        self._reader.join()
        return status


@contextmanager
def process(*flags: str) -> Iterator[Process]:
    server = Process(free_start_port(), *flags)
    try:
        yield server
    finally:
        server.popen.kill()
        server.popen.wait()
        server.engine.close()


def test_sigterm_finishes_running_calls_refuses_new_ones_and_ends_with_0() -> None:
    with process() as server, grpc.insecure_channel(server.engine.address) as channel:
        server.wait_for("ok")
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        running = server.call("slow:1", "img:3")
        server.popen.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert server.health() == (503, "draining")
        with pytest.raises(DrainingError):
            server.engine.submit(["img:1"])
        assert not running.done()
        assert [tensor.shape[0] for tensor in running.result(60).embeddings] == [2, 3]
        assert server.exit_status() == 0
        assert "draining signal=SIGTERM calls=1" in "".join(server.log)
        assert "Traceback" not in "".join(server.log)


def test_a_drain_ends_in_time_and_cuts_what_is_left() -> None:
    with process("--mm_drain_timeout_ms", "100") as server:
        server.wait_for("ok")
        cut = server.call("slow:600")
        server.popen.send_signal(signal.SIGINT)
        assert server.exit_status() == 0
        assert isinstance(cut.exception(60), DrainingError)
        assert "calls_cut=1" in "".join(server.log)


def test_a_thread_that_works_on_does_not_hold_up_the_end() -> None:
    with process() as server:
        server.wait_for("ok")
        server.engine.submit(["linger:"])
        server.popen.send_signal(signal.SIGTERM)
        assert server.exit_status() == 0
        assert "stopped" in "".join(server.log)


def test_connections_have_as_many_files_as_the_system_lets_them() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with process() as server:
        server.wait_for("ok")
        line = Path(f"/proc/{server.popen.pid}/limits").read_text().split("Max open files")[1].split()
        assert int(line[0]) >= max(soft, min(hard, 1 << 16) if hard != resource.RLIM_INFINITY else 1 << 16)


def test_a_second_signal_ends_at_once() -> None:
    with process() as server:
        server.wait_for("ok")
        cut = server.call("slow:600")
        server.popen.send_signal(signal.SIGTERM)
        server.wait_for("draining")
        server.popen.send_signal(signal.SIGTERM)
        assert server.exit_status() == -signal.SIGTERM
        assert isinstance(cut.exception(60), RemoteCallError)


def test_while_loading_it_answers_503_and_a_signal_still_ends_it() -> None:
    with process("--model_type", "endless") as server:
        server.wait_for("loading")
        with pytest.raises(LoadingError):
            server.engine.submit(["img:1"])
        server.popen.send_signal(signal.SIGTERM)
        assert server.exit_status() == 0


def test_the_ready_line_names_what_serves_where() -> None:
    with process("--mm_bind_address", "127.0.0.1") as server:
        line = server.wait_for_log(" ready ")
        port = int(server.health_url.split(":")[2].split("/")[0])
        assert f"http=127.0.0.1:{port} grpc=127.0.0.1:{port + 1} model=fake dtype=bf16 device=cpu " in line


def test_the_garbage_collector_leaves_alone_what_the_start_brought() -> None:
    with process() as server:
        server.wait_for("ok")
        assert server.engine.submit(["frozen:"]).embeddings[0].shape[0] > 20


def test_a_model_that_does_not_load_is_one_line_and_status_1() -> None:
    with process("--model_type", "broken") as server:
        assert server.exit_status() == 1
        assert server.log[1:] == ["rtp_mm.start_server: the checkpoint is broken\n"]  # behind that it loads


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ([], "CHECKPOINT_PATH is not set"),
        (["--checkpoint_path", "/nowhere"], "CHECKPOINT_PATH=/nowhere is no folder"),
        (["--vit_separation", "0"], "rtp_mm.create_engine(vit_separation=0, checkpoint_path=...)"),
        (["--vit_separation", "2"], "rtp_mm.create_engine(vit_separation=2, remote_vit_server_ip=...)"),
        (["--vit_separation", "7"], "VIT_SEPARATION"),
        (["--act_type", "int4"], "ACT_TYPE"),
        (["--start_port", "70000"], "START_PORT"),
        (["--no_such_option", "1"], "no_such_option"),
    ],
)
def test_a_wrong_start_is_one_line_and_status_1(
    arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("rtp_mm.start_server: ")
    assert err.count("\n") == 1
    assert line in err


def test_help_lists_every_option_with_its_meaning(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert f"--{name}" in text
        assert " ".join((field.description or "missing").split()[:3]) in text


def test_starting_imports_no_torch_before_it_must() -> None:
    code = "import sys, rtp_mm.start_server as s; s.main([]); assert 'torch' not in sys.modules"
    environment = {k: v for k, v in os.environ.items() if k != "CHECKPOINT_PATH"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("chosen", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY", None])
def test_threads_that_wait_leave_their_core_unless_the_environment_says_how(
    chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    if chosen:
        monkeypatch.setenv(chosen, "set")
    monkeypatch.setattr("rtp_mm.start_server.run", lambda settings, load_engine: 0)
    assert main(["--checkpoint_path", str(tmp_path)]) == 0
    expected = {"GOMP_SPINCOUNT": "set", "OMP_WAIT_POLICY": None, None: "2000"}
    assert os.environ.get("GOMP_SPINCOUNT") == expected[chosen]


HEAPS = """
import ctypes, sys, threading
import rtp_mm.start_server as start
start.run = lambda settings, load_engine: 0
assert start.main(["--checkpoint_path", sys.argv[1]]) == 0
libc, together = ctypes.CDLL(None), threading.Barrier(8)
libc.fdopen.restype = ctypes.c_void_p
threads = [threading.Thread(target=lambda: (together.wait(), bytearray(5000))) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
stdout = ctypes.c_void_p(libc.fdopen(1, b"w"))
libc.malloc_info(0, stdout)
libc.fflush(stdout)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="heaps are glibc's")
@pytest.mark.parametrize(("chosen", "heaps"), [(None, 1), ("4", 4)])
def test_threads_share_a_heap_unless_the_environment_says_how_many(
    chosen: str | None, heaps: int, tmp_path: Path
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "MALLOC_ARENA_MAX"}
    environment |= {"MALLOC_ARENA_MAX": chosen} if chosen else {}
    command = [sys.executable, "-c", HEAPS, str(tmp_path)]
    told = subprocess.run(command, check=True, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    assert told.count("<heap nr=") == heaps


def test_in_process_and_remote_give_the_same_bits(tiny_qwen2_5_vl: Path, photo_path: Path) -> None:
    port = free_start_port()
    environment = os.environ | {
        "START_PORT": str(port),
        "VIT_SEPARATION": "1",
        "ACT_TYPE": "bf16",
        "MODEL_TYPE": "qwen2_5_vl",
        "CHECKPOINT_PATH": str(tiny_qwen2_5_vl),
    }
    command = [sys.executable, "-m", "rtp_mm.start_server"]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as server:
        try:
            local = create_engine(checkpoint_path=tiny_qwen2_5_vl)
            remote = create_engine(vit_separation=2, remote_vit_server_ip=f"localhost:{port + 1}")
            assert server.stderr is not None
            assert " ready " in server.stderr.readline()
            here, there = (engine.submit([str(photo_path)]) for engine in (local, remote))
            assert torch.equal(here.embeddings[0], there.embeddings[0])
            assert torch.equal(here.position_ids[0], there.position_ids[0])
            assert set(there.timings_ms) == {"fetch", "preprocess", "queue", "forward"}
            with pytest.raises(DownloadRefusedError, match=r"item 1 \(/nowhere\)"):
                remote.submit([str(photo_path), "/nowhere"])
            assert torch.equal(remote.submit([str(photo_path)]).embeddings[0], here.embeddings[0])
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
        finally:
            server.kill()
            local.close()
            remote.close()
