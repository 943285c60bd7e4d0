"""What a URL's text alone tells: its scheme, and that it is too long."""

from __future__ import annotations

import re

MAX_URL_CHARACTERS = 16384  # twice what web servers take; libraries below keep those that they parsed last
_SCHEME = re.compile(r"(?:data|file)(?=:)|[a-z][a-z0-9+.-]{0,63}(?=://)", re.IGNORECASE)  # none registered is longer


def scheme_of(url: str) -> str:
    """Lower-case, empty for a plain path: only `data:`, `file:` and what has `://` counts as a scheme."""
    match = _SCHEME.match(url)
    return match[0].lower() if match else ""
