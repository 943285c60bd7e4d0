"""Pillow's tolerance of truncated files: one flag of the process, which its readers look at all through a decode."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import ImageFile


class _TruncationSwitch:
    """Decodes that agree on the flag run side by side; one that disagrees waits for those that run, and later ones for
    it. In a worker, which does one thing at a time, nobody waits.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running = 0
        self._waiting = {False: 0, True: 0}

    @contextmanager
    def decoding(self, allow_truncated: bool) -> Iterator[None]:
        with self._changed:
            self._waiting[allow_truncated] += 1
            self._changed.wait_for(lambda: self._running == 0 or self._may_join(allow_truncated))
            self._waiting[allow_truncated] -= 1
            ImageFile.LOAD_TRUNCATED_IMAGES = allow_truncated
            self._running += 1
        try:
            yield
        finally:
            with self._changed:
                self._running -= 1
                self._changed.notify_all()

    def _may_join(self, allow_truncated: bool) -> bool:
        return allow_truncated == ImageFile.LOAD_TRUNCATED_IMAGES and not self._waiting[not allow_truncated]


TRUNCATION = _TruncationSwitch()  # one per process, as the flag that it guards
