"""A launch and its answers: nothing is read before it has arrived, and what is wrong with an item is named."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.forward import Forward, Launched, NonFiniteError, to_host
from rtp_mm.engine.waiting_line import Work
from rtp_mm.errors import ProcessError
from rtp_mm.types import MMPreprocessConfig, MMUrlType


class Part:
    """Answers an item with its own value."""

    _device = torch.device("cpu")

    def mm_process_batch(self, values: list[Any], types: Any, configs: Any) -> list[Any]:
        return [value for value in values if value is not None]


def launch(*values: Any) -> Launched:
    works = [
        Work(value, 1, MMUrlType.IMAGE, MMPreprocessConfig(), SimpleNamespace())  # type: ignore[arg-type]
        for value in values
    ]
    return Forward(Part(), torch.float32).launch(works)  # type: ignore[arg-type]


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


def test_nothing_is_looked_at_before_it_has_arrived() -> None:
    """Until its event, the host's memory holds whatever was there before."""
    arriving = to_host([(tokens(1), None)], torch.float32)

    class Event:
        def synchronize(self) -> None:
            arriving.extremes.fill_(1)

    arriving.extremes.fill_(math.nan)
    [late] = Launched(arriving.answers, arriving.extremes, Event()).collect()  # type: ignore[arg-type]
    assert late is arriving.answers[0]
