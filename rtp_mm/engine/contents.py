"""What an item's bytes are, and data URLs recognised by their text: hashing that takes a tenth of decoding it."""

from __future__ import annotations

from typing import NamedTuple

from blake3 import blake3
from cachetools import LRUCache

from rtp_mm.media.sniff import sniff
from rtp_mm.media.urls import scheme_of
from rtp_mm.types import Blob, MMUrlType, MultimodalInput

URLS_KEPT = 65536  # some 200 bytes each
LONGEST_URL = 4 << 20  # characters; hashed on the event loop in a millisecond


class Content(NamedTuple):
    """The same content, the same answer (for the same options)."""

    content_hash: bytes
    mm_type: MMUrlType  # told from the bytes where the request does not say

    @classmethod
    def of(cls, blob: Blob, asked: MMUrlType) -> Content:
        if asked is MMUrlType.DEFAULT and isinstance(blob.data, bytes):
            return cls(blob.content_hash, sniff(blob.data) or asked)
        return cls(blob.content_hash, asked)


class SeenDataUrls:
    """The contents of data URLs that were decoded before, least recently used out first."""

    def __init__(self) -> None:
        self._contents: LRUCache[bytes, Content] = LRUCache(URLS_KEPT)

    def get(self, item: MultimodalInput) -> Content | None:
        """`None` for what was not seen, or is no data URL."""
        content: Content | None = self._contents.get(_key(item)) if is_data_url(item) else None
        return content

    def put(self, item: MultimodalInput, content: Content) -> None:
        if is_data_url(item) and len(item.url) <= LONGEST_URL:
            self._contents[_key(item)] = content


def is_data_url(item: MultimodalInput) -> bool:
    return item.mm_type is not MMUrlType.TENSOR and scheme_of(item.url) == "data"


def _key(item: MultimodalInput) -> bytes:
    """Empty, which none is kept under, for what is too long."""
    if len(item.url) > LONGEST_URL:
        return b""
    return bytes([item.mm_type]) + blake3(item.url.encode(errors="surrogatepass")).digest()
