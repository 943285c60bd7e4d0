"""Shared memory: slots that never overlap, memory that is given back, rows that keep their slot."""

from __future__ import annotations

import enum
import gc
import mmap
import os
from typing import Any

import numpy as np
import pytest
import torch
from conftest import require
from hypothesis import given, settings
from hypothesis import strategies as st

from rtp_mm.engine.pinning import PinnedBytes
from rtp_mm.engine.slab import SharedBytes, Slab, Slot
from rtp_mm.vit.packing import packed_rows

PAGE = mmap.PAGESIZE
PAGES = 32


def resident_bytes(fd: int) -> int:
    return os.fstat(fd).st_blocks * 512


def is_across(slab: Slab, slot: Slot) -> bool:
    """Whether some of it keeps its pages and some does not."""
    return slot.offset < slab.kept_bytes < slot.end


class PageMap:
    """The slow twin: a flag for every page."""

    def __init__(self, kept: int) -> None:
        self.is_taken = [False] * PAGES
        self.kept = kept  # pages that keep their memory

    def allocate(self, nbytes: int) -> tuple[int, bool] | None:
        """The lowest place among the pages that are kept, else the highest of those above, else the highest there is;
        and whether it was that.
        """
        count = max(1, -(-nbytes // PAGE))
        places = [i for i in range(PAGES - count + 1) if not any(self.is_taken[i : i + count])]
        below, above = [i for i in places if i + count <= self.kept], [i for i in places if i >= self.kept]
        if not places:
            return None
        start = below[0] if below else (above or places)[-1]
        self.is_taken[start : start + count] = [True] * count
        return start, not (below or above)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 12 * PAGE)), max_size=60))
@settings(deadline=None, max_examples=100)
def test_slots_are_those_of_a_map_of_pages_and_keep_their_bytes(steps: list[tuple[bool, int]]) -> None:
    slab = Slab(PAGES * PAGE)
    twin = PageMap(slab.kept_bytes // PAGE)
    held: list[tuple[Slot, int]] = []
    for number, (is_request, size) in enumerate(steps):
        if is_request:
            slot, expected = slab.allocate(size), twin.allocate(size)
            assert (slot is None) == (expected is None)  # whatever gap holds it, on one side or across
            if slot is not None and expected is not None:
                page, is_expected = expected
                assert slot.offset == page * PAGE
                assert is_across(slab, slot) == is_expected
                assert slot.nbytes >= max(size, 1)
                slab.bytes[slot.offset : slot.end] = number
                held.append((slot, number))
        elif held:
            slot, mark = held.pop(size % len(held))
            assert (slab.bytes[slot.offset : slot.end] == mark).all()
            slab.free(slot)
            pages = slice(slot.offset // PAGE, slot.end // PAGE)
            twin.is_taken[pages] = [False] * (slot.nbytes // PAGE)
    assert slab.free_bytes == twin.is_taken.count(False) * PAGE
    for slot, mark in held:
        assert (slab.bytes[slot.offset : slot.end] == mark).all()
        slab.free(slot)
    assert slab.allocate(PAGES * PAGE) == Slot(0, PAGES * PAGE)  # all gaps are one again
    slab.close()


@pytest.mark.parametrize(
    ("pages", "places"),
    [
        ([3, 3, 1], [0, 29, 3]),  # 4 keep their memory: the second does not fit there, the third does
        ([5, 4], [27, 0]),  # larger than that part: all of it lies in the other
        ([28, 4], [4, 0]),
        ([29], [3]),  # neither side holds it
        ([32], [0]),
        ([10, 10, 10, 2], [22, 12, 2, 0]),  # as many as fit into the whole, of any size
        ([2, 27, 3], [0, 5, 2]),
    ],
)
def test_what_is_left_stays_in_one_piece_around_the_boundary(pages: list[int], places: list[int]) -> None:
    slab = Slab(PAGES * PAGE)
    assert slab.kept_bytes == 4 * PAGE
    slots = [slab.allocate(count * PAGE) for count in pages]
    assert [slot and slot.offset // PAGE for slot in slots] == places
    assert [is_across(slab, slot) for slot in slots if slot] == [
        place < 4 < place + count for count, place in zip(pages, places, strict=True)
    ]
    slab.close()


def test_a_slot_is_freed_once() -> None:
    slab = Slab(PAGES * PAGE)
    first, second = slab.allocate(PAGE), slab.allocate(PAGE)
    assert first is not None
    assert second is not None
    slab.free(first)
    for slot in (first, Slot(first.offset, 2 * PAGE)):
        with pytest.raises(ValueError, match="free already"):
            slab.free(slot)
    slab.free(second)
    with pytest.raises(ValueError, match="free already"):
        slab.free(second)
    slab.close()


def test_memory_comes_with_use_and_all_but_a_part_goes_again() -> None:
    slab = Slab(64 << 20)
    assert resident_bytes(slab.fd) == 0
    slots = [slot for _ in range(8) if (slot := slab.allocate(8 << 20)) is not None]
    slab.bytes[:] = 1
    assert resident_bytes(slab.fd) == 64 << 20
    for slot in slots:
        slab.free(slot)
    assert resident_bytes(slab.fd) == slab.kept_bytes == 8 << 20
    slab.close()


def test_a_slot_is_garbage_with_the_last_view_of_its_rows() -> None:
    slab, garbage = Slab(PAGES * PAGE), []
    slot = slab.allocate(12)
    assert slot is not None
    slab.bytes[:12] = range(12)
    rows = slab.rows(slot, (3, 4), garbage.append)
    with pytest.raises(ValueError, match="read-only"):
        rows[0, 0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        rows.flags.writeable = True
    view = rows.T[1:]
    del rows
    gc.collect()
    assert garbage == []
    assert view.tolist() == [[1, 5, 9], [2, 6, 10], [3, 7, 11]]
    del view
    gc.collect()
    assert garbage == [slot]
    slab.close()


def test_rows_outlive_their_slab() -> None:
    slab = Slab(PAGES * PAGE)
    slot = slab.allocate(4)
    assert slot is not None
    rows = slab.rows(slot, (2, 2), lambda _: None)
    slab.close()
    del slab
    gc.collect()
    assert rows.tolist() == [[0, 0], [0, 0]]


def test_nobody_can_cut_the_file_under_its_readers() -> None:
    shared = SharedBytes("test", PAGE)
    for size in (0, 2 * PAGE):
        with pytest.raises(PermissionError):
            os.ftruncate(shared.fd, size)
    shared.close()


class FakeRuntime:
    """What `torch.cuda.cudart()` gives, as far as it is used."""

    class cudaError(enum.IntEnum):  # CUDA's name
        success = 0
        hostMemoryAlreadyRegistered = 712

    def __init__(self) -> None:
        self.registered: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> Any:
        if address in self.registered or flags != 0:
            return self.cudaError.hostMemoryAlreadyRegistered
        self.registered[address] = nbytes
        return self.cudaError.success

    def cudaHostUnregister(self, address: int) -> Any:
        del self.registered[address]
        return self.cudaError.success

    def cudaGetErrorString(self, error: Any) -> str:
        return str(error)


def test_what_is_never_given_back_is_registered_once_and_unregistered(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    slab = Slab(1 << 20)
    kept = slab.bytes[: slab.kept_bytes]
    first, second = PinnedBytes(kept), PinnedBytes(kept)
    assert (first.is_pinned, second.is_pinned) == (True, False)
    assert "not pinned" in caplog.text
    assert [*runtime.registered.values()] == [slab.kept_bytes]
    second.close()
    first.close()
    first.close()
    assert not runtime.registered
    slab.close()


@pytest.fixture
def cuda() -> None:
    require("cuda")


def test_registered_memory_is_pinned_for_a_gpu(cuda: None) -> None:
    slab = Slab(1 << 20)
    pinned = PinnedBytes(slab.bytes[: slab.kept_bytes])
    assert pinned.is_pinned
    assert torch.from_numpy(slab.bytes[: slab.kept_bytes]).is_pinned()
    pinned.close()
    slab.close()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("first_page", [0, 3])
def test_rows_across_the_end_of_registered_memory_reach_a_gpu(cuda: None, dtype: type, first_page: int) -> None:
    """A single copy of theirs is refused; a row may lie on both sides too."""
    slab = Slab(PAGES * PAGE)
    pinned = PinnedBytes(slab.bytes[: slab.kept_bytes])
    assert pinned.is_pinned
    if first_page:
        assert slab.allocate(first_page * PAGE)
    slot = slab.allocate((PAGES - first_page) * PAGE)
    assert slot is not None
    assert is_across(slab, slot)
    values = slab.bytes[slot.offset : slot.end].view(dtype)
    values[:] = np.arange(len(values)) % 251
    rows = values[: len(values) // 1176 * 1176].reshape(-1, 1176)
    packed = packed_rows([rows[:1], rows, rows[-1:]], torch.device("cuda"))
    np.testing.assert_array_equal(packed.cpu().numpy(), np.concatenate([rows[:1], rows, rows[-1:]]))
    del rows, values
    pinned.close()
    slab.close()
