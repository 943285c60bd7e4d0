"""The order of preprocess workers: short jobs before long ones, nothing for ever, a worker left to the short."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_worker import script
from waiting import until
from worker_pools import NO_OPTIONS, kill, new_pool, run, until_slab_is_free

from rtp_mm.engine.job_queue import LONG_S, Check, Job, JobQueue
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.errors import ProcessError, QueueFullError, WrongFormatError
from rtp_mm.types import Blob, Layout, MMUrlType, Patches, RowsShape

SHORT, LONG = 50_000, 60_000_000  # bytes of a photograph, of a film


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def job(loop: asyncio.AbstractEventLoop, nbytes: int, at: float, mm_type: MMUrlType = MMUrlType.VIDEO) -> Job:
    return Job(Blob(bytes(nbytes), b"", ""), mm_type, NO_OPTIONS, loop.create_future(), queued_at=at)


def test_films_are_long_and_photographs_are_not(loop: asyncio.AbstractEventLoop) -> None:
    assert job(loop, LONG, 0).is_long
    assert not job(loop, SHORT, 0).is_long
    assert not job(loop, 10_000_000, 0, MMUrlType.IMAGE).is_long
    layout = Layout((1 << 18, 1176), (64, 64, 64))
    rows = Job(Blob(b"", b"", ""), MMUrlType.VIDEO, NO_OPTIONS, loop.create_future(), layout)
    assert rows.is_long  # an animation's, whose file is small


def test_short_jobs_go_first_and_equals_in_the_order_they_came(loop: asyncio.AbstractEventLoop) -> None:
    line = JobQueue(1)
    long, *short = job(loop, LONG, 0), job(loop, SHORT, 1), job(loop, SHORT, 1)
    for each in (long, *short):
        line.add(each)
    assert [line.take(), line.take(), line.take(), line.take()] == [*short, long, None]


def test_a_long_job_yields_for_as_long_as_it_takes_itself(loop: asyncio.AbstractEventLoop) -> None:
    line, rng = JobQueue(1), random.Random(3)
    long = job(loop, LONG, 0)
    others = [job(loop, SHORT, rng.uniform(0, 3 * long.expected_s)) for _ in range(100)]
    for each in (long, *others):
        line.add(each)
    order = [line.take() for _ in range(101)]
    before = {each for each in others if each.queued_at + each.expected_s <= long.expected_s}
    assert set(order[: order.index(long)]) == before
    assert 20 < len(before) < 50


def test_one_of_several_workers_is_left_to_short_jobs(loop: asyncio.AbstractEventLoop) -> None:
    line = JobQueue(3)
    long = [job(loop, LONG, 0) for _ in range(4)]
    for each in long:
        line.add(each)
    assert [line.take(), line.take(), line.take()] == [*long[:2], None]
    line.add(short := job(loop, SHORT, 100))
    assert line.take() is short
    line.end(short)
    assert line.take() is None
    line.end(long[0])
    assert line.take() is long[2]


def test_the_only_worker_takes_long_jobs(loop: asyncio.AbstractEventLoop) -> None:
    line = JobQueue(1)
    line.add(long := job(loop, LONG, 0))
    assert line.take() is long


def test_a_job_that_was_given_up_is_not_taken(loop: asyncio.AbstractEventLoop) -> None:
    line = JobQueue(1)
    line.add(first := job(loop, SHORT, 0))
    line.add(second := job(loop, SHORT, 1))
    line.remove(first)
    assert [*line] == [second]
    with pytest.raises(ValueError, match="not in list"):
        line.remove(first)


def film(pool: WorkerPool, note: Path) -> asyncio.Task[Patches]:
    """A long job that writes to `note` as it begins, and does not end."""
    stall = script("stall", note=str(note))
    assert isinstance(stall.data, bytes)
    data = stall.data[:-1] + b" " * round(2 * LONG_S * 5e6) + b"}"  # still JSON
    return asyncio.create_task(pool.run(Blob(data, b"", "film"), MMUrlType.VIDEO, NO_OPTIONS))  # type: ignore[arg-type]


async def test_a_photograph_passes_clips_that_hold_all_workers_they_may(tmp_path: Path) -> None:
    async with new_pool(tmp_path, count=2) as pool:
        films = [film(pool, tmp_path / f"note{n}") for n in range(3)]
        await until(lambda: (tmp_path / "note0").exists())
        for value in range(3):
            assert (await run(pool, script(value=value))).rows.max() == value
        assert not (tmp_path / "note1").exists()
        for each in films:
            each.cancel()
        await asyncio.gather(*films, return_exceptions=True)
        await until(lambda: pool.busy == 0)
        assert (await run(pool, script(value=7))).rows.max() == 7


# --- what a job is told, and what it leaves


def checked(pool: WorkerPool, blob: Blob, check: Check) -> asyncio.Task[Patches]:
    run_it = pool.run(blob, MMUrlType.VIDEO, NO_OPTIONS, None, check)
    return asyncio.create_task(run_it)  # type: ignore[arg-type]


def full(shape: RowsShape) -> None:
    raise QueueFullError(f"no room for {shape}", 100)


async def test_rows_are_checked_before_they_are_made(tmp_path: Path) -> None:
    told: list[RowsShape] = []
    async with new_pool(tmp_path) as pool:
        assert len((await checked(pool, script(count=5), told.append)).rows) == 5
        with pytest.raises(QueueFullError, match=r"\(4, 12\)"):
            await checked(pool, script(), full)
        assert told == [(5, 12)]
        with pytest.raises(WrongFormatError, match="MM_SLAB_MB"):  # which no other time mends
            await checked(pool, script(count=(64 << 10) + 1, columns=1024), full)
        await until_slab_is_free(pool)


async def test_nothing_is_checked_for_a_job_that_was_given_up(tmp_path: Path) -> None:
    told: list[RowsShape] = []
    note = tmp_path / "note"
    async with new_pool(tmp_path) as pool:
        asked = checked(pool, script("stall", note=str(note), seconds=0.2), told.append)
        await until(note.exists)
        asked.cancel()
        await until(lambda: pool.busy == 0)
        assert not told
        assert not pool.restarts


async def test_a_long_job_begins_when_another_ends_with_its_worker(tmp_path: Path) -> None:
    """At once, not when there is a new one: that may take its time."""
    async with new_pool(tmp_path, count=2) as pool:
        films = [film(pool, tmp_path / f"note{n}") for n in range(2)]
        await until(lambda: (tmp_path / "note0").exists())
        (tmp_path / "obstacle").touch()
        kill(int((tmp_path / "note0").read_text()))
        await until(lambda: (tmp_path / "note1").exists())
        assert pool.ready == 1
        (tmp_path / "obstacle").unlink()
        films[1].cancel()
        await asyncio.gather(*films, return_exceptions=True)


@pytest.mark.parametrize("leaves_first", [True, False])
async def test_a_job_that_was_given_up_as_it_was_handed_over_keeps_no_worker(
    leaves_first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its caller leaves in the turn of the event loop in which another's end hands it to an idle worker."""
    async with new_pool(tmp_path, count=2) as pool:
        pids = {worker.pid for worker in pool._workers}
        first, second = (film(pool, tmp_path / f"note{n}") for n in range(2))
        await until(lambda: (tmp_path / "note0").exists())
        [waiting], match = pool._jobs, pool._match

        def match_and_leave() -> None:
            if leaves_first:
                second.cancel()
            match()
            second.cancel()

        monkeypatch.setattr(pool, "_match", match_and_leave)
        kill(int((tmp_path / "note0").read_text()))
        with pytest.raises(ProcessError):
            await first
        assert waiting not in pool._jobs
        await until(lambda: pool.busy == 0)
        monkeypatch.undo()
        assert (await run(pool, script(value=7))).rows.max() == 7
        assert not (tmp_path / "note1").exists()
        await until(lambda: pool.ready == 2)
        assert len(pids & {worker.pid for worker in pool._workers}) == 1
        assert pool.restarts == {"crash": 1}


async def test_a_refused_file_leaves_no_memory_in_the_inbox(tmp_path: Path) -> None:
    async with new_pool(tmp_path) as pool:
        refused = script("refuse", note=" " * (32 << 20))
        with pytest.raises((WrongFormatError, ProcessError)):
            await run(pool, refused)
        [worker] = pool._workers
        assert os.fstat(worker._inbox.fd).st_blocks * 512 <= 8 << 20
