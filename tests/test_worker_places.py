"""Room for a worker's rows: given with the task where they are predicted, and the file stays until it is read."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
from scripted_worker import script
from worker_pools import IMAGE, NO_OPTIONS, is_gone, run, text, until_slab_is_free

from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.engine.worker_process import WorkerProcess
from rtp_mm.errors import ProcessError
from rtp_mm.types import Blob, Layout, MMUrlType, Patches, RowsShape

FEW, MANY = (4, 12), (9 << 10, 1024)  # rows of 48 bytes and of 9 MiB, for which room is no longer held ahead


def in_a_line(shape: RowsShape) -> Layout:
    """As scripts lay their rows."""
    return Layout(shape, (1, 1, shape[0]))


@pytest.mark.parametrize(
    ("shape", "is_predicted", "turns"), [(FEW, True, 1), (FEW, False, 2), (MANY, True, 2), (MANY, False, 2)]
)
async def test_few_rows_as_predicted_spare_a_turn(
    shape: RowsShape, is_predicted: bool, turns: int, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    tell = WorkerProcess.tell
    monkeypatch.setattr(WorkerProcess, "tell", lambda self, message: (told.append(message), tell(self, message))[1])
    count, columns = shape
    blob = script("fill", count=count, columns=columns, value=7)
    patches = await pool.run(blob, MMUrlType.IMAGE, NO_OPTIONS, in_a_line(shape) if is_predicted else None)
    assert isinstance(patches, Patches)
    assert (patches.rows == 7).all()
    assert (len(told), patches.rows.shape) == (turns, shape)
    assert pool.slab.free_bytes == pool.slab.nbytes - max(mmap.PAGESIZE, count * columns)
    del patches
    await until_slab_is_free(pool)


@pytest.mark.parametrize("shape", [(4, 13), (2, 24), (1, 9 << 20), (1, 1 << 40)])
async def test_other_rows_than_predicted_are_a_workers_end_and_cost_no_memory(
    shape: RowsShape, pool: WorkerPool
) -> None:
    pid = await text(pool, "pid")
    told = rf"while it held this item: it asked for \(4, 12\), predicted was \({shape[0]}, {shape[1]}\)$"
    with pytest.raises(ProcessError, match=told):
        await pool.run(script("fill"), MMUrlType.IMAGE, NO_OPTIONS, in_a_line(shape))
    assert is_gone(int(pid))
    await until_slab_is_free(pool)
    assert (await run(pool, script())).grid_thw == (1, 1, 4)
    assert pool.restarts == {"crash": 1}


@pytest.mark.parametrize("grid", [(1, 2, 2), (4, 1, 1), None])
async def test_another_grid_than_predicted_is_a_workers_end_and_nobody_writes_where_it_may(
    grid: Any, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = int(await text(pool, "pid"))
    await until_slab_is_free(pool)
    freed_while_gone: list[bool] = []
    free = pool.slab.free
    monkeypatch.setattr(pool.slab, "free", lambda slot: (freed_while_gone.append(is_gone(pid)), free(slot)))
    with pytest.raises(ProcessError, match=r"it gave .*grid_thw=\(1, 1, 4\)\), predicted was "):
        await pool.run(script("fill"), MMUrlType.IMAGE, NO_OPTIONS, Layout(FEW, grid))
    assert freed_while_gone == [True]
    await until_slab_is_free(pool)


@pytest.mark.parametrize("predicted", [(4, 12), (5, 12)])
async def test_room_predicted_comes_back_from_a_worker_that_dies(predicted: RowsShape, pool: WorkerPool) -> None:
    with pytest.raises(ProcessError):
        await pool.run(script("leave", status=3), MMUrlType.IMAGE, NO_OPTIONS, in_a_line(predicted))
    assert pool.slab.free_bytes == pool.slab.nbytes
    assert (await run(pool, script())).grid_thw == (1, 1, 4)


async def test_a_large_array_stays_until_it_is_read(pool: WorkerPool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2000, 2000, 3), np.uint8)
    blob = Blob(pixels, b"", "tensor")
    for _ in range(3):
        np.testing.assert_array_equal((await run(pool, blob)).rows, IMAGE(blob, MMUrlType.IMAGE, NO_OPTIONS).rows)
