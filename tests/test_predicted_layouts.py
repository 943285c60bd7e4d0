"""What an item's rows will be is read from its headers, so that limits and queues hold before it is decoded."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from animations import RANDOM, animate
from clips import encode, moving
from mutations import mutated
from turned_images import TURNED, Pixels, saved
from waiting import until
from watched_engine import watched

from rtp_mm.config import load_settings
from rtp_mm.engine import item_pipeline, worker_protocol
from rtp_mm.engine.admission import Cost
from rtp_mm.errors import BadItemsError, DeadlineError, QueueFullError, WrongFormatError
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, CropBox, Layout, MMPreprocessConfig, MMUrlType, Patches, PreprocessOptions

KINDS = ["GIF", "PNG", "WEBP", "AVIF"]
OPTIONS = [
    PreprocessOptions(max_pixels=200_704),
    PreprocessOptions(max_frames=3, min_frames=2, max_pixels=200_704),
    PreprocessOptions(fps=20, max_pixels=200_704),
    PreprocessOptions(width=56, height=56),
    PreprocessOptions(crop=CropBox(0.1, 0.2, 0.7, 0.9), max_pixels=200_704),
]
FOUR = MMPreprocessConfig(width=56, height=56, min_frames=4, max_frames=4)  # of 4 x 4 patches: two pairs, 32 patches


@pytest.fixture(scope="module")
def frames(photos: dict[str, Pixels]) -> list[Pixels]:
    return moving(photos["chelsea"])[:12]


def preprocessor(folder: Path, **options: Any) -> MediaPreprocessor:
    return MediaPreprocessor.from_checkpoint(folder, PUBLISHED_PROCESSOR, load_settings(None, **options))


def blob(data: bytes | Pixels) -> Blob:
    return Blob(data, b"", "")


def layout(patches: Patches) -> Layout:
    return Layout(patches.rows.shape, patches.grid_thw)


def outcome(run: Callable[[], Any]) -> Any:
    """What it gives, or what is wrong."""
    try:
        return run()
    except WrongFormatError as error:
        return str(error)


def as_url(data: bytes) -> str:
    return "data:;base64," + base64.b64encode(data).decode()


# --- the shape


@pytest.mark.parametrize("rule", ["qwen", "hf"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_animation_is_predicted_as_it_comes(kind: str, rule: str, frames: list[Pixels], tmp_path: Path) -> None:
    preprocess = preprocessor(tmp_path, mm_video_rule=rule)
    for options in OPTIONS:
        for count in (1, 2, 5, 12):
            clip = blob(animate(frames[:count], kind, 300))
            assert preprocess.predict(clip, MMUrlType.VIDEO, options) == layout(
                preprocess(clip, MMUrlType.VIDEO, options)
            )


@pytest.mark.parametrize("kind", RANDOM)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_any_animation_is_predicted_or_refused_as_it_will_be(kind: str, tmp_path: Path) -> None:
    """But for what only a decoder finds wrong."""
    preprocess, seen, refused = preprocessor(tmp_path), 0, 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        data = RANDOM[kind](rng)
        clip = blob(data if seed % 2 else mutated(data, rng))
        predicted = outcome(lambda: preprocess.predict(clip, MMUrlType.VIDEO, OPTIONS[0]))  # noqa: B023
        came = outcome(lambda: layout(preprocess(clip, MMUrlType.VIDEO, OPTIONS[0])))  # noqa: B023
        if isinstance(predicted, str):
            assert came == predicted, seed
            refused += 1
        elif not isinstance(came, str):
            assert came == predicted, seed
            seen += 1
    assert min(seen, refused) > 5


def test_all_that_needs_no_decoder_is_predicted(frames: list[Pixels], tmp_path: Path) -> None:
    preprocess, options = preprocessor(tmp_path), PreprocessOptions()
    for data, mm_type in [
        (saved(frames[0], "JPEG"), MMUrlType.DEFAULT),
        (animate(frames, "GIF", 50), MMUrlType.IMAGE),
        (np.stack(frames[:1]), MMUrlType.TENSOR),
        (np.stack(frames[:3]), MMUrlType.TENSOR),
    ]:
        expected = layout(preprocess(blob(data), mm_type, options))
        assert preprocess.predict(blob(data), mm_type, options) == expected
    assert preprocess.predict(blob(encode(frames)), MMUrlType.VIDEO, options) is None
    assert preprocess.predict(blob(b"what is this"), MMUrlType.DEFAULT, options) is None


STRIP = CropBox(0, 0, 1, 0.005)  # of a quarter turn of 4000 x 3000 pixels 107 tokens, of these too narrow for any


@pytest.mark.parametrize("kind", TURNED)
@pytest.mark.parametrize("options", [PreprocessOptions(), PreprocessOptions(crop=STRIP)], ids=["whole", "strip"])
def test_what_its_orientation_turns_is_not_predicted_as_it_lies(
    kind: str, options: PreprocessOptions, tmp_path: Path
) -> None:
    preprocess = preprocessor(tmp_path, mm_exif_transpose=True)
    item = blob(TURNED[kind](np.zeros((600, 800, 3), np.uint8)))
    patches = preprocess(item, MMUrlType.IMAGE, options)
    _, h, w = patches.grid_thw
    assert h > w or options.crop
    assert preprocess.predict(item, MMUrlType.IMAGE, options) in (None, layout(patches))


QUIET: dict[str, Callable[[Pixels], bytes]] = {  # of noise, some 40 and 400 KB each
    "jpeg, short": lambda p: saved(p, "JPEG", quality=20),
    "jpeg, long": lambda p: saved(p, "JPEG", quality=95),
    "png, short": lambda p: saved(p // 128 * 255, "PNG"),
    "png, long": lambda p: saved(p, "PNG"),
    "webp, short": lambda p: saved(p, "WEBP", quality=20),
    "webp, long": lambda p: saved(p, "WEBP", lossless=True),
}


@pytest.mark.parametrize("kind", QUIET)
def test_an_image_without_an_orientation_is_predicted_where_a_look_through_it_is_cheap(
    kind: str, tmp_path: Path
) -> None:
    preprocess = preprocessor(tmp_path, mm_exif_transpose=True)
    pixels = np.random.default_rng(1).integers(0, 256, (400, 600, 3), np.uint8)
    item = blob(QUIET[kind](pixels))
    expected = layout(preprocess(item, MMUrlType.IMAGE, PreprocessOptions()))
    assert preprocess.predict(item, MMUrlType.IMAGE, PreprocessOptions()) == (expected if "short" in kind else None)
    array = blob(pixels[None])
    assert preprocess.predict(array, MMUrlType.TENSOR, PreprocessOptions()) == expected


def test_a_cost_is_the_file_and_its_rows() -> None:
    assert Cost.of(blob(bytes(7)), (3, 1176)) == (3, 7 + 3 * 1176, 7)
    assert Cost.of(blob(bytes(7)), None) == (0, 7, 7)


# --- what comes of it


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("limit", "is_admitted"), [(33, True), (32, True), (31, False)])
async def test_patches_of_an_animation_are_limited_before_decoding(
    kind: str, limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, frames: list[Pixels]
) -> None:
    url = as_url(animate(frames, kind, 50))
    async with watched(tiny_qwen2_5_vl, mm_max_patches_per_item=limit) as w:
        if is_admitted:
            answer = await w.ask(url, mm_type=MMUrlType.VIDEO, config=FOUR)
            assert len(answer.embeddings[0]) == 8
            return
        reason = r"32 patches, over the limit of 31 \(MM_MAX_PATCHES_PER_ITEM\); fewer .* \(max_frames, fps\)"
        with pytest.raises(BadItemsError, match=reason):
            await w.ask(url, mm_type=MMUrlType.VIDEO, config=FOUR)
        assert w.prepared == 0
        assert not w.engine.stats().rejections  # of a full server's: this one needs no other server


@pytest.mark.parametrize(("limit", "is_admitted"), [(49, True), (48, True), (47, False)])
async def test_an_animation_counts_in_the_queue(
    limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, urls: list[str], frames: list[Pixels]
) -> None:
    url = as_url(animate(frames, "WEBP", 50))
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=limit) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])  # 16 patches
        await until(lambda: len(w.forwards) == 1)
        second = w.ask(url, mm_type=MMUrlType.VIDEO, config=FOUR)
        if is_admitted:
            await until(lambda: w.prepared == 2)
            assert w.engine._items.admission.patches == 48
        else:
            with pytest.raises(QueueFullError, match="MM_MAX_QUEUE_PATCHES"):
                await second
            assert w.prepared == 1
        w.may_forward.set()
        await first
        if is_admitted:
            assert await second


@pytest.mark.parametrize(("limit", "is_admitted"), [(48, True), (47, False)])
async def test_a_containers_clip_counts_in_the_queue_once_it_is_decoded(
    limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, urls: list[str], frames: list[Pixels]
) -> None:
    url = as_url(encode(frames))
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=limit) as w:
        w.may_forward.clear()
        first = w.ask(url, mm_type=MMUrlType.VIDEO, config=FOUR)
        await until(lambda: len(w.forwards) == 1)
        assert w.engine._items.admission.patches == 32
        second = w.ask(urls[0])  # 16 patches
        if is_admitted:
            await until(lambda: w.prepared == 2)
        else:
            with pytest.raises(QueueFullError, match=r"32 patches are waiting or running \(MM_MAX_QUEUE_PATCHES\)"):
                await second
        w.may_forward.set()
        await first
        if is_admitted:
            assert await second


@pytest.mark.parametrize(("limit", "is_admitted"), [(48, True), (47, False)])
async def test_a_containers_clip_is_refused_before_it_is_decoded(
    limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, urls: list[str], frames: list[Pixels]
) -> None:
    url = as_url(encode(frames))
    async with watched(tiny_qwen2_5_vl, mm_max_queue_patches=limit) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])  # 16 patches
        await until(lambda: len(w.forwards) == 1)
        second = w.ask(url, mm_type=MMUrlType.VIDEO, config=FOUR)  # 32
        if is_admitted:
            await until(lambda: w.engine.stats().items_waiting == 1)
            assert w.engine._items.admission.patches == 48
        else:
            with pytest.raises(QueueFullError, match=r"16 patches are waiting or running \(MM_MAX_QUEUE_PATCHES\)"):
                await second
            assert w.engine._items.admission.patches == 16
        assert (w.engine.stats().decoded_frames > 0) == is_admitted
        w.may_forward.set()
        await first
        if is_admitted:
            assert await second


async def test_a_part_of_a_turned_image_is_answered(tiny_qwen2_5_vl: Path) -> None:
    pixels = np.zeros((600, 800, 3), np.uint8)
    strip = MMPreprocessConfig(crop_positions=[*STRIP])
    async with watched(tiny_qwen2_5_vl, mm_exif_transpose=True) as w:
        upright = await w.ask(as_url(saved(np.rot90(pixels), "JPEG")), config=strip)
        lying = await w.ask(as_url(TURNED["jpeg"](pixels)), config=strip)
        assert len(upright.embeddings[0]) == len(lying.embeddings[0]) > 0


async def test_a_turned_image_too_large_for_the_device_is_refused_before_its_rows_are_made(
    tiny_qwen2_5_vl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    prepared_by = worker_protocol.prepared_by
    monkeypatch.setattr(worker_protocol, "prepared_by", lambda *a: (made.append(a), prepared_by(*a))[1])
    url = as_url(TURNED["jpeg"](np.zeros((56, 112, 3), np.uint8)))  # 32 patches
    for limit in (31, 32):
        async with watched(tiny_qwen2_5_vl, mm_exif_transpose=True, mm_max_patches_per_item=limit) as w:
            asked = w.ask(url, config=MMPreprocessConfig())
            if limit == 32:
                assert len((await asked).embeddings[0]) == 8
                continue
            with pytest.raises(BadItemsError, match=r"32 patches, over the limit of 31 \(MM_MAX_PATCHES_PER_ITEM\)"):
                await asked
            assert not made


@pytest.mark.parametrize(("limit", "is_admitted"), [(48, True), (47, False)])
async def test_a_turned_image_counts_in_the_queue(
    limit: int, is_admitted: bool, tiny_qwen2_5_vl: Path, urls: list[str]
) -> None:
    url = as_url(TURNED["jpeg"](np.zeros((56, 112, 3), np.uint8)))  # 32 patches
    async with watched(tiny_qwen2_5_vl, mm_exif_transpose=True, mm_max_queue_patches=limit) as w:
        w.may_forward.clear()
        first = w.ask(urls[0])  # 16 patches
        await until(lambda: len(w.forwards) == 1)
        second = w.ask(url, config=MMPreprocessConfig())
        if is_admitted:
            await until(lambda: w.engine.stats().items_waiting == 1)
            assert w.engine._items.admission.patches == 48
        else:
            with pytest.raises(QueueFullError, match="MM_MAX_QUEUE_PATCHES"):
                await second
            assert w.engine._items.admission.patches == 16
        w.may_forward.set()
        await first
        if is_admitted:
            assert await second


async def test_nobody_is_refused_for_another_who_waits_for_the_same_clip(
    tiny_qwen2_5_vl: Path, urls: list[str], frames: list[Pixels]
) -> None:
    url = as_url(encode(frames))
    async with watched(tiny_qwen2_5_vl) as w:
        await w.ask(urls[0])  # from here on it is known how long patches take
        w.may_prepare.clear()
        hasty = w.ask(url, mm_type=MMUrlType.VIDEO, config=FOUR, timeout_s=0.2)
        patient = w.ask(url, mm_type=MMUrlType.VIDEO, config=FOUR, timeout_s=60)
        with pytest.raises(DeadlineError, match="preprocess"):
            await hasty
        w.may_prepare.set()
        assert len((await patient).embeddings[0]) == 8


async def test_who_joins_learns_how_far_it_came(tiny_qwen2_5_vl: Path, frames: list[Pixels]) -> None:
    url = as_url(encode(frames))
    async with watched(tiny_qwen2_5_vl) as w:
        w.may_prepare.clear()
        asked = [w.ask(url, mm_type=MMUrlType.VIDEO, config=FOUR, timeout_s=t) for t in (0.2, 0.3)]
        for each in asked:
            with pytest.raises(DeadlineError) as caught:
                await each
            assert set(caught.value.timings_ms) == {"fetch", "preprocess"}
        w.may_prepare.set()


async def test_the_bytes_of_its_rows_are_held(tiny_qwen2_5_vl: Path, frames: list[Pixels]) -> None:
    data = animate(frames, "WEBP", 50)
    async with watched(tiny_qwen2_5_vl) as w:
        w.may_prepare.clear()
        asked = w.ask(as_url(data), mm_type=MMUrlType.VIDEO, config=FOUR)
        await until(lambda: w.prepared == 1)
        rows = (32, 3 * 2 * 14 * 14)
        assert w.engine.stats().bytes_in_flight == len(as_url(data)) + len(data) + prod(rows)
        w.may_prepare.set()
        await asked


async def test_long_headers_are_read_beside_the_event_loop(
    tiny_qwen2_5_vl: Path, frames: list[Pixels], monkeypatch: pytest.MonkeyPatch
) -> None:
    short, long = (animate(frames[:count], "PNG", 50) for count in (2, 12))
    predict, on_loop = MediaPreprocessor.predict, []

    def watched_predict(*arguments: Any) -> Any:
        on_loop.append(threading.current_thread() is threading.main_thread())
        return predict(*arguments)

    monkeypatch.setattr(MediaPreprocessor, "predict", watched_predict)
    monkeypatch.setattr(item_pipeline, "LARGEST_HEADERS", len(short))
    async with watched(tiny_qwen2_5_vl) as w:
        for data in (short, long):
            await w.ask(as_url(data), mm_type=MMUrlType.VIDEO, config=FOUR)
    assert on_loop == [True, False]
