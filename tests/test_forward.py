"""A launch and its answers: nothing is read before it has arrived, and what is wrong with an item is named."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from torch import Tensor
from torch_threads import torch_threads

from rtp_mm.config import load_settings
from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.forward import Forward, Launched, NonFiniteError, WholeForward, to_host
from rtp_mm.engine.forward_queue import Work
from rtp_mm.errors import ProcessError
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.registry import load_model
from rtp_mm.types import MMPreprocessConfig, MMUrlType, Patches


class Part:
    """Answers an item with its own value."""

    _device = torch.device("cpu")
    is_reentrant = False

    def mm_process_batch(self, values: list[Any], types: Any, configs: Any) -> list[Any]:
        return [value for value in values if value is not None]


def work(value: Any) -> Work:
    return Work(value, 1, MMUrlType.IMAGE, MMPreprocessConfig(), SimpleNamespace())  # type: ignore[arg-type]


def launch(*values: Any) -> Launched:
    return Forward(Part(), torch.float32).launch([*map(work, values)])  # type: ignore[arg-type]


def tokens(*values: float) -> Tensor:
    return torch.tensor(values)[:, None]


def test_each_item_gets_its_answer_or_what_is_wrong_with_it() -> None:
    ids = torch.zeros(2, 3)
    values = [tokens(1, 2), (tokens(3, 4), ids), tokens(5, math.nan), tokens(math.inf), (tokens(6), ids), tokens()]
    kept, placed, nan, infinite, misplaced, empty = launch(*values).collect()
    assert isinstance(kept, Embedded)
    assert isinstance(placed, Embedded)
    assert isinstance(empty, Embedded)
    assert (kept.embedding.tolist(), kept.position_ids) == ([[1], [2]], None)
    assert placed.position_ids is not None
    assert placed.position_ids.dtype == torch.int32
    assert isinstance(nan, NonFiniteError)
    assert isinstance(infinite, NonFiniteError)
    assert isinstance(misplaced, ProcessError)
    assert str(misplaced) == "1 tokens have 2 position ids"


def test_a_model_that_loses_items_fails_its_launch() -> None:
    with pytest.raises(ProcessError, match="answered 2 items with 1 embeddings"):
        launch(tokens(1), None)


class Meeting(Part):
    """Two forwards that are there at the same time; what torch's threads are to each."""

    is_reentrant = True

    def __init__(self) -> None:
        self.first_is_here, self.first_may_go_on = threading.Event(), threading.Event()
        self.first_has_stepped, self.first_may_end = threading.Event(), threading.Event()
        self.threads: dict[str, list[int]] = {}

    def call_between_steps(self, step: Callable[[], None]) -> None:
        self.step = step

    def mm_process_batch(self, values: list[Any], types: Any, configs: Any) -> list[Any]:
        [name] = values
        self.threads[name] = [torch.get_num_threads()]
        if name == "first":
            self.first_is_here.set()
            assert self.first_may_go_on.wait(30)
            self.step()
            self.threads[name].append(torch.get_num_threads())
            self.first_has_stepped.set()
            assert self.first_may_end.wait(30)
            self.step()
            self.threads[name].append(torch.get_num_threads())
        elif name == "second":
            self.first_may_go_on.set()
            assert self.first_has_stepped.wait(30)
        return [tokens(1)]


@pytest.fixture
def four_threads() -> Iterator[None]:
    with torch_threads(4):
        yield


@pytest.mark.usefixtures("four_threads")
def test_a_forward_beside_another_has_half_of_the_threads_from_its_next_step_on() -> None:
    """On their own threads: the caller's are left as they are, even where he calls the model himself."""
    part = Meeting()
    forward = Forward(part, torch.float32)  # type: ignore[arg-type]
    assert forward.lanes == 2
    with ThreadPoolExecutor(2) as lanes:
        first = lanes.submit(forward.launch, [work("first")])
        assert part.first_is_here.wait(30)
        lanes.submit(forward.launch, [work("second")]).result(30)
        part.first_may_end.set()
        first.result(30)
        lanes.submit(forward.launch, [work("third")]).result(30)
        assert lanes.submit(torch.get_num_threads).result(30) == 4
    assert part.threads == {"first": [4, 2, 4], "second": [2], "third": [4]}
    torch.set_num_threads(3)
    part.step()
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("four_threads")
def test_a_model_that_does_not_allow_it_runs_in_one_lane_with_all_threads() -> None:
    assert Forward(Part(), torch.float32).lanes == 1  # type: ignore[arg-type]
    assert WholeForward(Meeting(), torch.float32).lanes == 1  # type: ignore[arg-type]


def test_nothing_is_looked_at_before_it_has_arrived() -> None:
    """Until its event, the host's memory holds whatever was there before."""
    arriving = to_host([(tokens(1), None)], torch.float32)

    class Event:
        def synchronize(self) -> None:
            arriving.extremes.fill_(1)

    arriving.extremes.fill_(math.nan)
    [late] = Launched(arriving.answers, arriving.extremes, Event()).collect()  # type: ignore[arg-type]
    assert late is arriving.answers[0]


@pytest.mark.parametrize("act_type", ["bf16", "fp32"])
def test_a_launch_on_a_gpu_never_waits_for_it(tiny_qwen2_5_vl: Path, act_type: str) -> None:
    """It would be for the forward before. Rows lie in any host memory; two are launched before one is collected."""
    require("cuda")
    settings = load_settings(checkpoint_path=tiny_qwen2_5_vl, act_type=act_type, device="cuda")
    forward = Forward(load_model(settings).mm_part, ACT_DTYPES[act_type])
    random = np.random.default_rng(0)
    batches = [[work(Patches(random.integers(0, 256, (64, 588), np.uint8), (1, 8, 8)))] for _ in range(2)]
    alone = [forward.launch(batch).collect() for batch in batches]  # compiles kernels, captures graphs
    torch.cuda.set_sync_debug_mode("error")
    try:
        launched = [forward.launch(batch) for batch in batches]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for [first], [again] in zip(alone, [each.collect() for each in launched], strict=True):
        assert isinstance(first, Embedded)
        assert isinstance(again, Embedded)
        assert torch.equal(first.embedding, again.embedding)
