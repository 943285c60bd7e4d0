"""Memory that worker processes share with the engine: they write patch rows, the device reads them."""

from __future__ import annotations

import fcntl
import math
import mmap
import os
import weakref
from bisect import bisect
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_KEPT_FRACTION = 8  # one in so many of a slab's bytes keeps its pages


class SharedBytes:
    """A memfd, mapped here and, by its descriptor, in other processes. A page costs memory once it is written.

    Its size is sealed: nobody who has the descriptor can cut the file and so kill all who read it.
    """

    def __init__(self, name: str, nbytes: int) -> None:
        self.nbytes = whole_pages(nbytes)
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self.mapped = mmap.mmap(self.fd, self.nbytes)
        except BaseException:
            os.close(self.fd)
            raise
        self.bytes = np.frombuffer(self.mapped, np.uint8)

    def give_back(self, start: int, end: int) -> None:
        """Frees the memory of the whole pages [start, end); they read as zeros."""
        if start < end:
            self.mapped.madvise(mmap.MADV_REMOVE, start, end - start)

    def close(self) -> None:
        """Closes the descriptor; the memory goes with the last array on it."""
        os.close(self.fd)


class Slot(NamedTuple):
    """A part of a slab, in whole pages."""

    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


class Slab(SharedBytes):
    """Slots of shared memory; for one thread.

    The first `kept_bytes` keep their pages and so stay fast, and may be registered with a device. What is freed above
    goes back to the kernel at once, so that memory is flat after a burst. Slots fill the one part from below and the
    other from above, so that what is left stays in one piece and no slot lies across the boundary while another place
    would do: a copy of such a slot reads two kinds of memory, see `vit.packing`.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__("rtp_mm-rows", nbytes)
        self.kept_bytes = whole_pages(nbytes // _KEPT_FRACTION)
        self._gaps = [Slot(0, self.nbytes)]  # by offset; two never touch

    @property
    def free_bytes(self) -> int:
        return sum(gap.nbytes for gap in self._gaps)

    def allocate(self, nbytes: int) -> Slot | None:
        """A slot of at least `nbytes`, or `None` where no gap holds it. Its bytes are whatever was there before."""
        nbytes = whole_pages(nbytes)
        for gap in self._gaps:
            if gap.offset + nbytes <= min(gap.end, self.kept_bytes):
                return self._take(gap, gap.offset, nbytes)
        for gap in reversed(self._gaps):
            if gap.nbytes >= nbytes:
                return self._take(gap, gap.end - nbytes, nbytes)
        return None

    def _take(self, gap: Slot, offset: int, nbytes: int) -> Slot:
        slot = Slot(offset, nbytes)
        rests = Slot(gap.offset, offset - gap.offset), Slot(slot.end, gap.end - slot.end)
        i = self._gaps.index(gap)
        self._gaps[i : i + 1] = [rest for rest in rests if rest.nbytes]
        return slot

    def free(self, slot: Slot) -> None:
        """Makes a slot of `allocate` a gap again, merged with its neighbours. Raises `ValueError` for a gap."""
        i = bisect(self._gaps, slot)
        start, end = slot.offset, slot.end
        before, after = self._gaps[:i][-1:], self._gaps[i : i + 1]
        if any(gap.end > start for gap in before) or any(gap.offset < end for gap in after):
            raise ValueError(f"{slot} is free already")
        if before and before[0].end == start:
            i, start = i - 1, before[0].offset
        gap_end = after[0].end if after and after[0].offset == end else end
        self._gaps[i : i + (start < slot.offset) + (gap_end > end)] = [Slot(start, gap_end - start)]
        self.give_back(max(slot.offset, self.kept_bytes), end)

    def rows(self, slot: Slot, shape: tuple[int, int], when_garbage: Callable[[Slot], object]) -> NDArray[np.uint8]:
        """The slot's first bytes as [N, C] uint8, read-only.

        `when_garbage(slot)` is called, on any thread, once neither this array nor any view of it is left.
        """
        window = memoryview(self.mapped)[slot.offset : slot.offset + math.prod(shape)].toreadonly()
        owner = np.frombuffer(window, np.uint8)  # every view's base
        weakref.finalize(owner, when_garbage, slot).atexit = False
        return owner.reshape(shape)


def whole_pages(nbytes: int) -> int:
    """`nbytes`, rounded up; at least one page."""
    return max(1, -(-nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
