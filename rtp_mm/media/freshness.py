"""How long a download stays good, as its source says: RFC 9111 for a cache with the view of a single client.

That is what a server of ours is to a source: whoever asks, its requests carry the same headers, none of them the
caller's. So what is `private` may be kept as well, for it is private to this server, and a `Vary` by any header is met
by every later request; only `Vary: *` never is. Nothing is ever served stale.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http import HTTPStatus
from typing import TYPE_CHECKING

from rtp_mm.types import text_nbytes

if TYPE_CHECKING:
    from multidict import MultiMapping

_READ = ("Age", "Cache-Control", "Date", "ETag", "Expires", "Last-Modified", "Vary")
_LONGEST_CACHE_CONTROL = 4096  # characters, in all its headers together: each directive takes its time
_MOST_DIGITS = 10  # of a number of seconds: three centuries

_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_DIRECTIVES = re.compile(rf'[ \t]*(?:({_TOKEN})(?:=({_TOKEN}|"(?:[^"\\]|\\.)*"))?[ \t]*)?(?:,|\Z)')


@dataclass(frozen=True, slots=True)
class ResponseHead:
    """A source's answer, without its body, and of its headers those that tell how long it is good."""

    url: str
    status: int
    headers: Mapping[str, str]

    @classmethod
    def of(cls, url: str, status: int, headers: MultiMapping[str]) -> ResponseHead:
        return cls(url, status, {name: ", ".join(headers.getall(name)) for name in _READ if name in headers})

    @property
    def nbytes(self) -> int:
        return text_nbytes(self.url) + sum(len(name) + text_nbytes(value) for name, value in self.headers.items())

    @property
    def conditions(self) -> dict[str, str]:
        """Headers of a request for the body only if it has changed since; none if the source cannot tell, or gave a
        value that no header may have.
        """
        pairs = {"If-None-Match": self.headers.get("ETag"), "If-Modified-Since": self.headers.get("Last-Modified")}
        return {name: value for name, value in pairs.items() if value and value.isprintable()}

    def confirmed_by(self, not_modified: ResponseHead) -> ResponseHead:
        """This head with what a 304 says anew."""
        headers = {name: value for name, value in self.headers.items() if name != "Age"}
        return ResponseHead(self.url, self.status, headers | dict(not_modified.headers))


def lifetime_s(heads: Sequence[ResponseHead], default_s: float) -> float | None:
    """Seconds from asking for which a download may be used unasked: the shortest among the answers that led to it,
    redirects first. `default_s` for an answer that does not say. 0: only after asking again. `None`: it is not kept.
    """
    lifetimes = [s for head in heads if (s := _lifetime_s(head.headers, default_s)) is not None]
    return min(lifetimes) if len(lifetimes) == len(heads) and heads[-1].status == HTTPStatus.OK else None


def _lifetime_s(headers: Mapping[str, str], default_s: float) -> float | None:
    directives = _parse(headers.get("Cache-Control", ""))
    if directives is None:  # nobody knows what was meant
        return None
    if "no-store" in directives or "*" in headers.get("Vary", ""):
        return None
    if "no-cache" in directives:
        return 0.0
    if "max-age" in directives:
        lifetime = _seconds(directives["max-age"])
    elif "Expires" in headers:
        lifetime = _seconds_between(headers.get("Date", ""), headers["Expires"])
    else:
        return default_s
    return max(0.0, lifetime - _age_s(headers))


def _parse(cache_control: str) -> dict[str, str] | None:
    """Directives in lower case, with their arguments; `None` for what is malformed. Of a repeated `max-age` the smaller
    one counts.
    """
    directives: dict[str, str] = {}
    if len(cache_control) > _LONGEST_CACHE_CONTROL:
        return None
    at = 0
    while at < len(cache_control):
        match = _DIRECTIVES.match(cache_control, at)
        if match is None:
            return None
        at = match.end()
        if match[1]:
            name, argument = match[1].lower(), (match[2] or "").strip('"')
            directives[name] = min(directives.get(name, argument), argument, key=_seconds)
    return directives


def _seconds(text: str) -> float:
    """0 for what is no number, which then counts as expired (RFC 9111, 4.2.1)."""
    return float(text[:_MOST_DIGITS]) if re.fullmatch(r"[0-9]+", text) else 0.0


def _age_s(headers: Mapping[str, str]) -> float:
    """What caches on the way have used up already."""
    return _seconds(headers.get("Age", "0").partition(",")[0].strip())


def _seconds_between(date: str, expires: str) -> float:
    """By the source's own clock, whatever ours says; 0 without one, or for what is no date."""
    try:
        return (parsedate_to_datetime(expires) - parsedate_to_datetime(date)).total_seconds()
    except (ValueError, TypeError, OverflowError):  # no date, or one with a zone and one without
        return 0.0
