"""Answers that are kept, and the ways to find one: by what an item's bytes are, or by the text of its data URL."""

from __future__ import annotations

from rtp_mm.engine.caches import CountedCache, Embedded, EmbeddingKey, PatchKey
from rtp_mm.engine.contents import Content, SeenDataUrls
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.types import Blob, CacheStats, CacheStatus, MultimodalInput, PreprocessOptions


class Answers:
    """One model's, within a budget of bytes. For one event loop: no locks."""

    def __init__(self, model: MultimodalMixin, budget_bytes: int) -> None:
        mm_part = model.mm_part
        on_device = mm_part.device_preprocessor
        self._preprocess_key = (
            *getattr(mm_part.preprocessor, "cache_key", ()),
            *(on_device.cache_key if on_device is not None else ("cpu",)),
        )
        self._tower_key = (
            model.weights_fingerprint,
            model.config.data_type,
            str(mm_part._device),
            *map(str, mm_part.answer_key),
        )
        self._embeddings = CountedCache[EmbeddingKey, Embedded](budget_bytes)
        self._seen = SeenDataUrls()

    def recall(self, item: MultimodalInput, blob: Blob | None, options: PreprocessOptions) -> Embedded | None:
        """The answer to an item whose bytes are at hand, or to a data URL seen before, which need not be decoded.

        What is not there does not count as missed: `get` will be asked again, with the bytes.
        """
        content = self._seen.get(item) if blob is None else Content.of(blob, item.mm_type)
        return None if content is None else self._embeddings.get(self._key(content, options), is_first_try=True)

    def key(self, item: MultimodalInput, blob: Blob, options: PreprocessOptions) -> EmbeddingKey:
        """Under which the answer to an item with these bytes is kept."""
        content = Content.of(blob, item.mm_type)
        self._seen.put(item, content)
        return self._key(content, options)

    def get(self, key: EmbeddingKey) -> Embedded | None:
        return self._embeddings.get(key)

    def put(self, key: EmbeddingKey, embedded: Embedded) -> None:
        self._embeddings.put(key, embedded)

    def stats(self) -> CacheStats:
        return self._embeddings.stats()

    def status(self, *, with_keys: bool) -> CacheStatus:
        """A key is the first 8 bytes of the content hash, signed."""
        hashes = (key.patches.content_hash for key in self._embeddings) if with_keys else ()
        keys = {int.from_bytes(content_hash[:8], "little", signed=True) for content_hash in hashes}
        stats = self.stats()
        free = stats.budget_bytes - stats.used_bytes
        return CacheStatus(free, stats.budget_bytes, self._embeddings.version, tuple(keys))

    def _key(self, content: Content, options: PreprocessOptions) -> EmbeddingKey:
        return EmbeddingKey(PatchKey(*content, options, self._preprocess_key), self._tower_key)
