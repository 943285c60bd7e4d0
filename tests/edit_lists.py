"""Edit lists of mp4: which part of a track is shown, when. Source: ISO/IEC 14496-12 (8.6.5, 8.6.6)."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

NOTHING = -1  # as an edit's start: nothing is shown for as long

Edit = tuple[float, float]  # seconds that it lasts, seconds of the media at which it starts


def with_edits(data: bytes, edits: Sequence[Edit]) -> bytes:
    """An mp4 of one track, its `moov` last, with this edit list in place of its own."""
    return b"".join(_box(name, _edited(body, edits) if name == b"moov" else body) for name, body in _boxes(data))


def media_start(data: bytes) -> float:
    """Seconds of the media at which an encoder's own edit starts: the delay of its reordered frames."""
    track = _inside(data, b"moov", b"trak")
    _, start = struct.unpack_from(">Ii", _inside(track, b"edts", b"elst"), 8)
    return float(start / _timescale(track))


def _edited(moov: bytes, edits: Sequence[Edit]) -> bytes:
    (seconds,) = struct.unpack_from(">I", _inside(moov, b"mvhd"), 12)
    track = _inside(moov, b"trak")
    entries = [
        (round(length * seconds), NOTHING if start == NOTHING else round(start * _timescale(track)), 1 << 16)
        for length, start in edits
    ]
    table = struct.pack(">II", 0, len(entries)) + b"".join(struct.pack(">IiI", *entry) for entry in entries)
    parts = [(name, body) for name, body in _boxes(track) if name != b"edts"]
    parts.insert(1, (b"edts", _box(b"elst", table)))  # behind the track's header
    edited = b"".join(_box(*part) for part in parts)
    return b"".join(_box(name, edited if name == b"trak" else body) for name, body in _boxes(moov))


def _timescale(track: bytes) -> int:
    (scale,) = struct.unpack_from(">I", _inside(track, b"mdia", b"mdhd"), 12)
    return int(scale)


def _inside(data: bytes, *names: bytes) -> bytes:
    for name in names:
        data = dict(_boxes(data))[name]
    return data


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 0
    while at < len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        yield name, data[at + 8 : at + size]
        at += size


def _box(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(body), name) + body
