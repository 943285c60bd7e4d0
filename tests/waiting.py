"""Waiting for what must happen soon."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(is_so: Callable[[], object]) -> None:
    """Comes back once it is so; fails the test instead of hanging it."""
    async with asyncio.timeout(30):
        while not is_so():
            await asyncio.sleep(0.002)
