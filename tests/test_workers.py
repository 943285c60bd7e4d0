"""Preprocessing as the engine asks for it: in processes or threads, as long as somebody waits."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from scripted_worker import ScriptedPreprocessor, script
from worker_pools import IMAGE, NO_OPTIONS, is_gone

from rtp_mm.config import load_settings
from rtp_mm.engine import worker_pool
from rtp_mm.engine.third_party import as_mm_error
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.engine.workers import PreprocessWorkers
from rtp_mm.errors import NotSupportedError, ProcessError, StartError, WrongFormatError
from rtp_mm.library import create_engine
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.types import Blob, MMUrlType


class Part(MultiModalEmbeddingInterface):
    """A `mm_part` with a scripted preprocessor."""

    def __init__(self, folder: Path) -> None:
        self.preprocessor = ScriptedPreprocessor(IMAGE, folder / "obstacle")


async def prepare(workers: PreprocessWorkers, blob: Blob) -> Any:
    return await workers.prepare(blob, MMUrlType.IMAGE, NO_OPTIONS)


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


def test_workers_that_have_begun_are_taken_or_ended(tmp_path: Path) -> None:
    """They end where a model has no use for them, and where none loads."""
    before = psutil.Process().children()
    settings = load_settings(mm_preprocess_max_workers=1)
    pool = WorkerPool.of(settings)
    taking = PreprocessWorkers(_ImagePart(), settings, pool)
    assert pool.ready == 1
    assert taking.stats() == (1, 0, {})
    taking.close()
    leaving = PreprocessWorkers(MultiModalEmbeddingInterface(), settings, WorkerPool.of(settings))
    leaving.close()
    with pytest.raises(StartError, match="is no folder"):
        create_engine(checkpoint_path=tmp_path / "absent")
    assert psutil.Process().children() == before


async def test_what_hangs_ends_with_its_caller_and_so_does_its_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "_GRACE_S", 0.0)
    workers = PreprocessWorkers(Part(tmp_path), load_settings(mm_preprocess_max_workers=1))
    pid = (await prepare(workers, script("tell", what="pid"))).value.rows.tobytes()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await prepare(workers, script("stall", note=str(tmp_path / "note")))
    assert (await prepare(workers, script(value=5))).value.rows.max() == 5
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
    with pytest.raises(ProcessError, match="more memory than there is"):
        await prepare(workers, Blob(b"too much", b"", ""))
    workers.close()


class Panic(BaseException):
    """What Rust code raises through its bindings."""


@pytest.mark.parametrize("error", [KeyError("/secret"), Panic("/secret"), StopIteration("/secret")], ids=repr)
def test_a_third_partys_error_is_a_word_to_the_caller_and_a_stack_in_the_log(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ProcessError) as caught, as_mm_error("photo"):
        raise error
    assert str(caught.value) == f"preprocessing failed with {type(error).__name__}"
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__
    [record] = caplog.records
    assert record.getMessage() == "preprocessing of photo failed"
    assert record.exc_info is not None
    assert record.exc_info[1] is error


@pytest.mark.parametrize(
    "error",
    [NotSupportedError("sound"), asyncio.CancelledError(), KeyboardInterrupt(), SystemExit(3), GeneratorExit()],
    ids=repr,
)
def test_what_is_ours_or_ends_the_work_passes_as_it_is(error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(type(error)) as caught, as_mm_error("photo"):
        raise error
    assert caught.value is error
    assert not caplog.records
