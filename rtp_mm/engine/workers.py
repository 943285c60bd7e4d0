"""The CPU-bound half, off the event loop."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from rtp_mm.errors import MMError, ProcessError
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.types import Blob, MMPreprocessConfig, MMUrlType

_log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """What a forward takes, and its cost there; `None`: it goes alone."""

    value: Any
    patches: int | None


class PreprocessWorkers:
    """Threads: decoding, resizing and patchifying release the GIL."""

    def __init__(self, mm_part: MultiModalEmbeddingInterface, count: int) -> None:
        self._mm_part = mm_part
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="rtp_mm-preprocess")

    async def prepare(self, blob: Blob, mm_type: MMUrlType, config: MMPreprocessConfig) -> Prepared:
        """What the model's `prepare` gives. Raises `MMError`; a third party's own exception becomes `ProcessError`."""
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._prepare, blob, mm_type, config)
        try:
            await asyncio.wait([work])
        finally:
            work.cancel()  # where the caller left before it began, it never runs
        error = work.exception()
        if error is not None and not isinstance(error, MMError):
            _log.error("preprocessing of %s failed", blob.source, exc_info=error)
            raise ProcessError(f"preprocessing failed with {type(error).__name__}")
        return work.result()

    def _prepare(self, blob: Blob, mm_type: MMUrlType, config: MMPreprocessConfig) -> Prepared:
        value = self._mm_part.prepare(blob, mm_type, config)
        return Prepared(value, self._mm_part.patches(value))

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
