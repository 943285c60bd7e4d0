"""`data:` URLs (RFC 2397), read strictly: what is not exactly base64 or percent-encoding is refused, not guessed at."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote, unquote_to_bytes

from pybase64 import b64decode

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.limits import START_BYTES, SizeLimit

_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class DataUrl(NamedTuple):
    """The parts of a `data:` URL; `payload` is still encoded."""

    media_type: str
    is_base64: bool
    payload: str

    @classmethod
    def parse(cls, url: str) -> DataUrl:
        """Splits without decoding. Raises `WrongFormatError` where there is no comma."""
        comma = url.find(",")
        if comma < 0:
            raise WrongFormatError("a data: URL needs a comma before its data")
        media_type, *parameters = url[len("data:") : comma].split(";")
        is_base64 = bool(parameters) and parameters[-1].strip().lower() == "base64"
        return cls(media_type.strip().lower() or "text/plain", is_base64, url[comma + 1 :])

    @property
    def is_escaped(self) -> bool:
        """Whether there is a % at all, which is told ten times as fast as how many there are."""
        return "%" in self.payload

    @property
    def nbytes(self) -> int:
        """Size of the decoded data, known before decoding; exact for a well-formed URL."""
        characters = len(self.payload) - (2 * self.payload.count("%") if self.is_escaped else 0)
        if not self.is_base64:
            return characters
        tail = self.payload[-6:].replace("%3D", "=").replace("%3d", "=")
        return characters * 3 // 4 - (len(tail) - len(tail.rstrip("=")))

    def _start(self) -> bytes:
        """The first bytes of the data; none where it begins with what cannot be decoded."""
        if not self.is_base64:
            return unquote_to_bytes(self.payload[: 3 * START_BYTES])[:START_BYTES]
        try:
            return b64decode(self.payload[: START_BYTES // 3 * 4], validate=True)
        except ValueError:
            return b""

    def decode(self, limit: SizeLimit) -> bytes:
        """The data. Raises `WrongFormatError` for what is malformed or over the limit, the latter before decoding."""
        if limit.clip is not None:
            limit = limit.told(self._start())
        limit.check(self.nbytes)
        if not self.payload.isascii():
            raise WrongFormatError("a data: URL holds ASCII only")
        if self.is_escaped and _BROKEN_ESCAPE.search(self.payload):
            raise WrongFormatError("a % in a data: URL must be followed by two hexadecimal digits")
        if not self.is_base64:
            return unquote_to_bytes(self.payload)
        try:
            return b64decode(unquote(self.payload), validate=True)
        except ValueError:
            reason = "a character that is none of its 64, or padding (=) that is missing or too much"
            raise WrongFormatError(f"not valid base64: {reason}") from None
