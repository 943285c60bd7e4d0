"""URLs as they may stand in logs and errors: short, on one line, without secrets."""

from __future__ import annotations

import re

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.data_url import LONGEST_HEAD, DataUrl
from rtp_mm.media.urls import MAX_URL_CHARACTERS, scheme_of

MAX_CHARACTERS = 120
MEASURED_CHARACTERS = 1 << 18  # of a data URL

# scheme, [userinfo@], host, port, path, and the rest, which is never shown. It matches whatever follows "scheme://",
# so that nothing malformed slips through with its credentials.
_URL = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?:[^/?#]*@)?(?P<host>\[[^\]/?#@]*\]|[^/?#@:\[]*)(?P<port>(?::\d*)?)"
    r"(?P<path>(?:/[^?#]*)?)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)


def redact(url: str) -> str:
    """The URL without credentials, query, fragment or data, control characters escaped, at most 120 characters.

    A data URL is told by type and size: `data:image/jpeg, 70568 bytes base64`; any other that is too long by its size.
    """
    url = url.strip()
    scheme = scheme_of(url)
    if scheme == "data":
        text = _describe_data(url)
    elif len(url) > MAX_URL_CHARACTERS:  # nobody fetches it, and its parts would take long to find
        text = f"{scheme or 'path'}, {len(url)} characters"
    elif match := _URL.fullmatch(url):
        text = "{scheme}://{host}{port}{path}".format(**match.groupdict()) + ("?..." if match["rest"] else "")
    else:
        text = _after_userinfo(url.partition("?")[0]) + ("?..." if "?" in url else "")
    return _shorten(_escape(_shorten(text)))  # shortened first too: a hostile data URL's type may have megabytes


def _after_userinfo(text: str) -> str:
    """A path, or what looks like a URL without being one (`//user:password@host`), which shows no more than a URL."""
    return text if "@" not in text else "..." + text[text.rindex("@") :]


def _describe_data(url: str) -> str:
    """Of a long one by its head and length alone, as if nothing were escaped."""
    is_long = len(url) > MEASURED_CHARACTERS
    try:
        data = DataUrl.parse(url[:LONGEST_HEAD] if is_long else url)
    except WrongFormatError:
        return f"data: URL without a comma, {len(url)} characters"
    nbytes = data.nbytes
    if is_long:
        characters = len(url) - LONGEST_HEAD + len(data.payload)
        nbytes = characters * 3 // 4 - url[-2:].count("=") if data.is_base64 else characters
    return f"data:{data.media_type}, {nbytes} bytes{' base64' if data.is_base64 else ''}"


def _escape(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _shorten(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    head = (MAX_CHARACTERS - 3) // 2
    return f"{text[:head]}...{text[head + 3 - MAX_CHARACTERS :]}"
