"""CUDA graphs by bucket, with a recording that needs no GPU: it runs the function again on the same buffers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.models.registry import load_model
from rtp_mm.types import Patches
from rtp_mm.vit.attention import Batch, Segments
from rtp_mm.vit.graphs import GRANULE, LARGEST, SIZES, Captured, CudaGraphs, choose_bucket, padded, use_graphs
from rtp_mm.vit.rope import RotaryTable
from rtp_mm.vit.tower import VisionTower

DIM, HALF = 8, 4
MB = 1 << 20
GRIDS = [(1, 2, 2), (1, 2, 6), (1, 8, 8), (1, 10, 12), (1, 16, 16), (1, 22, 14), (2, 4, 6)]


def cumulative(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def batch(lengths: list[int]) -> Batch:
    rows = sum(lengths)
    full = Segments.from_lengths(cumulative(lengths), lengths)
    return Batch(torch.randn(rows, DIM), RotaryTable(torch.randn(rows, HALF), torch.randn(rows, HALF)), full, full)


class Recorder:
    """Captures as a GPU does: the function runs once, and again on the same buffers whenever it is replayed."""

    def __init__(self, nbytes: int = 0) -> None:
        self.captures = 0
        self._nbytes = nbytes

    def __call__(self, function: Callable[[], Tensor]) -> Captured:
        self.captures += 1
        output = function()

        def replay() -> None:
            output.copy_(function())

        return Captured(replay, output, self._nbytes)


def test_buckets_ascend_to_the_largest_and_waste_little() -> None:
    assert SIZES[0] == GRANULE
    assert SIZES[-1] == LARGEST
    for smaller, larger in pairwise(SIZES):
        assert larger % GRANULE == 0
        assert larger - smaller <= max(GRANULE, larger / 5 + GRANULE)


@pytest.mark.parametrize("edge", SIZES)
def test_every_bucket_edge_is_where_it_is_said_to_be(edge: int) -> None:
    below, at = choose_bucket(batch([edge - 1])), choose_bucket(batch([edge]))
    assert below is not None
    assert at is not None
    assert below.patches == at.patches == edge
    above = choose_bucket(batch([edge + 1]))
    assert above is None if edge == LARGEST else above is not None and above.patches > edge


def test_counts_and_lengths_of_segments_round_up_to_powers_of_two() -> None:
    assert choose_bucket(batch([60, 60, 9])) == (192, 4, 64, 4, 64)
    assert choose_bucket(batch([64])) == (64, 1, 64, 1, 64)


def test_padding_is_zeros_in_no_segment() -> None:
    small = batch([4, 12])
    bucket = choose_bucket(small)
    assert bucket is not None
    static = padded(small, bucket)
    assert static.windows is static.full
    assert torch.equal(static.x[:16], small.x)
    for tensor in (static.x, *static.rotary):
        assert tensor.shape[0] == 64
        assert not tensor[16:].any()
    three = padded(batch([4, 4, 4]), bucket._replace(frames=8))
    assert three.full.cu.tolist() == [0, 4, 8, 12, 12, 12, 12, 12, 12]


def test_a_bucket_that_comes_again_gets_a_graph_and_one_whose_graph_went_waits_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rtp_mm.vit.graphs.SIGHTS", 2)
    record = Recorder(nbytes=40 * MB)
    graphs = CudaGraphs(lambda b: b.x * 2, record, 50 * MB)
    small, large = batch([64]), batch([128])
    captures = []
    for b in (small, small, small, large, large, small, small):
        assert torch.equal(graphs(b), b.x * 2)
        captures.append(record.captures)
    assert captures == [0, 1, 1, 1, 2, 2, 3]


def test_after_a_capture_that_fails_batches_run_without_unless_they_have_a_graph(
    caplog: pytest.LogCaptureFixture,
) -> None:
    record = Recorder()

    def capture(function: Callable[[], Tensor]) -> Captured:
        if record.captures:
            raise RuntimeError("operation not permitted\nwhen stream is capturing")
        return record(function)

    runs: list[int] = []

    def run(b: Batch) -> Tensor:
        runs.append(len(b.x))
        return b.x * 2

    graphs = CudaGraphs(run, capture, MB)
    early, late, last = batch([60]), batch([100]), batch([150])
    for b in (early, late, last, early):
        assert torch.equal(graphs(b), b.x * 2)
    assert runs == [64, 64, 100, 150, 64]  # padded: by a graph
    assert [r.getMessage() for r in caplog.records] == ["no more graphs"]


def test_a_capture_without_memory_is_tried_again_later_and_spoils_no_others() -> None:
    record = Recorder()
    tries: list[int] = []  # after so many batches

    def capture(function: Callable[[], Tensor]) -> Captured:
        tries.append(batches)
        if len(tries) in (1, 3):
            raise torch.OutOfMemoryError("no memory")
        return record(function)

    graphs = CudaGraphs(lambda b: b.x * 2, capture, MB)
    one, other = batch([60]), batch([100])
    for batches in range(1, 202):
        b = other if batches == 2 else one
        assert torch.equal(graphs(b), b.x * 2)
    assert tries == [1, 2, 11, 101]
    assert record.captures == 2


def test_a_graph_is_captured_once_a_bucket_and_its_answers_outlive_the_next() -> None:
    record = Recorder()
    graphs = CudaGraphs(lambda b: b.x.mul(2), record, MB)
    batches = [batch([4]), batch([9]), batch([33])]
    answers = [graphs(b) for b in batches]
    assert record.captures == len({choose_bucket(b) for b in batches}) == 3
    again = [graphs(b) for b in batches]
    assert record.captures == 3
    for b, first, second in zip(batches, answers, again, strict=True):
        assert torch.equal(first, b.x * 2)
        assert torch.equal(second, first)


def test_what_the_run_overwrites_is_the_graphs_own() -> None:
    graphs = CudaGraphs(lambda b: b.x.add_(1), Recorder(), MB)
    one = batch([5])
    before = one.x.clone()
    for _ in range(3):
        assert torch.equal(graphs(one), before + 1)
    assert torch.equal(one.x, before)


def test_memory_is_bounded_and_the_longest_unused_goes_first() -> None:
    record = Recorder(nbytes=40 * MB)
    graphs = CudaGraphs(lambda b: b.x * 1, record, max_bytes=100 * MB)
    small, middle, large = batch([64]), batch([128]), batch([192])
    for b in (small, middle, small, large):  # `middle` goes
        graphs(b)
    assert record.captures == 3
    graphs(small)
    assert record.captures == 3
    graphs(middle)
    assert record.captures == 4


def test_a_graph_over_the_whole_budget_runs_is_not_kept_and_rarely_captured_again() -> None:
    record = Recorder(nbytes=101 * MB)
    graphs = CudaGraphs(lambda b: b.x * 3, record, max_bytes=100 * MB)
    one = batch([7])
    captures = []
    for _ in range(200):
        assert torch.equal(graphs(one), one.x * 3)
        captures.append(record.captures)
    assert [captures.index(count) for count in (1, 2, 3)] == [0, 9, 99]  # its tenth sight, its hundredth
    assert captures[-1] == 3


def test_batches_over_the_largest_bucket_need_no_graph() -> None:
    record = Recorder()
    graphs = CudaGraphs(lambda b: b.x * 3, record, MB)
    large = batch([LARGEST + 1])
    assert torch.equal(graphs(large), large.x * 3)
    assert record.captures == 0


@pytest.fixture
def tower(tiny_checkpoint: Path) -> VisionTower:
    model = load_model(load_settings(checkpoint_path=tiny_checkpoint, act_type="fp32", device="cpu"))
    tower: VisionTower = model.mm_part.tower  # type: ignore[attr-defined]
    assert tower.attention_backend == "packed"
    return tower


def images(seed: int = 0) -> list[Patches]:
    random = np.random.default_rng(seed)
    return [Patches(random.integers(0, 256, (t * h * w, 588), np.uint8), (t, h, w)) for t, h, w in GRIDS]


def test_graphs_are_invisible(tower: VisionTower) -> None:
    """The same bits with and without, alone and together, also after a forward that left NaN in all buffers."""

    def run_and_poison(batch: Batch) -> Tensor:
        out = tower._run_eagerly(batch)
        for buffer in (batch.x, *batch.rotary):
            buffer.fill_(float("nan"))
        return out

    items = images()
    alone = [tower([item])[0][0] for item in items]
    tower._run = CudaGraphs(run_and_poison, Recorder(), 1 << 30)
    for order in (items, items[::-1]):
        for item in order:
            [(embedding, _)] = tower([item])
            assert torch.equal(embedding, next(a for i, a in zip(items, alone, strict=True) if i is item))
    for (embedding, _), expected in zip(tower(items), alone, strict=True):
        assert torch.equal(embedding, expected)


@pytest.mark.parametrize("edge", SIZES)
def test_batching_is_invisible_at_a_buckets_edge(tower: VisionTower, edge: int) -> None:
    """Images of 4 and 12 patches keep their bits beside one, or a clip, that brings the batch just below, to and above
    the edge."""
    small = images()[:2]
    alone = [tower([item])[0][0] for item in small]
    tower._run = CudaGraphs(tower._run_eagerly, Recorder(), 1 << 30)
    for patches in (edge - 4, edge, edge + 4):
        rows, is_clip = patches - 16, edge > 1024  # one frame of so many would take long
        grid, columns = ((rows // 4, 2, 2), 1176) if is_clip else ((1, 2, rows // 2), 588)
        other = Patches(np.random.default_rng(edge).integers(0, 256, (rows, columns), np.uint8), grid)
        orders = ([small[0], other, small[1]], [*small, other], [other, *small])
        for order in orders[:1] if is_clip else orders:
            embeddings = [embedding for embedding, _ in tower(order)]
            for item, expected in zip(small, alone, strict=True):
                place = next(i for i, o in enumerate(order) if o is item)
                assert torch.equal(embeddings[place], expected)


def test_padding_of_nan_reaches_nobody(tower: VisionTower) -> None:
    """Even were padding not zeroed, rows of a batch would keep their bits: nothing reads a row of no segment."""
    [item] = images()[3:4]
    [(expected, _)] = tower([item])

    def run_with_poison(batch: Batch) -> Tensor:
        bucket = choose_bucket(batch)
        assert bucket is not None
        static = padded(batch, bucket._replace(patches=bucket.patches + GRANULE))
        used = batch.x.shape[0]
        for tensor in (static.x, *static.rotary):
            tensor[used:] = float("nan")
        out = tower._run_eagerly(static)
        assert out[used // 4 :].isnan().all()
        return out[: used // 4]

    tower._run = run_with_poison
    assert torch.equal(tower([item])[0][0], expected)


@pytest.mark.parametrize(
    ("setting", "device", "attention", "expected"),
    [
        ("auto", "cuda", "torch", True),
        ("auto", "cuda", "sdpa", False),
        ("auto", "cpu", "packed", False),
        ("0", "cuda", "flash", False),
        ("1", "cuda", "flash", True),
    ],
)
def test_where_graphs_are_used(setting: str, device: str, attention: str, expected: bool) -> None:
    assert use_graphs(setting, torch.device(device), attention) is expected


@pytest.mark.parametrize(("device", "attention"), [("cpu", "packed"), ("cuda", "sdpa")])
def test_graphs_that_cannot_be_are_refused(device: str, attention: str) -> None:
    with pytest.raises(StartError, match="MM_CUDA_GRAPHS=1 cannot be"):
        use_graphs("1", torch.device(device), attention)
