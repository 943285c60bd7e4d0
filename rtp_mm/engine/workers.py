"""The CPU-bound half, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from rtp_mm.errors import MMError, ProcessError
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.types import Blob, MMPreprocessConfig, MMUrlType

_log = logging.getLogger(__name__)


class PreprocessWorkers:
    """Threads: decoding, resizing and patchifying release the GIL."""

    def __init__(self, mm_part: MultiModalEmbeddingInterface, count: int) -> None:
        self._mm_part = mm_part
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="rtp_mm-preprocess")

    async def prepare(self, blob: Blob, mm_type: MMUrlType, config: MMPreprocessConfig) -> Any:
        """What the model's `prepare` gives. Raises `MMError`; a third party's own exception becomes `ProcessError`."""
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._threads, partial(self._mm_part.prepare, blob, mm_type, config))
        try:
            await asyncio.wait([work])
        finally:
            work.cancel()  # where the caller left before it began, it never runs
        error = work.exception()
        if error is not None and not isinstance(error, MMError):
            _log.error("preprocessing of %s failed", blob.source, exc_info=error)
            raise ProcessError(f"preprocessing failed with {type(error).__name__}")
        return work.result()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
