"""Clips through the engine and the server: cached with their timing, which the trailing metadata carries."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import FRAMES, encode, moving

import rtp_mm
from rtp_mm.errors import BadItemsError
from rtp_mm.logs import KeyValueFormatter
from rtp_mm.server.call import MAX_SECONDS_BYTES, Call
from rtp_mm.server.wire import SECONDS_METADATA
from rtp_mm.types import Caller, MMUrlType


def trailing(seconds: list[float | None]) -> str | None:
    call = Call(Caller("test", is_local=True))
    call.seconds_per_grid = seconds
    return dict(call.trailing_metadata()).get(SECONDS_METADATA)


def test_seconds_per_grid_has_a_number_per_item() -> None:
    assert trailing([None, 1.0, 2 / 3]) == "0,1,0.666666667"


def test_stills_alone_send_none() -> None:
    assert trailing([None, None]) is None
    assert trailing([]) is None


@pytest.mark.parametrize(("items", "number"), [(341, "0.666666667"), (342, "0.66666667"), (682, "0.667")])
def test_many_clips_have_fewer_digits(items: int, number: str) -> None:
    text = trailing([2 / 3] * items)
    assert text == ",".join([number] * items)
    assert len(text) <= MAX_SECONDS_BYTES


def test_metadata_that_would_cost_the_status_is_left_out_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert trailing([None] * 2047 + [1.0]) is not None
    assert not caplog.records
    assert trailing([2 / 3] * 683) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.search(
        f"metadata left out id=[0-9a-f]{{8}} name={SECONDS_METADATA} items=683", KeyValueFormatter().format(record)
    )


def test_a_cached_clip_keeps_its_timing(tiny_qwen2_5_vl: Path, tmp_path: Path, photos: dict[str, Any]) -> None:
    """And its frames go through worker processes."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode(moving(photos["chelsea"])))
    options = {"act_type": "fp32", "device": "cpu", "mm_pos_t": "scaled", "mm_preprocess_max_workers": 1}
    engine = rtp_mm.create_engine(vit_separation=0, checkpoint_path=tiny_qwen2_5_vl, **options)
    try:
        first = engine.submit([str(path)], types=[MMUrlType.VIDEO])
        again = engine.submit([str(path)], types=[MMUrlType.DEFAULT])  # told from the bytes
        stats = engine.stats()
    finally:
        engine.close()
    assert first.seconds_per_grid == again.seconds_per_grid == [1.0]
    assert again.cached_items == 1
    assert 4 <= stats.decoded_frames <= FRAMES + 1
    assert stats.fetched_bytes == 2 * path.stat().st_size
    assert first.position_ids is not None
    assert first.position_ids[0][:, 0].unique().tolist() == [0, 2]  # 1 s is 2 steps
    assert torch.equal(first.embeddings[0], again.embeddings[0])


def test_a_clip_over_the_devices_limit_is_refused_before_its_frames_are_decoded(
    tiny_qwen2_5_vl: Path, tmp_path: Path, photos: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device's own limit, not an option's: by the header alone, and with the option that raises it."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(encode(moving(photos["chelsea"])))
    monkeypatch.setattr("rtp_mm.engine.limits.CPU_ITEM_PATCHES", 100)
    monkeypatch.setattr("rtp_mm.media.video._Video._pixels", lambda *_: pytest.fail("decoded"))
    options = {"act_type": "fp32", "device": "cpu", "use_local_preprocess": 1}
    engine = rtp_mm.create_engine(vit_separation=0, checkpoint_path=tiny_qwen2_5_vl, **options)
    try:
        with pytest.raises(BadItemsError, match=r"4 frames of .* over the limit of 100 \(MM_MAX_PATCHES_PER_ITEM\)"):
            engine.submit([str(path)], types=[MMUrlType.VIDEO])
    finally:
        engine.close()
