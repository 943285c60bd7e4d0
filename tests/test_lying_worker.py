"""A worker's word is not taken for what its rows are: they lie as the header tells, or as such an item's can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
import pytest
from clips import encode, moving
from numpy.typing import NDArray
from PIL import Image
from scripted_worker import LyingPreprocessor
from worker_pools import MEMORY_MB, ONE_CORE, until_slab_is_free

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.engine.worker_pool import WorkerPool
from rtp_mm.errors import BadItemsError, ProcessError
from rtp_mm.models.qwen2_5_vl import Qwen2_5VL
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.models.registry import load_model
from rtp_mm.preprocess.audio import AudioPreprocessor
from rtp_mm.preprocess.log_mel import MelRule
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, Layout, MMPreprocessConfig, MMUrlType, MultimodalInput, PreprocessOptions

Pixels = NDArray[np.uint8]
OPTIONS = PreprocessOptions(width=112, height=56, min_frames=4, max_frames=4)  # a frame has 4 x 8 patches
IMPOSSIBLE = {"doubled", "one line", "odd", "sound"}  # for any image and any clip


class UncertainPreprocessor(LyingPreprocessor):
    def is_possible(self, layout: Layout, blob: Blob, mm_type: MMUrlType) -> bool:
        return blob.source == "honest" or bool(1 // 0)


@pytest.fixture
def media(tmp_path: Path) -> MediaPreprocessor:
    return MediaPreprocessor.from_checkpoint(tmp_path, PUBLISHED_PROCESSOR, load_settings())


@pytest.fixture
async def liar(media: MediaPreprocessor) -> AsyncIterator[WorkerPool]:
    pool = WorkerPool(count=1, memory_mb=MEMORY_MB, slab_mb=64, inbox_bytes=1 << 20, cores=ONE_CORE)
    pool.open(LyingPreprocessor(media))
    yield pool
    pool.close()


@pytest.mark.parametrize("lie", LyingPreprocessor.LIES)
async def test_of_what_is_predicted_nothing_else_is_taken(
    lie: str, media: MediaPreprocessor, liar: WorkerPool, photo: bytes
) -> None:
    layout = media.predict(Blob(photo, b"", ""), MMUrlType.IMAGE, OPTIONS)
    assert layout == ((32, 588), (1, 4, 8))
    with pytest.raises(ProcessError, match=r"while it held this item: it (asked|gave) .*, predicted was"):
        await liar.run(Blob(photo, b"", lie), MMUrlType.IMAGE, OPTIONS, layout)
    honest = await liar.run(Blob(photo, b"", "honest"), MMUrlType.IMAGE, OPTIONS, layout)
    assert liar.restarts == {"crash": 1}
    del honest
    await until_slab_is_free(liar)


@pytest.mark.parametrize("lie", LyingPreprocessor.LIES)
@pytest.mark.parametrize("mm_type", [MMUrlType.IMAGE, MMUrlType.VIDEO])
async def test_of_what_is_not_predicted_only_what_can_be_is_taken(
    mm_type: MMUrlType, lie: str, liar: WorkerPool, photo: bytes, photos: dict[str, Pixels]
) -> None:
    data = photo if mm_type is MMUrlType.IMAGE else encode(moving(photos["chelsea"])[:4])
    asked = liar.run(Blob(data, b"", lie), mm_type, OPTIONS)
    if lie in IMPOSSIBLE:
        with pytest.raises(ProcessError, match=r"while it held this item: it gave .*, which no such item has"):
            await asked
    else:
        assert len((await asked).rows)
    assert liar.restarts == ({"crash": 1} if lie in IMPOSSIBLE else {})
    await until_slab_is_free(liar)


async def test_a_check_that_fails_costs_its_item_alone(
    media: MediaPreprocessor, liar: WorkerPool, photo: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    """A third party's `is_possible` may be wrong, too."""
    liar._judge = UncertainPreprocessor(media)
    with pytest.raises(ProcessError, match="preprocessing failed with ZeroDivisionError"):
        await liar.run(Blob(photo, b"", "a"), MMUrlType.IMAGE, OPTIONS)
    assert "1 // 0" in caplog.text
    assert len((await liar.run(Blob(photo, b"", "honest"), MMUrlType.IMAGE, OPTIONS)).rows)
    assert not liar.restarts
    await until_slab_is_free(liar)


async def test_neither_answer_nor_cost_is_a_liars(
    tiny_qwen2_5_vl: Path, tmp_path: Path, photos: dict[str, Pixels]
) -> None:
    settings = load_settings(
        checkpoint_path=tiny_qwen2_5_vl, device="cpu", act_type="fp32", mm_preprocess_max_workers=1
    )
    model = load_model(settings)
    assert isinstance(model, Qwen2_5VL)
    model.mm_part.preprocessor = LyingPreprocessor(model.mm_part.preprocessor)  # type: ignore[assignment]
    engine = MMProcessEngine(model, settings, asyncio.get_running_loop())
    for number, name in enumerate((*LyingPreprocessor.LIES, "honest")):
        Image.fromarray(photos["chelsea"][number:]).save(tmp_path / f"{name}.png")
        asked = engine.embed([MultimodalInput(str(tmp_path / f"{name}.png"), MMUrlType.IMAGE, MMPreprocessConfig())])
        if name == "honest":
            assert len((await asked).embeddings[0]) > 100
            continue
        with pytest.raises(BadItemsError, match=r"item 0 \(.*, predicted was") as caught:
            await asked
        assert caught.value.status == "INTERNAL"
    assert engine.stats().patches_waiting == engine._items.admission.patches == 0
    assert engine.stats().worker_restarts == {"crash": len(LyingPreprocessor.LIES)}
    await engine.aclose()


@pytest.mark.parametrize(
    ("shape", "grid", "can_be"),
    [
        ((6, 512), None, True),
        ((3002, 512), None, True),
        ((4, 512), None, False),  # a step: no token
        ((7, 512), None, False),
        ((3004, 512), None, False),  # longer than the longest
        ((6, 256), None, False),
        ((6, 512), (1, 2, 3), False),
    ],
)
def test_a_sound_is_as_long_as_a_sound_can_be(
    shape: tuple[int, int], grid: tuple[int, int, int] | None, can_be: bool
) -> None:
    preprocess = AudioPreprocessor(MelRule(bins=128, rate=16000, hop=160, window=400, seconds=30))
    assert preprocess.is_possible(Layout(shape, grid), Blob(b"", b"", ""), MMUrlType.AUDIO) == can_be
    if can_be:
        samples = np.zeros((shape[0] - 2) * 160, np.float32)
        assert preprocess(Blob(samples, b"", ""), MMUrlType.TENSOR, PreprocessOptions()).rows.nbytes == np.prod(shape)
