"""An engine that is looked into while it works, and images to ask it for."""

from __future__ import annotations

import asyncio
import base64
import io
import threading
from base64 import b64decode, b64encode
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from waiting import until

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.models.registry import load_model
from rtp_mm.types import Caller, MMEmbeddingRes, MMPreprocessConfig, MMUrlType, MultimodalInput

STRANGER = Caller("ipv4:10.0.0.1:1", is_local=False)
SMALL = MMPreprocessConfig(width=56, height=56)  # 4 x 4 patches


class Watched:
    """An engine on this event loop; its prepare and its forward are counted, and wait while they are held."""

    def __init__(self, engine: MMProcessEngine) -> None:
        self.engine = engine
        self.prepared = 0
        self.forwards: list[int] = []  # items in each
        self.may_prepare = asyncio.Event()
        self.may_forward = threading.Event()
        self.may_prepare.set()
        self.may_forward.set()
        prepare, forward = engine._items.workers.prepare, engine._items._mm_part.mm_process_batch

        async def watched_prepare(*args: Any, **kwargs: Any) -> Any:
            self.prepared += 1
            await self.may_prepare.wait()
            return await prepare(*args, **kwargs)

        def watched_forward(items: Sequence[Any], *rest: Any) -> Any:
            self.forwards.append(len(items))
            assert self.may_forward.wait(30)
            return forward(items, *rest)

        engine._items.workers.prepare = watched_prepare  # type: ignore[method-assign]
        engine._items._mm_part.mm_process_batch = watched_forward  # type: ignore[method-assign]

    def ask(self, *urls: str, config: MMPreprocessConfig = SMALL, **kwargs: Any) -> asyncio.Task[MMEmbeddingRes]:
        inputs = [MultimodalInput(url, kwargs.pop("mm_type", MMUrlType.DEFAULT), config) for url in urls]
        return asyncio.create_task(self.engine.embed(inputs, **kwargs))


@asynccontextmanager
async def watched(folder: Path, *, lanes: int = 1, **options: Any) -> AsyncIterator[Watched]:
    """While a forward is held in its one lane, the next waits. Checks, too, that nothing of it is left in the end."""
    before = asyncio.all_tasks()
    options = {"checkpoint_path": folder, "device": "cpu", "act_type": "fp32"} | options
    settings = load_settings(mm_allow_private_network=True, mm_fetch_retries=0, **options)
    with patch("rtp_mm.engine.forward.LANES", lanes):
        watched = Watched(MMProcessEngine(load_model(settings), settings, asyncio.get_running_loop()))
    try:
        yield watched
        stats = watched.engine.stats()
        assert (stats.requests_running, stats.items_waiting, stats.patches_waiting, stats.bytes_in_flight) == (0,) * 4
        assert watched.engine._items.admission.patches == 0
    finally:
        watched.may_forward.set()
        await watched.engine.aclose()
    await until(lambda: asyncio.all_tasks() <= before)


def as_data_url(pixels: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def padded(url: str, nbytes: int) -> str:
    """The same image, with zeros behind its end, in a data URL of `nbytes`."""
    head, _, data = url.partition(",")
    length, filler = divmod(nbytes - len(head) - len(";n=,"), 4)
    head = head.replace(";base64", f";n={'A' * filler};base64")
    return f"{head},{b64encode(b64decode(data).ljust(3 * length, bytes(1))).decode()}"
