"""What a `Fetcher` with these options gives to a caller from elsewhere."""

from __future__ import annotations

from typing import Any

import pytest

from rtp_mm.config import load_settings
from rtp_mm.errors import MMError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.types import Blob, Caller, MMUrlType, MultimodalInput

REMOTE = Caller(peer="ipv4:192.0.2.1:4711", is_local=False)
LOOPBACK: dict[str, Any] = {"mm_allow_private_network": True, "mm_fetch_retries": 0}


async def fetch(url: str, mm_type: MMUrlType = MMUrlType.IMAGE, tensor: Any = None, **options: Any) -> Blob:
    """By a fetcher of its own; `options` are settings."""
    async with Fetcher(load_settings(**options)) as fetcher:
        return await fetcher.fetch(MultimodalInput(url, mm_type, tensor=tensor), REMOTE)


async def refusal(url: str, mm_type: MMUrlType = MMUrlType.IMAGE, **options: Any) -> MMError:
    """The error that fetching raises."""
    with pytest.raises(MMError) as caught:
        await fetch(url, mm_type, **options)
    assert caught.value.__cause__ is None
    return caught.value
