"""A preprocessor that does to its worker what the blob says, for tests of what a worker may do. Knows no torch."""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.clip import ClipLimits
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.preprocess.patches import ImagePreprocessor, new_rows
from rtp_mm.preprocess.video import open_clip
from rtp_mm.types import Blob, Layout, LogMel, MMUrlType, Patches, PreprocessOptions, RowAllocator


def script(do: str = "fill", **arguments: Any) -> Blob:
    """A blob for `ScriptedPreprocessor`."""
    return Blob(json.dumps({"do": do, **arguments}).encode(), b"", f"script:{do}")


def _load(image: ImagePreprocessor, obstacle: Path) -> ScriptedPreprocessor:
    if obstacle.exists():
        raise RuntimeError("there is an obstacle")
    return ScriptedPreprocessor(image, obstacle)


@dataclass(frozen=True)
class ScriptedPreprocessor:
    """Anything but a script goes to `image`. It cannot be loaded while the file `obstacle` is there."""

    image: ImagePreprocessor
    obstacle: Path

    def __reduce__(self) -> Any:
        return _load, (self.image, self.obstacle)

    def __call__(
        self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, allocate: RowAllocator = new_rows
    ) -> Patches:
        data = blob.data
        if not isinstance(data, bytes) or not data.startswith(b"{"):
            return self.image(blob, mm_type, options, allocate)
        act = json.loads(data)
        patches: Patches = getattr(self, act.pop("do"))(allocate, **act)
        return patches

    def fill(self, allocate: RowAllocator, count: int = 4, columns: int = 12, value: int = 0) -> Patches:
        """Rows of one value."""
        rows = allocate((count, columns))
        rows[:] = value
        return Patches(rows, (1, 1, count))

    def tell(self, allocate: RowAllocator, what: str) -> Patches:
        """Rows that hold text: the names of all modules, or the worker's process id."""
        text = {"modules": " ".join(sys.modules), "pid": str(os.getpid())}[what].encode()
        rows = allocate((1, len(text)))
        rows[0] = np.frombuffer(text, np.uint8)
        return Patches(rows, (1, 1, 1))

    def decode(self, allocate: RowAllocator, path: str) -> Patches:
        """A row for each frame of a clip: how many threads the process has while it is read."""
        with open_clip(Path(path).read_bytes(), ClipLimits(1 << 20, 60, 1 << 30)) as clip:
            rows = allocate((clip.frames, 3))
            for row, _ in zip(rows, clip.read(range(clip.frames)), strict=True):
                row[:] = len(os.listdir("/proc/self/task"))
        return Patches(rows, (1, 1, len(rows)))

    def stall(self, allocate: RowAllocator, note: str, count: int = 0, seconds: float = 600) -> Patches:
        """Writes half of its rows, and its process id to the file `note`, then sleeps."""
        if count:
            allocate((count, 1024))[: count // 2] = 0xEE
        Path(note).with_suffix(".tmp").write_text(str(os.getpid()))
        Path(note).with_suffix(".tmp").rename(note)
        time.sleep(seconds)
        return self.fill(allocate)

    def crash(self, allocate: RowAllocator, note: str) -> Patches:
        Path(note).write_text(str(os.getpid()))
        ctypes.string_at(0)
        raise AssertionError

    def leave(self, allocate: RowAllocator, status: int) -> Patches:
        os._exit(status)

    def hoard(self, allocate: RowAllocator, mib: int) -> Patches:
        return self.fill(allocate, value=int(np.ones(mib << 20, np.uint8).sum() > 0))

    def stumble(self, allocate: RowAllocator) -> Patches:
        return {}["/secret/path"]  # type: ignore[no-any-return]

    def refuse(self, allocate: RowAllocator) -> Patches:
        raise WrongFormatError("no picture")

    def lie(self, allocate: Any, *words: Any, said: list[str]) -> Patches:
        """Sends these messages as they stand."""
        for message in said:
            allocate.func.__self__._channel.send(message.encode())
        time.sleep(600)
        raise AssertionError


@dataclass(frozen=True)
class LyingPreprocessor:
    """Says and is to be believed in what `media` does, but for rows of an item whose source names a lie."""

    media: MediaPreprocessor

    LIES: ClassVar[dict[str, Callable[[int, int, int, int], Layout]]] = {
        "more": lambda t, h, w, columns: Layout((4 * t * h * w, columns), (t, 2 * h, 2 * w)),
        "fewer": lambda t, h, w, columns: Layout((4 * t, columns), (t, 2, 2)),
        "swapped": lambda t, h, w, columns: Layout((t * h * w, columns), (t, w, h)),
        "doubled": lambda t, h, w, columns: Layout((t * h * w, 2 * columns), (t, h, w)),
        "one line": lambda t, h, w, columns: Layout((t * h * w, columns), (1, 1, t * h * w)),
        "odd": lambda t, h, w, columns: Layout((t * 3 * w, columns), (t, 3, w)),
        "sound": lambda t, h, w, columns: Layout((t * h * w, columns), None),
    }

    @property
    def cache_key(self) -> tuple[object, ...]:
        return self.media.cache_key

    def predict(self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions) -> Layout | None:
        return self.media.predict(blob, mm_type, options)

    def is_possible(self, layout: Layout, blob: Blob, mm_type: MMUrlType) -> bool:
        return self.media.is_possible(layout, blob, mm_type)

    def __call__(
        self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, allocate: RowAllocator = new_rows
    ) -> Patches | LogMel:
        if (lie := self.LIES.get(Path(blob.source).stem)) is None:
            return self.media(blob, mm_type, options, allocate)
        honest = self.media(blob, mm_type, options)
        layout = lie(*honest.grid_thw, honest.rows.shape[1])
        rows = allocate(layout.shape)
        rows[:] = 128
        if layout.grid_thw is None:
            return LogMel(rows.view(np.float32))
        return replace(honest, rows=rows, grid_thw=layout.grid_thw)


@dataclass(frozen=True)
class HeavyPreprocessor:
    """Its rows are a hash of `ballast`, which every worker gets with it."""

    ballast: bytes

    def __call__(
        self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, allocate: RowAllocator = new_rows
    ) -> Patches:
        rows = allocate((1, 32))
        rows[0] = np.frombuffer(hashlib.sha256(self.ballast).digest(), np.uint8)
        return Patches(rows, (1, 1, 1))
