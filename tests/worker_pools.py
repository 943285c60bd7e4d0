"""Pools of scripted workers, for tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
from scripted_worker import ScriptedPreprocessor, script
from waiting import until

from rtp_mm.config import load_settings
from rtp_mm.cores import CoreShare
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.types import Blob, MMUrlType, Patches, PreprocessOptions

IMAGE = ImagePreprocessor.from_config(PUBLISHED_PROCESSOR, load_settings())
NO_OPTIONS = PreprocessOptions()
MEMORY_MB = 512
ONE_CORE = CoreShare(1)


@asynccontextmanager
async def new_pool(
    folder: Path, count: int = 1, slab_mb: int = 64, inbox_mb: int = 64, cores: CoreShare = ONE_CORE
) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(count=count, memory_mb=MEMORY_MB, slab_mb=slab_mb, inbox_bytes=inbox_mb << 20, cores=cores)
    pool.open(ScriptedPreprocessor(IMAGE, folder / "obstacle"))
    try:
        yield pool
    finally:
        pool.close()


async def run(pool: WorkerPool, blob: Blob) -> Patches:
    return await pool.run(blob, MMUrlType.IMAGE, NO_OPTIONS)


async def text(pool: WorkerPool, what: str) -> str:
    return (await run(pool, script("tell", what=what))).rows.tobytes().decode()


async def until_slab_is_free(pool: WorkerPool) -> None:
    """Nobody holds rows, and nothing that is garbage already does."""
    await until(lambda: gc.collect() >= 0 and pool.slab.free_bytes == pool.slab.nbytes)


def is_gone(pid: int) -> bool:
    """Whether the process has ended and was reaped."""
    return not psutil.pid_exists(pid)


def kill(pid: int) -> int:
    """Comes back once the process is dead, not yet reaped, and the event loop has heard nothing."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    return pid
