"""The values that travel from URL to embedding, one type per stage: MultimodalInput -> Blob -> Patches ->
MMEmbeddingRes. Imports no torch: preprocess workers read this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtp_mm.errors import WrongFormatError

if TYPE_CHECKING:
    from torch import Tensor


def text_nbytes(text: str) -> int:
    """What it takes in memory: of ASCII a byte a character, of anything else up to four."""
    return len(text) if text.isascii() else 4 * len(text)


class MMUrlType(IntEnum):
    """What a URL holds; the wire's `multimodal_type`."""

    DEFAULT = 0  # told from the bytes
    IMAGE = 1
    VIDEO = 2
    AUDIO = 3
    TENSOR = 4
    IGRAPH = 5


class CropBox(NamedTuple):
    """A part of the decoded image, as fractions of its width and height: 0 <= x1 < x2 <= 1, the same for y."""

    x1: float
    y1: float
    x2: float
    y2: float


class PreprocessOptions(NamedTuple):
    """A request's overrides of the model family's rules; `None` is unset. Hashable: it is part of every cache key."""

    width: int | None = None
    height: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    fps: int | None = None
    min_frames: int | None = None
    max_frames: int | None = None
    crop: CropBox | None = None


@dataclass(slots=True)
class MMPreprocessConfig:
    """RTP-LLM's public form of the overrides, as they stand on the wire: any value of 0 or less is unset.

    `crop_positions` is empty, or x1, y1, x2, y2 as fractions of the decoded image.
    """

    width: int = -1
    height: int = -1
    min_pixels: int = -1
    max_pixels: int = -1
    fps: int = -1
    min_frames: int = -1
    max_frames: int = -1
    crop_positions: list[float] = field(default_factory=list)
    mm_timeout_ms: int = -1

    INTEGERS: ClassVar = ("width", "height", "min_pixels", "max_pixels", "fps", "min_frames", "max_frames")

    def options(self) -> PreprocessOptions:
        """The one edge where 0 and -1 become `None`. Raises `WrongFormatError` for a crop that is none."""

        values = {name: value if (value := getattr(self, name)) > 0 else None for name in self.INTEGERS}
        if None in (values["width"], values["height"]):  # they count only together
            values |= {"width": None, "height": None}
        return PreprocessOptions(**values, crop=_crop_box(self.crop_positions))

    @classmethod
    def from_options(cls, options: PreprocessOptions) -> MMPreprocessConfig:
        """The public form again, for code that expects it: unset is -1."""
        values = {name: -1 if (value := getattr(options, name)) is None else value for name in cls.INTEGERS}
        return cls(**values, crop_positions=list(options.crop or ()))

    @property
    def timeout_ms(self) -> int | None:
        """Milliseconds the caller grants this item, or `None`. No part of any cache key."""
        return self.mm_timeout_ms if self.mm_timeout_ms > 0 else None


def _crop_box(positions: list[float]) -> CropBox | None:
    if not positions:
        return None
    if len(positions) != 4:
        raise WrongFormatError(f"crop_positions must be empty or x1, y1, x2, y2, got {len(positions)} numbers")
    box = CropBox(*(float(p) for p in positions))
    if not (0 <= box.x1 < box.x2 <= 1 and 0 <= box.y1 < box.y2 <= 1):
        raise WrongFormatError(f"crop_positions must satisfy 0 <= x1 < x2 <= 1 and 0 <= y1 < y2 <= 1, got {[*box]}")
    return box


@dataclass(slots=True)
class MultimodalInput:
    """One item of a request. `tensor` (numpy or torch) counts only when `mm_type` is `TENSOR`:
    int32 or uint8 [H, W, 3] or [T, H, W, 3] pixels of 0..255, or float32 [S] mono samples at the model's rate. A type
    may be its number; `ValueError` for one that there is not.
    """

    url: str
    mm_type: MMUrlType = MMUrlType.DEFAULT
    config: MMPreprocessConfig = field(default_factory=MMPreprocessConfig)
    tensor: Any = None

    def __post_init__(self) -> None:
        self.mm_type = MMUrlType(self.mm_type)  # a plain number will do

    @property
    def nbytes(self) -> int:
        """What its message holds in memory, about."""
        return text_nbytes(self.url) + getattr(self.tensor, "nbytes", 0)


@dataclass(frozen=True, slots=True)
class Blob:
    """What was fetched: the bytes of a file, or, for a TENSOR item, an array.

    `content_hash` is BLAKE3 (32 bytes) over the bytes, or over dtype, shape and bytes of the array.
    `source` is the redacted URL, fit for logs and errors.
    """

    data: bytes | NDArray[Any]
    content_hash: bytes
    source: str

    @property
    def nbytes(self) -> int:
        return self.data.nbytes if isinstance(self.data, np.ndarray) else len(self.data)


@dataclass(frozen=True, slots=True)
class Patches:
    """What a tower eats: bytes, never floats.

    rows:     [N, C * T * P * P] uint8 in merge-block order; columns are (channel, frame, y, x). T is 1 for a still
              image (the family's temporal fold is in the weights) and `temporal_patch_size` for a clip.
    grid_thw: (t, h, w) in patches; N == t * h * w.
    seconds_per_grid: of a clip, the time from one t to the next; `None` for a still.
    decoded_frames: of a clip's file, how many were decoded for those that were chosen.
    """

    rows: NDArray[np.uint8]
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float | None = None
    decoded_frames: int = 0

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @property
    def facts(self) -> dict[str, Any]:
        """All but the rows, for JSON."""
        return {
            "grid": self.grid_thw,
            "seconds_per_grid": self.seconds_per_grid,
            "decoded_frames": self.decoded_frames,
        }

    def copy(self) -> Patches:
        """The same in memory of its own."""
        return replace(self, rows=self.rows.copy())


@dataclass(frozen=True, slots=True)
class DevicePatches:
    """`Patches` that came into being on the tower's device: rows in the same order, with the same columns."""

    rows: Tensor
    grid_thw: tuple[int, int, int]
    seconds_per_grid: float | None = None


@dataclass(frozen=True, slots=True)
class LogMel:
    """What an audio tower eats: log-mel frames, one row each.

    rows:  [2 * steps + 2, bins] float32: a row of zeros, the convolutions' padding, then frames 0 to 2 * steps; those
           past the sound's end are silence, as much of it as the last step sees.
    cut_s: where a longer sound was cut off, seconds, or `None`.
    """

    rows: NDArray[np.float32]
    cut_s: float | None = None

    @property
    def steps(self) -> int:
        """Rows of the tower: two frames are a step, two steps a token."""
        return len(self.rows) // 2 - 1

    @property
    def nbytes(self) -> int:
        return self.rows.nbytes

    @property
    def facts(self) -> dict[str, Any]:
        """All but the rows, for JSON."""
        return {"cut_s": self.cut_s}

    def copy(self) -> LogMel:
        """The same in memory of its own."""
        return replace(self, rows=self.rows.copy())


Prepared = Patches | LogMel  # what a worker makes of a blob
RowsShape = tuple[int, int]  # [N, C] bytes, of an item's rows


class Layout(NamedTuple):
    """How an item's rows lie: their shape, and of patches the grid (t, h, w); `None` for log-mel frames."""

    shape: RowsShape
    grid_thw: tuple[int, int, int] | None


RowAllocator = Callable[[RowsShape], NDArray[np.uint8]]  # gives what rows are written to


@dataclass(slots=True, weakref_slot=True)
class MMEmbeddingRes:
    """The answer to one request, a tensor per item in the order of the inputs.

    embeddings:   [tokens, out_hidden] in the tower's dtype, on the host.
    position_ids: [tokens, 3] int32 (t, h, w) in merged-token units; `None` for models without mrope.
    extra_inputs: one flat tensor per item (deepstack), or `None`.
    timings_ms:   milliseconds by stage: fetch, preprocess, queue, forward; the slowest item of each.
    cached_items: how many came from the embedding cache, or `None` where nobody counted.
    seconds_per_grid: time from one t of the position ids' grid to the next, per item; `None` for what is no clip.
    cut_s:        where a sound longer than the model takes was cut off, per item; `None` for what was not cut.
    messages:     all items as they go onto the wire, in form `items`, where the engine keeps them so, else `None`.
    """

    embeddings: list[Tensor]
    position_ids: list[Tensor] | None = None
    extra_inputs: list[Tensor] | None = None
    timings_ms: dict[str, float] = field(default_factory=dict)
    cached_items: int | None = None
    seconds_per_grid: list[float | None] = field(default_factory=list)
    cut_s: list[float | None] = field(default_factory=list)
    messages: list[bytes] | None = None

    def __repr__(self) -> str:
        shapes = ", ".join(f"{list(each.shape)} {each.dtype}" for each in self.embeddings)
        return f"MMEmbeddingRes(embeddings: {shapes}; timings_ms: {self.timings_ms})"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: decides which local files may be read. `peer` is for the logs."""

    peer: str
    is_local: bool


LIBRARY_CALLER = Caller(peer="library", is_local=True)  # VIT_SEPARATION=0: in process, so trusted


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """Live figures behind `GetWorkerStatus`."""

    available_concurrency: int
    waiting: int
    running: int
    step_latency_ms: float
    iterations: int
    finished_version: int
    is_alive: bool
    precision: str
    cache_available_bytes: int
    cache_total_bytes: int
    max_batch_tokens: int


@dataclass(frozen=True, slots=True)
class CacheStats:
    """One cache since the engine's start: what it holds now, and counters that only grow."""

    items: int = 0
    used_bytes: int = 0
    budget_bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Live figures and counters of an engine, behind `/metrics`. Counters only grow; mappings are by label."""

    requests_running: int = 0
    items_waiting: int = 0  # prepared, for the device
    patches_waiting: int = 0
    bytes_in_flight: int = 0  # held for requests in progress: files, patches, answers
    batches: int = 0  # counter
    batch_patches: int = 0  # counter: patches in all forwards
    batch_items: int = 0  # counter: items in all forwards
    batch_patches_budget: int = 0
    forward_failures: int = 0  # counter
    rejections: Mapping[str, int] = field(default_factory=dict)  # counter by reason
    caches: Mapping[str, CacheStats] = field(default_factory=dict)  # by stage: bytes, patches, embeddings
    workers: int = 0
    workers_busy: int = 0
    worker_restarts: Mapping[str, int] = field(default_factory=dict)  # counter by cause
    device_decodes: int = 0  # counter: items decoded on the device
    cpu_decodes: Mapping[str, int] = field(default_factory=dict)  # counter by reason: what was meant for the device
    fetched_bytes: int = 0  # counter
    decoded_frames: int = 0  # counter: of videos


@dataclass(frozen=True, slots=True)
class CacheStatus:
    """Live figures behind `GetCacheStatus`. A key is the first 8 bytes of a content hash as a signed integer."""

    available_bytes: int
    total_bytes: int
    version: int
    keys: tuple[int, ...] = ()
