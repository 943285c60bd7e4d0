"""Worker processes that die, lie, do not start or are closed: only the item that one held fails."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from scripted_worker import HeavyPreprocessor, ScriptedPreprocessor, script
from waiting import until
from worker_pools import IMAGE, MEMORY_MB, ONE_CORE, is_gone, kill, new_pool, run, text, until_slab_is_free

from rtp_mm.engine import worker_pool, worker_process
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.engine.worker_process import WorkerProcess
from rtp_mm.errors import DrainingError, ProcessError, StartError, WrongFormatError
from rtp_mm.types import Patches


async def test_a_worker_killed_while_it_writes_fails_its_item_and_nobody_sees_its_bytes(
    pair: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slot of the dead is used again only after it is reaped."""
    note, count = tmp_path / "note", 16 << 10  # rows of 1 KiB: a quarter of the slab
    freed_while_gone: list[bool] = []
    free = pair.slab.free
    monkeypatch.setattr(pair.slab, "free", lambda slot: (freed_while_gone.append(is_gone(pid)), free(slot)))
    writing = asyncio.create_task(run(pair, script("stall", note=str(note), count=count)))
    await until(note.exists)
    pid = int(note.read_text())
    assert (pair.slab.bytes == 0xEE).any()
    neighbours = [asyncio.create_task(run(pair, script(count=count, columns=1024, value=v))) for v in range(3)]
    os.kill(pid, signal.SIGKILL)
    with pytest.raises(ProcessError, match="worker was killed by SIGKILL while it held this item"):
        await writing
    assert freed_while_gone == [True]
    for value, patches in enumerate(await asyncio.gather(*neighbours)):
        assert (patches.rows == value).all()
    assert (await run(pair, script(count=count, columns=1024, value=9))).rows.min() == 9
    await until(lambda: pair.ready == 2)
    assert pair.restarts == {"crash": 1}


HUGE = "9" * 4000
FATAL = [
    (script("crash", note="/dev/null"), "was killed by SIGSEGV"),
    (script("leave", status=3), "ended with status 3"),
    (script("lie", said=["no JSON"]), "was killed by SIGKILL"),
    (script("lie", said=["[" * 60_000]), "was killed by SIGKILL"),
    (script("lie", said=['{"error": [], "text": ""}']), "was killed by SIGKILL"),
    (script("lie", said=[f'{{"shape": [{HUGE}, {HUGE}]}}']), "was killed by SIGKILL"),
    (script("lie", said=['{"shape": [4, 12]}', '{"grid": [1, 2, 3]}']), "was killed by SIGKILL"),
    (script("lie", said=['{"shape": [4, 12]}', f'{{"grid": [1, 2, 2], "decoded_frames": {HUGE}}}']), "SIGKILL"),
]


async def test_a_worker_that_crashes_or_lies_is_replaced(pool: WorkerPool) -> None:
    pid = await text(pool, "pid")
    for blob, words in FATAL:
        with pytest.raises(ProcessError, match=words):
            await run(pool, blob)
        assert is_gone(int(pid))
        assert pid != (pid := await text(pool, "pid"))
    await until_slab_is_free(pool)
    assert pool.restarts == {"crash": len(FATAL)}


async def test_a_worker_that_lies_is_not_listened_to_while_it_ends(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket's number would be the next worker's, which the loop would never hear."""
    calls: list[str] = []
    for name in ("unwatch", "end"):
        method = getattr(WorkerProcess, name)
        monkeypatch.setattr(
            WorkerProcess, name, lambda self, name=name, method=method: (calls.append(name), method(self))[1]
        )
    for said in ('{"shape": []}', '{"error": []}'):
        calls.clear()
        with pytest.raises(ProcessError, match="was killed by SIGKILL"):
            await run(pool, script("lie", said=[said]))
        assert calls[:2] == ["unwatch", "end"]
        assert int(await text(pool, "pid"))


async def test_a_worker_that_talks_while_it_waits_for_room_fails_its_item(pool: WorkerPool) -> None:
    held = await run(pool, script(count=60 << 10, columns=1024))  # of the slab's 64 MiB
    lying = asyncio.create_task(run(pool, script("lie", said=[f'{{"shape": [{32 << 10}, 1024]}}', "{}"])))
    await until(lambda: all(worker._is_over for worker in pool._workers))
    del held
    with pytest.raises(ProcessError, match="was killed by SIGKILL"):
        await lying
    assert int(await text(pool, "pid"))


async def test_a_worker_that_dies_idle_is_replaced_and_fails_nobody(pair: WorkerPool) -> None:
    for round_number in range(1, 3):
        victim = kill(int(await text(pair, "pid")))
        answers = await asyncio.gather(*(run(pair, script(value=v)) for v in range(20)))
        assert [int(patches.rows[0, 0]) for patches in answers] == list(range(20))
        await until(lambda: pair.restarts["idle"] == round_number and pair.ready == 2)  # noqa: B023
        assert is_gone(victim)


async def test_a_worker_that_died_leaves_no_memory_mapped(pool: WorkerPool) -> None:
    """Nor is it left to Python's garbage collector, which never looks at what was there when a server was ready."""

    def mapped() -> int:
        return sum("memfd:rtp_mm-inbox" in line for line in Path("/proc/self/maps").read_text().splitlines())

    gc.collect()
    gc.disable()
    try:
        before = mapped()
        with pytest.raises(WrongFormatError) as refused:
            await run(pool, script("refuse"))
        kill(int(await text(pool, "pid")))
        assert int(await text(pool, "pid"))
        assert mapped() == before
        assert refused
    finally:
        gc.enable()


async def test_an_item_given_to_a_worker_that_just_died_goes_to_another(pool: WorkerPool) -> None:
    """Its death is not known yet when the item is handed over."""
    victim = kill(int(await text(pool, "pid")))
    assert int(await text(pool, "pid")) != victim


async def test_signals_to_the_whole_group_leave_workers_at_work(pool: WorkerPool) -> None:
    pid = await text(pool, "pid")
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(int(pid), number)
    assert await text(pool, "pid") == pid


async def test_workers_that_do_not_start_again_are_tried_again(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "_FIRST_RETRY_S", 0.01)
    (tmp_path / "obstacle").touch()
    with pytest.raises(ProcessError):
        await run(pool, script("leave", status=0))
    waiting = asyncio.create_task(text(pool, "pid"))
    await until(lambda: pool.restarts["start"] >= 2)
    assert pool.ready == 0
    (tmp_path / "obstacle").unlink()
    assert int(await waiting)


def test_a_worker_that_cannot_be_spawned_leaves_no_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process(*fds: int) -> subprocess.Popen[bytes]:
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(worker_process, "_spawn", no_process)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(StartError, match=r"cannot be started: .*temporarily unavailable"):
        WorkerProcess(0, 1 << 20)
    assert len(os.listdir("/proc/self/fd")) == before


def test_workers_that_cannot_start_end_the_start(tmp_path: Path) -> None:
    (tmp_path / "obstacle").touch()
    gc.collect()
    before = set(psutil.Process().children()), len(os.listdir("/proc/self/fd"))
    for preprocess, message in (
        (ScriptedPreprocessor(IMAGE, tmp_path / "obstacle"), "a preprocess worker did not start: it"),
        (lambda *_: Patches(np.zeros((1, 1), np.uint8), (1, 1, 1)), "cannot get .* USE_LOCAL_PREPROCESS=1"),
        (HeavyPreprocessor(bytes(1 << 20)), "of .* bytes, over .* USE_LOCAL_PREPROCESS=1"),
    ):
        pool = WorkerPool(count=2, memory_mb=64, slab_mb=1, inbox_bytes=1 << 20, cores=ONE_CORE)
        with pytest.raises(StartError, match=message):
            pool.open(preprocess)
        del pool
    gc.collect()  # what an error's frames hold
    assert (set(psutil.Process().children()), len(os.listdir("/proc/self/fd"))) == before


def test_a_preprocessor_that_cannot_be_pickled_for_a_reason_of_its_own_leaves_nothing() -> None:
    class Refusing:
        def __reduce__(self) -> str:
            raise ValueError("not me")

    gc.collect()
    before = set(psutil.Process().children()), len(os.listdir("/proc/self/fd"))
    pool = WorkerPool(count=2, memory_mb=64, slab_mb=1, inbox_bytes=1, cores=ONE_CORE)
    with pytest.raises(ValueError, match="not me"):
        pool.open(Refusing())
    del pool
    gc.collect()
    assert (set(psutil.Process().children()), len(os.listdir("/proc/self/fd"))) == before


async def test_a_worker_that_dies_while_a_model_is_loaded_is_replaced(tmp_path: Path) -> None:
    pool = WorkerPool(count=2, memory_mb=MEMORY_MB, slab_mb=1, inbox_bytes=1 << 20, cores=ONE_CORE)
    victim = pool._begun[0].result()
    kill(victim.pid)
    pool.open(ScriptedPreprocessor(IMAGE, tmp_path / "obstacle"))
    assert pool.ready == 2
    assert is_gone(victim.pid)
    assert await text(pool, "pid")
    pool.close()


def test_workers_that_nobody_needs_end(tmp_path: Path) -> None:
    """As where the model does not load: they have begun, and were not told what for."""
    gc.collect()
    before = set(psutil.Process().children()), len(os.listdir("/proc/self/fd"))
    WorkerPool(count=2, memory_mb=64, slab_mb=1, inbox_bytes=1, cores=ONE_CORE).close()
    gc.collect()
    assert (set(psutil.Process().children()), len(os.listdir("/proc/self/fd"))) == before


async def test_closing_ends_what_runs_and_what_waits(tmp_path: Path) -> None:
    note = tmp_path / "note"
    async with new_pool(tmp_path) as pool:
        jobs = [asyncio.create_task(run(pool, script("stall", note=str(note)))) for _ in range(3)]
        await until(note.exists)
        pool.close()
        for job in jobs:
            with pytest.raises(DrainingError):
                await job
        assert is_gone(int(note.read_text()))


async def test_closing_does_not_wait_for_workers_that_start(pair: WorkerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One is stopped as it starts, as on a machine that has no time for it."""
    greet, greeted = WorkerProcess.greet, []

    def stopped_greet(worker: WorkerProcess, setup: bytes) -> None:
        os.kill(worker.pid, signal.SIGSTOP)
        greeted.append(worker.pid)
        greet(worker, setup)

    monkeypatch.setattr(WorkerProcess, "greet", stopped_greet)
    kill(int(await text(pair, "pid")))
    await until(lambda: greeted)
    pair.close()
    await asyncio.to_thread(pair._threads.shutdown)
    assert all(is_gone(pid) for pid in greeted)


PARENT = """
import asyncio, sys
from pathlib import Path
from scripted_worker import HeavyPreprocessor, ScriptedPreprocessor, script
from rtp_mm.cores import CoreShare
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.types import MMUrlType, PreprocessOptions

folder = Path(sys.argv[1])
pool = WorkerPool(count=2, memory_mb=512, slab_mb=1, inbox_bytes=1 << 20, cores=CoreShare(1))
pool.open(ScriptedPreprocessor(None, folder / "obstacle"))
asyncio.run(pool.run(script("stall", note=str(folder / "busy")), MMUrlType.IMAGE, PreprocessOptions()))
"""


async def test_workers_die_with_their_parent(tmp_path: Path) -> None:
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env=os.environ | {"PYTHONPATH": path})
    await until((tmp_path / "busy").exists)
    workers = psutil.Process(parent.pid).children()
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    await until(lambda: not any(worker.is_running() for worker in workers))
