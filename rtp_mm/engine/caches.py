"""What is worth keeping, least recently used out first, within a budget of bytes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Generic, NamedTuple

from rtp_mm.lru import ByteLRU, Key, Value
from rtp_mm.types import CacheStats, MMUrlType, PreprocessOptions

if TYPE_CHECKING:
    from torch import Tensor


class PatchKey(NamedTuple):
    """Everything that changes an item's patches: the same key, the same bytes."""

    content_hash: bytes
    mm_type: MMUrlType  # told from the bytes where the request does not say
    options: PreprocessOptions
    preprocess: Any  # the preprocessor's own cache key


class EmbeddingKey(NamedTuple):
    """Everything that changes an embedding's bits: the same key, the same bits."""

    patches: PatchKey
    tower: tuple[str, ...]  # weights' fingerprint, dtype, device, and the part's own `answer_key`


class Embedded(NamedTuple):
    """One item's answer on the host: [tokens, hidden], [tokens, 3] int32 or `None`, and a clip's seconds from one t of
    its grid to the next. Where it is sealed the tensors are views of the message, and not to be written to.
    """

    embedding: Tensor
    position_ids: Tensor | None
    seconds_per_grid: float | None = None
    cut_s: float | None = None  # where a longer sound was cut off
    message: bytes | None = None  # as it goes onto the wire

    def copy(self) -> Embedded:
        """For a caller who may write into it."""
        ids = None if self.position_ids is None else self.position_ids.clone()
        return self._replace(embedding=self.embedding.clone(), position_ids=ids, message=None)

    @property
    def nbytes(self) -> int:
        return self.embedding.nbytes + (self.position_ids.nbytes if self.position_ids is not None else 0)


class CountedCache(Generic[Key, Value]):
    """Values by key, at most `budget_bytes` of them, with counters and a version. For one event loop: no locks."""

    def __init__(self, budget_bytes: int, *, largest_share: float = 1.0) -> None:
        """largest_share: of the budget, for one value; a larger one is not kept, and so sweeps nothing out."""
        self._largest_bytes = int(budget_bytes * largest_share)
        self._values: ByteLRU[Key, Value] = ByteLRU(budget_bytes)
        self._hits = self._misses = 0
        self.version = time.time_ns()  # of the set of keys; no process's first is another's last

    def __contains__(self, key: Key) -> bool:
        """Counts neither as a hit nor as a miss."""
        return key in self._values

    def __iter__(self) -> Iterator[Key]:
        return iter(self._values)

    def get(self, key: Key, *, is_first_try: bool = False) -> Value | None:
        """A miss at a first try is not counted: there will be another."""
        value = self._values.get(key)
        self._hits += value is not None
        self._misses += value is None and not is_first_try
        return value

    def has_room_for(self, nbytes: int) -> bool:
        """Whether a value of `nbytes` would be kept."""
        return 0 < nbytes <= self._largest_bytes

    def put(self, key: Key, value: Value) -> None:
        if self.has_room_for(value.nbytes):
            self._values[key] = value
            self.version += 1

    def stats(self) -> CacheStats:
        return self._values.stats(self._hits, self._misses)
