"""CUDA graphs of a tower's blocks: a small batch is one launch instead of some 300, which would take longer than it.

A graph's shapes are fixed, so batches are padded up to a bucket and copied into its buffers. Padding rows are zeros and
belong to no segment; padding segments are empty. Both stay finite and touch nobody.
"""

from __future__ import annotations

import logging
import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import torch
from cachetools import LRUCache
from torch import Tensor

from rtp_mm.errors import StartError
from rtp_mm.logs import log_event
from rtp_mm.vit.attention import Batch, Segments
from rtp_mm.vit.rope import RotaryTable

LARGEST = 4096  # patches; above, the GPU is busy for longer than the launches take
GRANULE = 64
GROWTH = 1.25  # from bucket to bucket: at most a fifth of a batch is padding
SIGHTS = 2  # of a bucket, before it gets a graph: a capture, and the forward before it, pay for what comes again
PATIENCE = 10  # times as many sights, before a bucket whose capture found no room is tried again: room may have come
GRAPH_UNSAFE = ("sdpa",)  # attention backends whose launches depend on the lengths of the segments

_log = logging.getLogger(__name__)


class Bucket(NamedTuple):
    """What a graph is for; a batch fits when none of its numbers is larger."""

    patches: int
    frames: int
    longest_frame: int
    windows: int
    longest_window: int


def bucket_sizes(largest: int = LARGEST) -> list[int]:
    """Ascending multiples of `GRANULE` up to `largest`, each about `GROWTH` times the last."""
    sizes = [GRANULE]
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + GRANULE, -int(-sizes[-1] * GROWTH // GRANULE) * GRANULE)))
    return sizes


SIZES = bucket_sizes()


def choose_bucket(batch: Batch) -> Bucket | None:
    """The smallest bucket that the batch fits, or None for a batch that is too large to need one."""
    patches = batch.x.shape[0]
    if patches > LARGEST:
        return None
    segments = (batch.full, batch.windows)
    counts = [n for s in segments for n in (_power_of_two(s.cu.shape[0] - 1), _power_of_two(s.max_length))]
    return Bucket(SIZES[bisect_left(SIZES, patches)], *counts)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def padded(batch: Batch, bucket: Bucket) -> Batch:
    """A copy of the batch, of the bucket's size."""

    def rows(t: Tensor) -> Tensor:
        return t.new_empty(bucket.patches, *t.shape[1:])

    def segments(s: Segments, count: int, longest: int) -> Segments:
        return Segments(s.cu.new_empty(count + 1), longest, ())

    full = segments(batch.full, bucket.frames, bucket.longest_frame)
    has_windows = batch.windows is not batch.full
    windows = segments(batch.windows, bucket.windows, bucket.longest_window) if has_windows else full
    static = Batch(rows(batch.x), RotaryTable(*map(rows, batch.rotary)), full, windows)
    copy_into(static, batch)
    return static


def copy_into(static: Batch, batch: Batch) -> None:
    """The batch into a graph's buffers, and padding over whatever the last one left behind it."""
    used = batch.x.shape[0]
    for target, source in zip((static.x, *static.rotary), (batch.x, *batch.rotary), strict=True):
        target[:used].copy_(source)
        target[used:].zero_()
    for to, of in ((static.full, batch.full), (static.windows, batch.windows)):
        to.cu[: of.cu.shape[0]].copy_(of.cu)
        to.cu[of.cu.shape[0] :].copy_(of.cu[-1:].expand(to.cu.shape[0] - of.cu.shape[0]))


class Captured(NamedTuple):
    """A recorded function: `replay` runs it again on the same buffers and leaves its result in `output`."""

    replay: Callable[[], None]
    output: Tensor
    nbytes: int  # of device memory that the recording holds


@dataclass(frozen=True, slots=True)
class _Graph:
    inputs: Batch
    captured: Captured

    @property
    def nbytes(self) -> int:
        return self.captured.nbytes + self.inputs.x.nbytes + sum(t.nbytes for t in self.inputs.rotary)


class CudaGraphs:
    """`run` by graphs, captured for buckets that come again; the longest unused go when all together hold over
    `max_bytes`.

    `capture` records a function of no arguments; where it raises `RuntimeError`, as where another thread asks the
    device for what no capture allows, that was the last one, and batches without a graph run without. All calls must be
    on one stream: a batch enters a graph's buffers there only after the one before it was computed and copied out,
    however early it is launched.
    """

    def __init__(
        self,
        run: Callable[[Batch], Tensor],
        capture: Callable[[Callable[[], Tensor]], Captured],
        max_bytes: int,
    ) -> None:
        self._run = run
        self._capture = capture
        self._graphs: LRUCache[Bucket, _Graph] = LRUCache(max_bytes, getsizeof=lambda graph: graph.nbytes)
        self._sights: Counter[Bucket] = Counter()  # of those without a graph
        self._due: dict[Bucket, int] = {}  # the sight to try again at, of those whose graph found no room
        self._has_failed = False
        self._lock = threading.Lock()  # a graph's buffers are one caller's until its answer is copied out

    def __call__(self, batch: Batch) -> Tensor:
        """`run(batch)`, whose rows are as many for each row of x."""
        bucket = choose_bucket(batch)
        if bucket is None:
            return self._run(batch)
        with self._lock:
            graph = self._graphs.get(bucket) or self._record(batch, bucket)
            if graph is None:
                return self._run(batch)
            copy_into(graph.inputs, batch)
            graph.captured.replay()
            output = graph.captured.output
            return output[: output.shape[0] * batch.x.shape[0] // bucket.patches].clone()

    def _record(self, batch: Batch, bucket: Bucket) -> _Graph | None:
        """`None` where it is too early, or fails, or failed once: a spoiled capture may spoil those after it."""
        self._sights[bucket] += 1
        if self._sights[bucket] < self._due.get(bucket, SIGHTS) or self._has_failed:
            return None
        self._due[bucket] = PATIENCE * self._sights[bucket]
        inputs = padded(batch, bucket)
        try:
            graph = _Graph(inputs, self._capture(lambda: self._run(inputs)))
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError):  # which spoils nothing
                self._has_failed = True
                log_event(_log, "no more graphs", logging.WARNING, reason=str(error).partition("\n")[0])
            return None
        if graph.nbytes <= self._graphs.maxsize:
            self._graphs[bucket] = graph
            del self._sights[bucket], self._due[bucket]
        return graph


class CudaCapture:
    """Records on what is the current device when it is made. The recordings share their memory for intermediate
    results: no two may run at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # always the same: a block of the pool goes to the stream that it came from

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):  # compiles kernels and makes handles, which a capture must not
                function()
        finally:  # what it reads is given back to this stream
            torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.empty_cache()  # as the capture does: what it frees must not hide what the capture takes
        free, _ = torch.cuda.mem_get_info()
        graph = torch.cuda.CUDAGraph()
        # The stream outside: `graph` leaves its own behind where the capture's end fails. thread_local: other threads
        # may go on using the device.
        try:
            with (
                torch.cuda.stream(stream),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                output = function()
        except RuntimeError:
            with suppress(RuntimeError):  # torch leaves it open, and gives no memory back to the device meanwhile
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise
        return Captured(graph.replay, output, max(0, free - torch.cuda.mem_get_info()[0]))


def use_graphs(setting: str, device: torch.device, attention: str) -> bool:
    """Whether a tower on `device` with this attention backend replays graphs: `MM_CUDA_GRAPHS` is auto, 0 or 1.

    Raises `StartError` where they are asked for and cannot be.
    """
    can = device.type == "cuda" and attention not in GRAPH_UNSAFE
    if setting == "1" and not can:
        raise StartError(f"MM_CUDA_GRAPHS=1 cannot be: the tower is on {device} with attention {attention}")
    return can and setting != "0"
