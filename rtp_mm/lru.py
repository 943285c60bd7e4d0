"""cachetools' LRU with a budget of bytes, which tells what it did."""

from __future__ import annotations

from typing import Protocol, TypeVar

from cachetools import LRUCache

from rtp_mm.types import CacheStats


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Key = TypeVar("Key")
Value = TypeVar("Value", bound=Sized)


class ByteLRU(LRUCache[Key, Value]):
    """Values by key, at most `budget_bytes` of them; `ValueError` for one that is larger than that by itself."""

    def __init__(self, budget_bytes: int) -> None:
        super().__init__(budget_bytes, getsizeof=lambda value: value.nbytes)
        self._evictions = 0

    def popitem(self) -> tuple[Key, Value]:
        """Only called for want of space."""
        self._evictions += 1
        return super().popitem()

    def stats(self, hits: int, misses: int) -> CacheStats:
        return CacheStats(len(self), int(self.currsize), int(self.maxsize), hits, misses, self._evictions)
