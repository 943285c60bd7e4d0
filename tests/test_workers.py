"""Worker processes: the same rows as in this process, whatever one of them does, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import io
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image
from scripted_worker import ScriptedPreprocessor, script

from rtp_mm.config import load_settings
from rtp_mm.engine import worker_pool
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.engine.worker_process import WorkerDiedError, WorkerProcess
from rtp_mm.engine.workers import PreprocessWorkers
from rtp_mm.errors import (
    DeadlineError,
    DrainingError,
    NotSupportedError,
    ProcessError,
    StartError,
    WrongFormatError,
)
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.types import Blob, MMPreprocessConfig, MMUrlType, Patches, PreprocessOptions

IMAGE = ImagePreprocessor.from_config(PUBLISHED_PROCESSOR, load_settings())
NO_OPTIONS = PreprocessOptions()
MEMORY_MB = 512


@asynccontextmanager
async def new_pool(folder: Path, count: int = 1, slab_mb: int = 64, inbox_mb: int = 64) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(
        ScriptedPreprocessor(IMAGE, folder / "obstacle"),
        count=count,
        memory_mb=MEMORY_MB,
        slab_mb=slab_mb,
        inbox_bytes=inbox_mb << 20,
    )
    try:
        yield pool
    finally:
        pool.close()


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    """One worker."""
    async with new_pool(tmp_path) as pool:
        yield pool


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    """Two workers."""
    async with new_pool(tmp_path, count=2) as pool:
        yield pool


async def run(pool: WorkerPool, blob: Blob) -> Patches:
    return await pool.run(blob, MMUrlType.IMAGE, NO_OPTIONS)


async def text(pool: WorkerPool, what: str) -> str:
    return (await run(pool, script("tell", what=what))).rows.tobytes().decode()


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            gc.collect()
            await asyncio.sleep(0.005)


def is_gone(pid: int) -> bool:
    """Whether the process has ended and was reaped."""
    return not psutil.pid_exists(pid)


def kill(pid: int) -> int:
    """Comes back once the process is dead, not yet reaped, and the event loop has heard nothing."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid


async def test_rows_are_those_of_this_process(pair: WorkerPool, photos: dict[str, NDArray[np.uint8]]) -> None:
    async def check(blob: Blob, mm_type: MMUrlType, options: PreprocessOptions) -> None:
        ours, theirs = await pair.run(blob, mm_type, options), IMAGE(blob, mm_type, options)
        assert ours.grid_thw == theirs.grid_thw
        np.testing.assert_array_equal(ours.rows, theirs.rows)

    checks = []
    for pixels in photos.values():
        for format in ("JPEG", "PNG", "WEBP"):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, format)
            checks.append(check(Blob(file.getvalue(), b"", "a file"), MMUrlType.DEFAULT, NO_OPTIONS))
        tensor = Blob(pixels[None], b"", "a tensor")
        checks.append(check(tensor, MMUrlType.TENSOR, PreprocessOptions(width=100, height=300)))
    await asyncio.gather(*checks)


async def test_workers_import_neither_torch_nor_pydantic_and_are_small(pool: WorkerPool, photo: bytes) -> None:
    for _ in range(20):
        await run(pool, Blob(photo, b"", "photo"))
    modules = set((await text(pool, "modules")).split())
    assert {"rtp_mm.preprocess.patches", "simplejpeg"} <= modules
    assert modules.isdisjoint({"torch", "pydantic", "asyncio", "transformers"})
    pid = int(await text(pool, "pid"))
    assert psutil.Process(pid).memory_full_info().pss < 60 << 20


async def test_errors_keep_their_class_and_others_their_secrets(
    pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    pid = await text(pool, "pid")
    with pytest.raises(WrongFormatError, match=r"^no picture$"):
        await run(pool, script("refuse"))
    with pytest.raises(NotSupportedError, match="takes images only"):
        await run(pool, Blob(np.zeros((2, 8, 8, 3), np.uint8), b"", "clip"))
    with pytest.raises(ProcessError, match=r"^preprocessing failed with KeyError$"):
        await run(pool, script("stumble"))
    with pytest.raises(ProcessError, match=r"^preprocessing failed with AttributeError$"):
        await run(pool, script("no such thing"))
    assert "/secret/path" in str([vars(record) for record in caplog.records])
    assert await text(pool, "pid") == pid


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
    assert pair.slab.bytes[0] == 0xEE
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


FATAL = [
    (script("crash", note="/dev/null"), "was killed by SIGSEGV"),
    (script("leave", status=3), "ended with status 3"),
    (script("lie", said=["no JSON"]), "was killed by SIGKILL"),
    (script("lie", said=['{"shape": [4, 12]}', '{"grid": [1, 2, 3]}']), "was killed by SIGKILL"),
]


async def test_a_worker_that_crashes_or_lies_is_replaced(pool: WorkerPool) -> None:
    pid = await text(pool, "pid")
    for blob, words in FATAL:
        with pytest.raises(ProcessError, match=words):
            await run(pool, blob)
        assert is_gone(int(pid))
        assert pid != (pid := await text(pool, "pid"))
    await until(lambda: pool.slab.free_bytes == pool.slab.nbytes)
    assert pool.restarts == {"crash": len(FATAL)}


@pytest.mark.parametrize("shape", [None, 4, [], [4], [4, 12, 1], [-4, -12], [0, 12], [4, "12"], [4.0, 12]], ids=repr)
def test_shapes_that_are_none_are_a_workers_end(shape: Any) -> None:
    assert worker_pool._shape({"shape": [4, 12]}) == (4, 12)
    with pytest.raises(WorkerDiedError):
        worker_pool._shape({"shape": shape})


@pytest.mark.parametrize("grid", [None, [4], [1, 2, 3], [-1, -2, 2], [1, 2.0, 2], [1, 4], [1, "2", 2]], ids=repr)
def test_grids_that_do_not_fit_are_a_workers_end(grid: Any) -> None:
    assert worker_pool._grid({"grid": [1, 2, 2]}, (4, 12)) == (1, 2, 2)
    with pytest.raises(WorkerDiedError):
        worker_pool._grid({"grid": grid}, (4, 12))


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1, "1", float("nan"), float("inf"), [1.0]], ids=repr)
def test_a_clips_timing_is_a_positive_number_or_none(seconds: object) -> None:
    assert worker_pool._seconds({"seconds_per_grid": 0.5}) == 0.5
    assert worker_pool._seconds({}) is None
    with pytest.raises(WorkerDiedError):
        worker_pool._seconds({"seconds_per_grid": seconds})


async def test_rows_over_the_slab_and_files_over_the_inbox_are_refused(pool: WorkerPool) -> None:
    with pytest.raises(WrongFormatError, match=r"67109888 bytes of patch rows, over .* 67108864 \(MM_SLAB_MB\)"):
        await run(pool, script(count=(64 << 10) + 1, columns=1024))
    with pytest.raises(WrongFormatError, match="over a preprocess worker's limit of 67108864"):
        await run(pool, Blob(np.zeros((1, 5000, 5000, 3), np.uint8), b"", "large"))
    assert (await run(pool, script(count=64 << 10, columns=1024))).rows.nbytes == pool.slab.nbytes


async def test_memory_over_the_limit_is_named(pool: WorkerPool) -> None:
    pid = await text(pool, "pid")
    with pytest.raises(WrongFormatError, match=rf"more memory than a worker's {MEMORY_MB} MiB \(MM_WORKER_MEMORY_MB\)"):
        await run(pool, script("hoard", mib=MEMORY_MB))
    await run(pool, script("hoard", mib=MEMORY_MB // 2))
    assert await text(pool, "pid") == pid


async def test_a_full_slab_holds_work_back_until_rows_are_garbage(pair: WorkerPool) -> None:
    size: dict[str, int] = {"count": 20 << 10, "columns": 1024}
    held = [await run(pair, script(**size, value=v)) for v in range(3)]
    waiting = [asyncio.create_task(run(pair, script(**size, value=v))) for v in range(3, 8)]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in waiting)
    for value in range(8):
        if value >= 3:
            held.append(await waiting.pop(0))  # a task holds on to its result
        patches = held.pop(0)
        assert (patches.rows == value).all()
        del patches
        gc.collect()


async def test_who_leaves_the_line_for_memory_leaves_it_to_others(pair: WorkerPool) -> None:
    held = await run(pair, script(count=48 << 10, columns=1024))
    waiting = asyncio.create_task(run(pair, script(count=32 << 10, columns=1024)))
    while pair.busy == 0:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    waiting.cancel()
    assert (await run(pair, script(count=8 << 10, columns=1024, value=3))).rows.min() == 3
    assert held.rows.max() == 0
    assert not pair.restarts


async def test_a_cancelled_item_that_waits_never_runs(pool: WorkerPool, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    running = asyncio.create_task(run(pool, script("stall", note=str(first), seconds=0.2)))
    waiting = asyncio.create_task(run(pool, script("stall", note=str(second), seconds=0)))
    await until(first.exists)
    waiting.cancel()
    await running
    await text(pool, "pid")
    assert not second.exists()


async def test_a_cancelled_item_that_ends_in_time_costs_no_worker(pool: WorkerPool, tmp_path: Path) -> None:
    pid, note = await text(pool, "pid"), tmp_path / "note"
    running = asyncio.create_task(run(pool, script("stall", note=str(note), seconds=0.1)))
    await until(note.exists)
    running.cancel()
    assert await text(pool, "pid") == pid
    await until(lambda: pool.slab.free_bytes == pool.slab.nbytes)


async def test_a_cancelled_item_that_runs_on_is_killed(
    pool: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "_GRACE_S", 0.05)
    note = tmp_path / "note"
    running = asyncio.create_task(run(pool, script("stall", note=str(note), count=100)))
    await until(note.exists)
    running.cancel()
    assert await text(pool, "pid") != note.read_text()
    assert is_gone(int(note.read_text()))
    assert pool.restarts == {"overrun": 1}
    await until(lambda: pool.slab.free_bytes == pool.slab.nbytes)


async def test_a_worker_that_dies_idle_is_replaced_and_fails_nobody(pair: WorkerPool) -> None:
    for round_number in range(1, 3):
        victim = kill(int(await text(pair, "pid")))
        answers = await asyncio.gather(*(run(pair, script(value=v)) for v in range(20)))
        assert [int(patches.rows[0, 0]) for patches in answers] == list(range(20))
        await until(lambda: pair.restarts["idle"] == round_number and pair.ready == 2)  # noqa: B023
        assert is_gone(victim)


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


def test_workers_that_cannot_start_end_the_start(tmp_path: Path) -> None:
    (tmp_path / "obstacle").touch()
    before = set(psutil.Process().children())
    limits: dict[str, Any] = {"count": 2, "memory_mb": 64, "slab_mb": 1, "inbox_bytes": 1}
    with pytest.raises(StartError, match="a preprocess worker did not start: it"):
        WorkerPool(ScriptedPreprocessor(IMAGE, tmp_path / "obstacle"), **limits)
    with pytest.raises(StartError, match="USE_LOCAL_PREPROCESS=1"):
        WorkerPool(lambda *_: Patches(np.zeros((1, 1), np.uint8), (1, 1, 1)), **limits)
    assert set(psutil.Process().children()) <= before


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
from scripted_worker import ScriptedPreprocessor, script
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.types import MMUrlType, PreprocessOptions

folder = Path(sys.argv[1])
pool = WorkerPool(
    ScriptedPreprocessor(None, folder / "obstacle"), count=2, memory_mb=512, slab_mb=1, inbox_bytes=1 << 20
)
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


async def test_a_thousand_items_leave_nothing_behind(pair: WorkerPool, photo: bytes) -> None:
    async def some(count: int) -> None:
        for start in range(0, count, 50):
            blobs = [Blob(photo, b"", "p") if i % 5 else script("refuse") for i in range(start, start + 50)]
            await asyncio.gather(*(run(pair, blob) for blob in blobs), return_exceptions=True)

    def held() -> tuple[int, set[int], int, int]:
        gc.collect()
        own = psutil.Process()
        children = own.children()
        fds = sum(child.num_fds() for child in children)
        return own.num_fds(), {child.pid for child in children}, fds, len(os.listdir("/dev/shm"))

    def anonymous_bytes() -> int:
        return sum(child.memory_full_info().uss for child in psutil.Process().children())

    await some(200)
    before, memory = held(), anonymous_bytes()
    await some(1000)
    await until(lambda: pair.slab.free_bytes == pair.slab.nbytes)
    assert held() == before
    assert anonymous_bytes() < memory + (16 << 20)


class Part(MultiModalEmbeddingInterface):
    """A `mm_part` with a scripted preprocessor."""

    def __init__(self, folder: Path) -> None:
        self.preprocessor = ScriptedPreprocessor(IMAGE, folder / "obstacle")


async def prepare(workers: PreprocessWorkers, blob: Blob, deadline: float | None = None) -> Any:
    return await workers.prepare(blob, MMUrlType.IMAGE, MMPreprocessConfig(), deadline)


@pytest.mark.parametrize("local", [0, 1])
async def test_processes_and_threads_prepare_the_same(local: int, tmp_path: Path, photo: bytes) -> None:
    settings = load_settings(use_local_preprocess=local, mm_preprocess_max_workers=1)
    workers = PreprocessWorkers(_ImagePart(), settings)
    prepared = await prepare(workers, Blob(photo, b"", "photo"))
    expected = IMAGE(Blob(photo, b"", "photo"), MMUrlType.IMAGE, NO_OPTIONS)
    assert prepared.patches == len(expected.rows)
    np.testing.assert_array_equal(prepared.value.rows, expected.rows)
    assert workers.stats() == (1, 0, {})
    with pytest.raises(WrongFormatError, match="no image in a supported format"):
        await prepare(workers, Blob(b"nothing", b"", "nothing"))
    workers.close()


class _ImagePart(MultiModalEmbeddingInterface):
    preprocessor = IMAGE


async def test_a_deadline_ends_what_hangs_and_its_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "_GRACE_S", 0.0)
    workers = PreprocessWorkers(Part(tmp_path), load_settings(mm_preprocess_max_workers=1))
    note, loop = tmp_path / "note", asyncio.get_running_loop()
    pid = (await prepare(workers, script("tell", what="pid"), loop.time() + 60)).value.rows.tobytes()
    with pytest.raises(DeadlineError):
        await prepare(workers, script("stall", note=str(note)), loop.time() - 1)
    assert workers.stats() == (1, 0, {})
    with pytest.raises(DeadlineError):
        await prepare(workers, script("stall", note=str(note)), loop.time() + 0.1)
    assert (await prepare(workers, script(value=5), loop.time() + 60)).value.rows.max() == 5
    assert is_gone(int(pid))
    assert workers.stats() == (1, 0, {"overrun": 1})
    workers.close()


async def test_third_parties_stay_in_threads() -> None:
    class Theirs(MultiModalEmbeddingInterface):
        def _mm_preprocess(self, data: Any, **kwargs: Any) -> int:
            if data.read() == b"too much":
                raise MemoryError
            return os.getpid()

    workers = PreprocessWorkers(Theirs(), load_settings())
    assert await prepare(workers, Blob(b"", b"", "")) == (os.getpid(), None)
    with pytest.raises(WrongFormatError, match="more memory than there is"):
        await prepare(workers, Blob(b"too much", b"", ""))
    workers.close()
