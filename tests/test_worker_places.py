"""Room for a worker's rows: given with the task where they are foreseen, and the file stays until it is read."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
import pytest
from scripted_worker import script
from worker_pools import IMAGE, NO_OPTIONS, run, until_slab_is_free

from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.engine.worker_process import WorkerProcess
from rtp_mm.errors import ProcessError
from rtp_mm.types import Blob, MMUrlType, Patches


@pytest.mark.parametrize(
    ("foreseen", "turns"), [(None, 2), ((4, 12), 1), ((4, 13), 2), ((2, 24), 2), ((1, 9 << 20), 2), ((1, 1 << 40), 2)]
)
async def test_rows_as_foreseen_spare_a_turn_and_a_wrong_guess_costs_no_memory(
    foreseen: tuple[int, int] | None, turns: int, pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    tell = WorkerProcess.tell
    monkeypatch.setattr(WorkerProcess, "tell", lambda self, message: (told.append(message), tell(self, message))[1])
    patches = await pool.run(script("fill", value=7), MMUrlType.IMAGE, NO_OPTIONS, foreseen)
    assert isinstance(patches, Patches)
    assert (patches.rows == 7).all()
    assert (len(told), patches.rows.shape) == (turns, (4, 12))
    assert pool.slab.free_bytes == pool.slab.nbytes - mmap.PAGESIZE
    del patches
    await until_slab_is_free(pool)


@pytest.mark.parametrize("foreseen", [(4, 12), (5, 12)])
async def test_room_foreseen_comes_back_from_a_worker_that_dies(foreseen: tuple[int, int], pool: WorkerPool) -> None:
    with pytest.raises(ProcessError):
        await pool.run(script("leave", status=3), MMUrlType.IMAGE, NO_OPTIONS, foreseen)
    assert pool.slab.free_bytes == pool.slab.nbytes
    assert (await run(pool, script())).grid_thw == (1, 1, 4)


async def test_a_large_array_stays_until_it_is_read(pool: WorkerPool) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (1, 2000, 2000, 3), np.uint8)
    blob = Blob(pixels, b"", "tensor")
    for _ in range(3):
        np.testing.assert_array_equal((await run(pool, blob)).rows, IMAGE(blob, MMUrlType.IMAGE, NO_OPTIONS).rows)
