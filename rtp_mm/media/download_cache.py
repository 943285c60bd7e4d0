"""Downloads that are still good, by URL: least recently used out first, within a budget of bytes.

The URL alone is the key. Who may ask for it is decided before, per caller; the request that the source saw had nothing
of the caller in it. Local files are not kept: the system's page cache holds their bytes already, and a file's time
stamps do not tell every change. `data:` URLs are their own bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rtp_mm.lru import ByteLRU
from rtp_mm.media.freshness import ResponseHead, lifetime_s
from rtp_mm.types import Blob, CacheStats, text_nbytes

ENTRY_BYTES = 2048  # of an entry besides its file and its URL: headers, hash, Python objects; roughly


@dataclass(frozen=True, slots=True)
class Stored:
    """A download and the head of the response that brought it; from `fresh_until` on (seconds of the cache's clock) its
    source is asked whether it has changed.
    """

    blob: Blob
    head: ResponseHead
    fresh_until: float
    nbytes: int


class DownloadCache:
    """For one event loop: no locks. A download larger than the whole budget is not kept.

    A hit is a download whose bytes did not come again, its source asked or not.
    """

    def __init__(self, budget_bytes: int, ttl_s: float, clock: Callable[[], float]) -> None:
        """`ttl_s`: how long a download is good whose source does not say."""
        self._entries: ByteLRU[str, Stored] = ByteLRU(budget_bytes)
        self._ttl_s = ttl_s
        self._clock = clock
        self._hits = self._misses = 0

    def fresh(self, url: str) -> Blob | None:
        """The download, if its source need not be asked."""
        stored = self._entries.get(url)
        if stored is None or self._clock() >= stored.fresh_until:
            return None
        self._hits += 1
        return stored.blob

    def stale(self, url: str) -> Stored | None:
        """The download, if its source can tell whether it has changed."""
        stored = self._entries.get(url)
        return stored if stored is not None and stored.head.conditions else None

    def confirm(self, url: str, stored: Stored, heads: Sequence[ResponseHead], asked_at: float) -> Blob:
        """The source says that it has not changed."""
        self._hits += 1
        self._keep(url, stored.blob, heads, asked_at)
        return stored.blob

    def put(self, url: str, blob: Blob, heads: Sequence[ResponseHead], asked_at: float) -> None:
        """A download that came whole, by way of these answers, asked for at `asked_at` on the cache's clock."""
        self._misses += 1
        self._keep(url, blob, heads, asked_at)

    def discard(self, url: str) -> None:
        self._entries.pop(url, None)

    def stats(self) -> CacheStats:
        return self._entries.stats(self._hits, self._misses)

    def _keep(self, url: str, blob: Blob, heads: Sequence[ResponseHead], asked_at: float) -> None:
        self.discard(url)
        lifetime = lifetime_s(heads, self._ttl_s)
        if lifetime is None or (lifetime == 0 and not heads[-1].conditions):
            return
        stored = Stored(
            blob, heads[-1], asked_at + lifetime, blob.nbytes + text_nbytes(url) + heads[-1].nbytes + ENTRY_BYTES
        )
        if stored.nbytes <= self._entries.maxsize:
            self._entries[url] = stored
