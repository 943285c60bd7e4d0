"""`data:` URLs (RFC 2397), read strictly: what is not exactly base64 or percent-encoding is refused, not guessed at."""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

from pybase64 import b64decode

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.limits import START_BYTES, SizeLimit

LONGEST_HEAD = 1024  # characters up to the comma: a type and a few parameters
_PIECE = 1 << 14  # characters: of each escape an object is made, 80 times as large, and other threads wait
_BROKEN_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


class DataUrl(NamedTuple):
    """The parts of a `data:` URL; `payload` is still encoded."""

    media_type: str
    is_base64: bool
    payload: str

    @classmethod
    def parse(cls, url: str) -> DataUrl:
        """Splits without decoding. Raises `WrongFormatError` where no comma ends its head."""
        comma = url.find(",", 0, LONGEST_HEAD)
        if comma < 0:
            raise WrongFormatError(f"a data: URL needs a comma before its data, within {LONGEST_HEAD} characters")
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
        data = _unquoted(self.payload) if self.is_escaped else self.payload
        if not self.is_base64:
            return data.encode() if isinstance(data, str) else data
        try:
            return b64decode(data, validate=True)
        except ValueError:
            reason = "a character that is none of its 64, or padding (=) that is missing or too much"
            raise WrongFormatError(f"not valid base64: {reason}") from None


def _unquoted(text: str) -> bytes:
    """Raises `WrongFormatError` for a broken escape."""
    data = bytearray()
    start = 0
    while start < len(text):
        end = start + _PIECE
        if (cut := text.find("%", end - 2, end)) > start:
            end = cut  # not within an escape
        piece = text[start:end]
        if _BROKEN_ESCAPE.search(piece):
            raise WrongFormatError("a % in a data: URL must be followed by two hexadecimal digits")
        data += unquote_to_bytes(piece)
        start = end
    return bytes(data)
