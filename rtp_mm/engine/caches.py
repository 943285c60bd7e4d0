"""Embeddings already computed, least recently used out first, within a budget of bytes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

from cachetools import LRUCache

from rtp_mm.types import CacheStatus, MMUrlType, PreprocessOptions

if TYPE_CHECKING:
    from torch import Tensor


class CacheKey(NamedTuple):
    """Everything that changes an embedding's bits: the same key, the same bits."""

    content_hash: bytes
    mm_type: MMUrlType
    options: PreprocessOptions
    preprocess: Any  # the preprocessor's own cache key
    tower: tuple[str, ...]  # weights' fingerprint, dtype, device and attention backend


class Embedded(NamedTuple):
    """One item's answer on the host: [tokens, hidden], and [tokens, 3] int32 or `None`."""

    embedding: Tensor
    position_ids: Tensor | None

    def copy(self) -> Embedded:
        """For a caller who may write into it."""
        return Embedded(self.embedding.clone(), None if self.position_ids is None else self.position_ids.clone())

    @property
    def nbytes(self) -> int:
        return self.embedding.nbytes + (self.position_ids.nbytes if self.position_ids is not None else 0)


class EmbeddingCache:
    """For one event loop: no locks. An answer larger than the whole budget is not kept."""

    def __init__(self, budget_bytes: int) -> None:
        self._items: LRUCache[CacheKey, Embedded] = LRUCache(budget_bytes, getsizeof=lambda item: item.nbytes)
        self.version = time.time_ns()  # of the set of keys; no process's first is another's last

    def get(self, key: CacheKey) -> Embedded | None:
        found: Embedded | None = self._items.get(key)
        return found

    def put(self, key: CacheKey, item: Embedded) -> None:
        if item.nbytes <= self._items.maxsize:
            self._items[key] = item
            self.version += 1

    def status(self, *, with_keys: bool = False) -> CacheStatus:
        """A key is the first 8 bytes of the content hash, signed."""
        keys = {int.from_bytes(key.content_hash[:8], "little", signed=True) for key in self._items} if with_keys else ()
        total = int(self._items.maxsize)
        return CacheStatus(total - int(self._items.currsize), total, self.version, tuple(keys))
