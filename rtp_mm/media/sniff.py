"""What a file is, told from its first bytes. Signatures are those of the format specifications."""

from __future__ import annotations

import codecs
import re

from rtp_mm.types import MMUrlType

# ISO base media files (`....ftyp` and a brand) hold any of the three; the brand tells. Everything else is video.
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx"}
_IMAGE_BRANDS = HEIC_BRANDS | {b"avif", b"avis", b"mif1", b"msf1"}
_AUDIO_BRANDS = {b"M4A ", b"M4B ", b"M4P "}

_TEXT_BYTES = 64  # that are looked at
_HTML = re.compile(r"\s*<(!doctype )?html", re.IGNORECASE)

_SIGNATURES: tuple[tuple[MMUrlType, re.Pattern[bytes]], ...] = (
    (
        MMUrlType.IMAGE,
        re.compile(
            rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|BM|II[*+]\0|MM\0[*+]"
            rb"|\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51|\0\0\x01\0|P[1-6]\s|qoif",
            re.DOTALL,
        ),
    ),
    (
        MMUrlType.VIDEO,
        re.compile(
            rb"\x1a\x45\xdf\xa3|RIFF....AVI |FLV\x01|\0\0\x01[\xba\xb3]|\x47.{187}\x47.{187}\x47"
            rb"|.{4}\x47.{191}\x47.{191}\x47"  # a camcorder's transport stream: each packet behind its time
            rb"|\x30\x26\xb2\x75\x8e\x66\xcf\x11|....(?:moov|mdat|wide|free)|OggS.{24,60}theora",
            re.DOTALL,
        ),
    ),
    (
        MMUrlType.AUDIO,
        re.compile(
            rb"ID3|(?:RIFF|RF64)....WAVE|fLaC|OggS|\xff[\xe2-\xe7\xf2-\xf7\xfa-\xff]|\xff[\xf0\xf1\xf8\xf9]"
            rb"|FORM....AIF[FC]|\.snd|#!AMR|riff\x2e\x91\xcf\x11|caff\0\x01|wvpk",
            re.DOTALL,
        ),
    ),
)


def sniff(data: bytes) -> MMUrlType | None:
    """IMAGE, VIDEO or AUDIO, or `None` for bytes that no known container begins with (TGA has no signature)."""
    if data[4:8] == b"ftyp":
        brand = data[8:12]
        if brand in _IMAGE_BRANDS:
            return MMUrlType.IMAGE
        return MMUrlType.AUDIO if brand in _AUDIO_BRANDS else MMUrlType.VIDEO
    return next((mm_type for mm_type, signature in _SIGNATURES if signature.match(data)), None)


def kind_of_text(data: bytes) -> str | None:
    """For an error to name: "HTML", as of a page that asks to log in where a picture was promised, "text", or `None`
    for other bytes.
    """
    try:
        start = codecs.getincrementaldecoder("utf-8")().decode(data[:_TEXT_BYTES])  # which may end within a character
    except UnicodeDecodeError:
        return None
    if not start or not all(character.isprintable() or character.isspace() for character in start):
        return None
    return "HTML" if _HTML.match(start) else "text"
