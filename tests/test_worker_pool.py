"""Worker processes: the same rows as in this process, within their limits, and nothing left behind."""

from __future__ import annotations

import asyncio
import gc
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray
from PIL import Image
from scripted_worker import HeavyPreprocessor, script
from waiting import until
from worker_pools import IMAGE, MEMORY_MB, NO_OPTIONS, ONE_CORE, is_gone, run, text, until_slab_is_free

from rtp_mm.engine import worker_pool, worker_protocol
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.engine.worker_process import WorkerDiedError
from rtp_mm.errors import NotSupportedError, ProcessError, WrongFormatError
from rtp_mm.types import Blob, MMUrlType, Patches, PreprocessOptions


def patches(answer: dict[str, Any]) -> Patches:
    """What becomes of an answer about 4 rows."""
    answer = {"decoded_frames": 0, **answer}
    layout = worker_protocol.layout(answer, (4, 12))
    prepared = worker_protocol.prepared_by(answer, layout)(np.zeros((4, 12), np.uint8))
    assert isinstance(prepared, Patches)
    return prepared


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


@pytest.mark.parametrize("nbytes", [1 << 16, 5 << 20])
async def test_a_large_preprocessor_reaches_its_workers_and_leaves_no_memory(nbytes: int) -> None:
    """Over what a message holds, and over what an inbox keeps."""
    preprocess = HeavyPreprocessor(os.urandom(nbytes))
    pool = WorkerPool(count=1, memory_mb=MEMORY_MB, slab_mb=1, inbox_bytes=8 << 20, cores=ONE_CORE)
    try:
        pool.open(preprocess)
        expected = preprocess(script(), MMUrlType.IMAGE, NO_OPTIONS).rows
        np.testing.assert_array_equal((await run(pool, script())).rows, expected)
        [worker] = pool._workers
        assert os.fstat(worker._inbox.fd).st_blocks * 512 <= 4 << 20
    finally:
        pool.close()


async def test_errors_keep_their_class_and_others_their_secrets(
    pool: WorkerPool, caplog: pytest.LogCaptureFixture
) -> None:
    pid = await text(pool, "pid")
    with pytest.raises(WrongFormatError, match=r"^no picture$"):
        await run(pool, script("refuse"))
    with pytest.raises(NotSupportedError, match="expected an image, got audio"):
        await run(pool, Blob(b"ID3" + bytes(100), b"", "sound"))
    with pytest.raises(ProcessError, match=r"^preprocessing failed with KeyError$"):
        await run(pool, script("stumble"))
    with pytest.raises(ProcessError, match=r"^preprocessing failed with AttributeError$"):
        await run(pool, script("no such thing"))
    assert "/secret/path" in str([vars(record) for record in caplog.records])
    assert await text(pool, "pid") == pid


@pytest.mark.parametrize("shape", [None, 4, [], [4], [4, 12, 1], [-4, -12], [0, 12], [4, "12"], [4.0, 12]], ids=repr)
def test_shapes_that_are_none_are_a_workers_end(shape: Any) -> None:
    assert worker_protocol.rows_shape({"shape": [4, 12]}) == (4, 12)
    with pytest.raises(WorkerDiedError):
        worker_protocol.rows_shape({"shape": shape})


@pytest.mark.parametrize("grid", [None, [4], [1, 2, 3], [-1, -2, 2], [1, 2.0, 2], [1, 4], [1, "2", 2]], ids=repr)
def test_grids_that_do_not_fit_are_a_workers_end(grid: Any) -> None:
    assert patches({"grid": [1, 2, 2]}).grid_thw == (1, 2, 2)
    with pytest.raises(WorkerDiedError):
        patches({"grid": grid})


@pytest.mark.parametrize("seconds", [0.0, -1.0, 1, "1", float("nan"), float("inf"), [1.0]], ids=repr)
def test_a_clips_timing_is_a_positive_number_or_none(seconds: object) -> None:
    assert patches({"grid": [1, 2, 2], "seconds_per_grid": 0.5}).seconds_per_grid == 0.5
    assert patches({"grid": [1, 2, 2]}).seconds_per_grid is None
    with pytest.raises(WorkerDiedError):
        patches({"grid": [1, 2, 2], "seconds_per_grid": seconds})


async def test_rows_over_the_slab_and_files_over_the_inbox_are_refused(pool: WorkerPool) -> None:
    with pytest.raises(WrongFormatError, match=r"67109888 bytes of patch rows, over .* 67108864 \(MM_SLAB_MB\)"):
        await run(pool, script(count=(64 << 10) + 1, columns=1024))
    with pytest.raises(WrongFormatError, match="over a preprocess worker's limit of 67108864"):
        await run(pool, Blob(np.zeros((1, 5000, 5000, 3), np.uint8), b"", "large"))
    assert (await run(pool, script(count=64 << 10, columns=1024))).rows.nbytes == pool.slab.nbytes


async def test_memory_over_the_limit_is_named_and_the_worker_replaced(pool: WorkerPool) -> None:
    await run(pool, script("hoard", mib=MEMORY_MB // 2))
    pid = await text(pool, "pid")
    with pytest.raises(WrongFormatError, match=rf"more memory than a worker's {MEMORY_MB} MiB \(MM_WORKER_MEMORY_MB\)"):
        await run(pool, script("hoard", mib=MEMORY_MB))
    await run(pool, script("hoard", mib=MEMORY_MB // 2))
    assert await text(pool, "pid") != pid
    assert is_gone(int(pid))
    assert pool.restarts == {"memory": 1}


async def test_who_waits_while_a_worker_is_replaced_for_its_memory_is_answered(pool: WorkerPool) -> None:
    async def first_byte(value: int) -> int:
        return int((await run(pool, script(value=value))).rows[0, 0])

    hoarding = asyncio.create_task(run(pool, script("hoard", mib=MEMORY_MB)))
    waiting = [asyncio.create_task(first_byte(value)) for value in range(5)]
    with pytest.raises(WrongFormatError, match="MM_WORKER_MEMORY_MB"):
        await hoarding
    assert await asyncio.gather(*waiting) == [*range(5)]
    await until_slab_is_free(pool)


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
    await until_slab_is_free(pool)


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
    await until_slab_is_free(pool)


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
    await until_slab_is_free(pair)
    assert held() == before
    assert anonymous_bytes() < memory + (16 << 20)
