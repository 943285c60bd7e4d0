"""The order of the device: small before large, nothing for ever."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Iterator

import pytest

from rtp_mm.engine.forward_queue import ForwardQueue, Work
from rtp_mm.types import MMPreprocessConfig, MMUrlType


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def work(loop: asyncio.AbstractEventLoop, patches: int | None, at: float) -> Work:
    return Work(None, patches, MMUrlType.IMAGE, MMPreprocessConfig(), loop.create_future(), at)


def test_small_work_goes_before_large(loop: asyncio.AbstractEventLoop) -> None:
    line = ForwardQueue(1000, patience_s=0.01)
    large, small = work(loop, 900, 0), work(loop, 200, 1)
    line.add(large)
    line.add(small)
    assert line.patches == 1100
    assert [line.take(), line.take(), line.take()] == [[small], [large], []]
    assert line.patches == 0


def test_large_work_does_not_starve(loop: asyncio.AbstractEventLoop) -> None:
    """Small work keeps coming faster than the device takes it; the large one goes when its patience is over."""
    line = ForwardQueue(1000, patience_s=0.01)
    large = work(loop, 1000, at=0)
    line.add(large)
    for now in itertools.count():
        for _ in range(20):
            line.add(work(loop, 100, at=now))
        if large in line.take():
            break
        assert now < 1000
    small_before = now * 10
    came_in_time = sum(20 for at in range(now + 1) if at + 100 * 0.01 <= 1000 * 0.01)
    assert small_before <= came_in_time
    fifo_only = ForwardQueue(1000, patience_s=0)
    fifo_only.add(large)
    fifo_only.add(work(loop, 100, at=1))
    assert fifo_only.take() == [large]


def test_nobody_is_overtaken_by_what_comes_after_its_patience(loop: asyncio.AbstractEventLoop) -> None:
    """Over random arrivals: what goes before W came before W's own time plus its patience."""
    rng = random.Random(7)
    for _ in range(50):
        line, patience_s, now, taken = ForwardQueue(500, 0.01), 0.01, 0.0, []
        for _ in range(60):
            now += rng.random()
            line.add(work(loop, rng.choice([1, 20, 300, 500, 800]), now))
            if rng.random() < 0.3:
                taken += line.take()
        while batch := line.take():
            taken += batch
        assert len(taken) == 60
        for place, later in enumerate(taken):
            for before in taken[:place]:
                assert before.queued_at <= later.queued_at + (later.patches or 0) * patience_s


def test_a_batch_keeps_to_its_budget_and_what_is_larger_goes_alone(loop: asyncio.AbstractEventLoop) -> None:
    line = ForwardQueue(100, patience_s=0)
    items = [work(loop, patches, at) for at, patches in enumerate([40, 60, 1, 250, None, 100, 0, None])]
    for item in items:
        line.add(item)
    batches = []
    while batch := line.take():
        batches.append([item.patches for item in batch])
    assert batches == [[40, 60], [1], [250], [None], [100], [0], [None]]


def test_takers_leave_one_another_a_share(loop: asyncio.AbstractEventLoop) -> None:
    line = ForwardQueue(100, takers=2)
    works = [work(loop, 30, 0) for _ in range(7)]
    for each in works:
        line.add(each)
    taken = [line.take() for _ in range(5)]
    assert [len(batch) for batch in taken] == [3, 2, 1, 1, 0]  # the budget's, then half of what waits, at least one
    assert [each for batch in taken for each in batch] == works


def test_what_is_taken_out_is_gone(loop: asyncio.AbstractEventLoop) -> None:
    line = ForwardQueue(100, patience_s=0)
    same_place = [work(loop, 10, at=1) for _ in range(3)]
    for item in same_place:
        line.add(item)
    line.remove(same_place[1])
    line.remove(same_place[1])
    assert (len(line), line.patches) == (2, 20)
    assert line.take() == [same_place[0], same_place[2]]
    line.remove(same_place[0])
    assert (len(line), line.patches) == (0, 0)


def test_patches_before_counts_what_goes_first(loop: asyncio.AbstractEventLoop) -> None:
    line = ForwardQueue(100, patience_s=0.01)
    for patches in (10, 50, 300):
        line.add(work(loop, patches, at=0))
    assert [line.patches_before(patches, now=1) for patches in (1, 10, 500)] == [60, 60, 360]
    assert line.patches_before(10, now=0) <= 10
