"""The model's forward as the batcher calls it: launched on the device thread, its answers collected in host memory."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.forward_queue import Work
from rtp_mm.errors import MMError, ProcessError
from rtp_mm.models.multimodal_common import Embedding, MultiModalEmbeddingInterface, as_embedding
from rtp_mm.types import MMUrlType

HANG_S = 300.0  # no forward takes a GPU so long: seconds at most, minutes where Triton compiles before the first
LANES = 2  # of a CPU: one computes what the threads of the other wait for, each other or a core
Outcome = Embedded | MMError


class NonFiniteError(ProcessError):
    """NaN or infinity: the item's own fault, or that of a neighbour in a model that mixes its batch."""


class Launched(NamedTuple):
    """Answers on their way to the host."""

    answers: list[Embedded]
    extremes: Tensor  # [items, 2] on the host
    arrived: torch.cuda.Event | None  # `None`: they are there

    def collect(self) -> list[Outcome]:
        """Waits for them, on any thread. An outcome per item, in order: its answer, or what is wrong with it.

        Raises what went wrong on the device.
        """
        if self.arrived is not None:
            self.arrived.synchronize()
        are_finite = self.extremes.isfinite().all(1).tolist()
        return [_checked(answer, is_finite) for answer, is_finite in zip(self.answers, are_finite, strict=True)]


class Forward:
    """Forwards of many items. What becomes of those that fail is the batcher's business.

    lanes: how many may be launched at the same time, each in a thread of its own. On a CPU two: one forward with all
    threads waits at the end of every operator for the last of them, which other work may have kept from its core; two
    forwards with half of the threads each do not wait for each other.
    """

    def __init__(self, mm_part: MultiModalEmbeddingInterface, dtype: torch.dtype) -> None:
        self.device = mm_part._device
        self._mm_part = mm_part
        self._dtype = dtype
        self._threads = torch.get_num_threads()
        self.lanes = self._choose_lanes()
        self._inside: set[int] = set()  # threads whose launch is under way
        self._lock = threading.Lock()  # over it
        if self.lanes > 1:
            mm_part.call_between_steps(self._take_share_of_threads)

    def _choose_lanes(self) -> int:
        return min(LANES, self._threads) if self._mm_part.is_reentrant else 1

    @property
    def longest_s(self) -> float:
        """A forward that takes longer hangs. A CPU is slow, and does not."""
        return HANG_S if self.device.type == "cuda" else math.inf

    def launch(self, batch: Sequence[Work]) -> Launched:
        """On a lane's thread. Raises what the model raises.

        A device reads the batch's inputs when it comes to them: keep them until the answers are collected. What the
        launch took of the device's memory is free again when it returns, for the next one on the same stream: two in
        flight take no more than one. Each lane of a CPU takes its own.
        """
        with self._sharing_threads(), torch.inference_mode():
            results = self._embed(batch)
            if len(results) != len(batch):
                raise ProcessError(f"the model answered {len(batch)} items with {len(results)} embeddings")
            return to_host([as_embedding(result) for result in results], self._dtype)

    def _embed(self, batch: Sequence[Work]) -> Sequence[Tensor | Embedding]:
        return self._mm_part.mm_process_batch(
            [work.value for work in batch], [work.mm_type for work in batch], [work.config for work in batch]
        )

    @contextmanager
    def _sharing_threads(self) -> Iterator[None]:
        """All of torch's threads for a forward while it runs alone, its share while it runs beside another.

        Their number is a thread's own; but what a thread starts with, in the whole process, is the number set last.
        """
        if self.lanes == 1:
            yield
            return
        thread = threading.get_ident()
        with self._lock:
            self._inside.add(thread)
        try:
            self._take_share_of_threads()
            yield
        finally:
            with self._lock:
                self._inside.remove(thread)
                torch.set_num_threads(self._threads)

    def _take_share_of_threads(self) -> None:
        """Between two steps of a forward, which another may have joined or left meanwhile."""
        with self._lock:
            if threading.get_ident() not in self._inside:  # somebody else's call of the model
                return
            share = max(1, self._threads // len(self._inside))
            if share != torch.get_num_threads():
                torch.set_num_threads(share)

    def enter_thread(self) -> None:
        """On each thread that will call: a thread starts on the first device, and kernels run on the thread's."""
        torch.get_num_threads()  # a thread's first question sets its number to the process's: here, not amid a forward
        if self.device.type == "cuda" and self.device.index is not None:
            torch.cuda.set_device(self.device)

    def free_memory(self) -> None:
        """Gives what the allocator keeps back to the device, so that a smaller forward finds room in one piece."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def is_device_gone(self) -> bool:
        """Whether the device answers no more: a CUDA error that stays fails every later call of the process.

        On any thread. Waits for the stream, so that nothing of a launch that failed reads its inputs any more; not for
        the device, which must not be asked while the other thread captures a graph.
        """
        if self.device.type != "cuda":
            return False
        try:
            torch.cuda.current_stream(self.device).synchronize()
        except RuntimeError:  # torch.AcceleratorError is one
            return True
        return False


def is_whole(mm_part: MultiModalEmbeddingInterface) -> bool:
    """Whether the part has an `mm_embedding` of its own, and so opens by itself what it is asked for."""
    return type(mm_part).mm_embedding is not MultiModalEmbeddingInterface.mm_embedding


class WholeForward(Forward):
    """For a third party's part with an `mm_embedding` of its own, from URL to answer: `Work.value` is the input."""

    longest_s = math.inf  # it waits for a download, too

    def _choose_lanes(self) -> int:
        return 1

    def _embed(self, batch: Sequence[Work]) -> Sequence[Tensor | Embedding]:
        return [self._embed_one(work) for work in batch]

    def _embed_one(self, work: Work) -> Embedding:
        tensor = {"tensor": work.value.tensor} if work.mm_type is MMUrlType.TENSOR else {}
        return self._mm_part.mm_embedding(work.value.url, work.mm_type, configs=work.config, **tensor)


def to_host(results: Sequence[Embedding], dtype: torch.dtype) -> Launched:
    """Each answer in host memory of its own, so that keeping one does not keep its whole batch; see `_checked`.

    From a device all copies are asynchronous, into pinned memory.
    """
    embeddings = [embedding.reshape(-1, embedding.shape[-1]).to(dtype) for embedding, _ in results]
    extremes = torch.stack([_extremes(embedding) for embedding in embeddings])
    host_extremes = _own_host_copy(extremes)
    answers = [
        Embedded(_own_host_copy(embedding), None if ids is None else _own_host_copy(ids.reshape(-1, 3).int()))
        for embedding, (_, ids) in zip(embeddings, results, strict=True)
    ]
    return Launched(answers, host_extremes, _end_of_stream(extremes.device) if extremes.is_cuda else None)


def _end_of_stream(device: torch.device) -> torch.cuda.Event:
    """Of what is enqueued so far. Who waits for it sleeps: a core that spins is one less for the workers."""
    event = torch.cuda.Event(blocking=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _extremes(embedding: Tensor) -> Tensor:
    """[2]: least and largest value, NaN where there is one; `isfinite` over bf16 takes the CPU ten times as long."""
    return torch.stack(embedding.aminmax()) if embedding.numel() else embedding.new_zeros(2)


def _checked(item: Embedded, is_finite: bool) -> Outcome:
    """The item, or what is wrong with it: NaN never leaves, and every token has its position."""
    if not is_finite:
        return NonFiniteError("the embedding holds NaN or infinite values")
    if item.position_ids is not None and len(item.position_ids) != len(item.embedding):
        return ProcessError(f"{len(item.embedding)} tokens have {len(item.position_ids)} position ids")
    return item


def _own_host_copy(tensor: Tensor) -> Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor, non_blocking=True)
