"""Local files through an engine: where a path leads is looked at before anything tells whether it is there."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from waiting import until
from watched_engine import STRANGER, watched

from rtp_mm.errors import BadItemsError
from rtp_mm.media.local import LocalFiles
from rtp_mm.media.redact import redact
from rtp_mm.types import LIBRARY_CALLER, MMEmbeddingRes, MMUrlType

OUTSIDE = "outside the folder of MM_ALLOWED_LOCAL_MEDIA_PATH"


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Paths that were resolved, and whether on the event loop's thread, which is the test's own."""
    seen: list[tuple[str, bool]] = []
    realpath = os.path.realpath

    def watched(path: Any, **options: Any) -> Any:
        seen.append((path, threading.current_thread() is threading.main_thread()))
        return realpath(path, **options)

    monkeypatch.setattr("rtp_mm.media.local.os.path.realpath", watched)
    return seen


async def test_a_file_that_is_read_for_one_is_not_shared_with_who_may_read_none(
    tiny_qwen2_5_vl: Path, photo_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, release = threading.Event(), threading.Event()
    read = LocalFiles.read
    monkeypatch.setattr(LocalFiles, "read", lambda *args: (begun.set(), release.wait(30), read(*args))[2])
    async with watched(tiny_qwen2_5_vl) as w:
        trusted = w.ask(str(photo_path), caller=LIBRARY_CALLER)
        await until(begun.is_set)
        with pytest.raises(BadItemsError, match="callers on this machine only"):
            await w.ask(str(photo_path), caller=STRANGER)
        assert not trusted.done()
        release.set()
        await trusted


async def test_with_a_folder_a_path_gives_all_callers_the_same(
    tiny_qwen2_5_vl: Path, photo_path: Path, resolved: list[tuple[str, bool]]
) -> None:
    """One reading for all who ask at once; where it leads out, the same refusal, whether or not a file is there."""
    folder = photo_path.parent
    inside, there, absent = str(photo_path), f"{folder}/../there", f"{folder}/../absent"
    Path(there).write_bytes(photo_path.read_bytes())
    async with watched(tiny_qwen2_5_vl, mm_allowed_local_media_path=folder) as w:
        for path in (inside, there, absent):
            resolved.clear()
            asked = [w.ask(path, caller=caller) for caller in (LIBRARY_CALLER, STRANGER, STRANGER)]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert resolved == [(path, False)]
            if path == inside:
                assert all(isinstance(outcome, MMEmbeddingRes) for outcome in outcomes)
            else:
                assert [str(outcome) for outcome in outcomes] == [f"item 0 ({redact(path)}): {OUTSIDE}"] * 3


async def test_a_path_is_resolved_before_a_part_that_opens_it_by_itself(
    tiny_qwen2_5_vl: Path, photo_path: Path, monkeypatch: pytest.MonkeyPatch, resolved: list[tuple[str, bool]]
) -> None:
    from rtp_mm.models.qwen2_vl import Qwen2VLEmbedding

    opened: list[str] = []

    def mm_embedding(self: Any, url: str, mm_type: MMUrlType = MMUrlType.DEFAULT, **kwargs: Any) -> torch.Tensor:
        opened.append(url)
        return torch.ones(3, 4)

    monkeypatch.setattr(Qwen2VLEmbedding, "mm_embedding", mm_embedding)
    good, folder = str(photo_path), photo_path.parent
    async with watched(tiny_qwen2_5_vl, mm_allowed_local_media_path=folder) as w:
        resolved.clear()
        for caller in (STRANGER, LIBRARY_CALLER):
            for url in (f"{folder}/../x.jpg", f"file:{folder}/%2e%2e/x.jpg", "/etc/hostname"):
                with pytest.raises(BadItemsError, match=OUTSIDE) as caught:
                    await w.ask(good, url, caller=caller)
                assert [failure.index for failure in caught.value.failures] == [1]
        await w.ask("https://host/a")
        assert opened == [good] * 6 + ["https://host/a"]
        assert [on_loop for _, on_loop in resolved] == [False] * 12
