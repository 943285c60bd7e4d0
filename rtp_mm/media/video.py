"""Videos: chosen frames of a file, with FFmpeg (PyAV).

Frame i is the i-th that a decoder gives which decodes the whole file; what the container's edit list hides is none.
Pixels are libswscale's conversion to RGB as PyAV asks for it (bilinear chroma where the frame's layout has no direct
conversion; the frame's own matrix and range). They are turned as the container's display matrix says, as decord and
torchcodec (0.11) do; the sample aspect ratio is ignored.
"""

from __future__ import annotations

import importlib.metadata
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.clip import Clip, ClipHeader, ClipLimits, Frame
from rtp_mm.media.container import opened
from rtp_mm.media.limits import check_pixels
from rtp_mm.media.nal import NalReader

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "flv", "mpegts", "mpeg", "ogg", "asf")
CODECS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg4", "mjpeg", "mpeg1video", "mpeg2video", "theora",
          "h263", "msmpeg4v3", "wmv2", "vc1", "prores", "ffv1", "rawvideo", "png")  # fmt: skip
_TIMED = ("mov", "matroska")  # demuxers whose packets all tell when they are shown
MAX_PACKETS = 1 << 21  # 19 hours at 30 frames a second; sorting their times takes 144 MiB


def decoder() -> str:
    """The library that decides the pixels, with its version: a part of every cache key."""
    try:
        return f"av {importlib.metadata.version('av')}"
    except importlib.metadata.PackageNotFoundError:
        return "no av"


@contextmanager
def open_video(data: bytes, limits: ClipLimits) -> Iterator[Clip]:
    """Raises `WrongFormatError` for what is broken, over a limit or has no video, `NotSupportedError` for other
    containers and codecs, or without PyAV.
    """
    with _stream_of(data) as (container, stream):
        yield _Video(container, stream, limits)


@contextmanager
def open_video_header(data: bytes, limits: ClipLimits) -> Iterator[tuple[ClipHeader, Clip | None]]:
    """The same for who decodes it elsewhere: at most one frame is decoded. No clip where only decoding all of it would
    tell what it holds.
    """
    with _stream_of(data) as (container, stream):
        try:
            clip = _Video(container, stream, limits, may_decode_all=False)
        except _NotIndexedError:
            yield _header(stream, 0, is_indexed=False), None
        else:
            yield _header(stream, clip.turn, is_indexed=not clip.is_trimmed), clip


@contextmanager
def _stream_of(data: bytes) -> Iterator[tuple[InputContainer, VideoStream]]:
    with opened(data, CONTAINERS, "video") as container:
        yield container, _video_stream(container)


def _video_stream(container: InputContainer) -> VideoStream:
    from av.stream import Disposition

    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise WrongFormatError(f"no video in this file, it holds {kinds}")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    assert stream is not None
    if stream.codec_context is None or stream.codec_context.name not in CODECS:
        name = "unknown" if stream.codec_context is None else stream.codec_context.name
        raise NotSupportedError(f"videos in codec {name} are not decoded")
    return stream


def _header(stream: VideoStream, turn: int, *, is_indexed: bool) -> ClipHeader:
    context = stream.codec_context
    return ClipHeader(
        codec=context.codec.canonical_name,
        pixel_format=context.pix_fmt or "",
        matrix=int(context.colorspace),
        width=context.width,
        height=context.height,
        turn=turn,
        is_indexed=is_indexed,
    )


def _quarter_turns(frame: VideoFrame) -> int:
    return round(frame.rotation / 90) % 4


class _Run(NamedTuple):
    """Packets to decode without a break: from an entry (by its number) to the place of the last, for these frames."""

    entry: int
    last: int
    times: list[int]


class _NotIndexedError(Exception):
    """Its packets do not tell what a decoder shows."""


class _Video:
    """Reads all packets once, without decoding: when each is shown, and where decoding may start. Then only the
    packets are decoded that the chosen frames need: from the last entry before a frame up to it, without those that no
    other frame refers to. An edit list may hide packets before the first frame that is shown, and after the last:
    these are decoded where others refer to them.

    Where packets do not tell what is shown and when (AVI with reordered frames, broken starts, a cut in the middle),
    the whole file is decoded, once to count and once to read.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, limits: ClipLimits, *, may_decode_all: bool = True
    ) -> None:
        """Raises `_NotIndexedError` where all would have to be decoded, and may not."""
        self._container, self._stream, self._limits = container, stream, limits
        self._context = stream.codec_context
        self._context.thread_type = "AUTO"
        self._nal = NalReader.of(self._context.name, self._context.extradata)
        self._start = 0  # no packet is earlier
        self._times = array("q")  # of each packet, in the order of decoding
        self._entries: list[int] = []  # places of the packets where decoding may start
        self._seek_times: list[int | None] = []  # of each entry, by the demuxer's index
        self.decoded = 0
        check_pixels(self._context.width, self._context.height, limits.max_pixels)
        for duration, unit in ((stream.duration, stream.time_base), (container.duration, Fraction(1, 1_000_000))):
            if duration is not None and unit is not None:
                limits.check_seconds(float(duration * unit))
        self.turn = 0  # by so many times 90 degrees, counter-clockwise
        self.is_trimmed = False  # some packets are never shown
        self._is_indexed = self._index()
        if not (self._is_indexed or may_decode_all):
            raise _NotIndexedError
        if self._is_indexed:
            self._find_turn()
        else:
            self._shown = self._count()
        self.frames = len(self._shown)
        if not self.frames:
            raise WrongFormatError("a video without frames")
        self.fps = self._rate()
        limits.check_seconds(float(self.frames / self.fps))
        size = (self._context.width, self._context.height)
        self.width, self.height = size[::-1] if self.turn % 2 else size

    # --- what there is

    def _index(self) -> bool:
        """Fills the index; False where it does not tell what a decoder shows."""
        shown = array("q")
        is_reliable = self._container.format.name.split(",")[0] in _TIMED or not self._context.has_b_frames
        for packet in self._packets():
            if not self._times:
                self._start = min(time for time in (0, packet.pts, packet.dts) if time is not None)
            if packet.is_keyframe and (self._nal is None or self._nal.is_entry(memoryview(packet))):
                self._entries.append(len(self._times))
                self._seek_times.append(packet.pts if packet.dts is None else packet.dts)
            is_reliable = is_reliable and packet.pts is not None
            self._times.append(packet.pts or 0)
            if not packet.is_discard:
                shown.append(packet.pts or 0)
            if len(self._times) > MAX_PACKETS:
                raise WrongFormatError(f"a video of more than {MAX_PACKETS} frames")
        self.is_trimmed = len(shown) < len(self._times)
        self._shown = sorted(shown)
        times = np.sort(np.array(self._times, np.int64))
        if not shown or self._entries[:1] != [0] or (times[1:] == times[:-1]).any():
            return False
        first, last = self._shown[0], self._shown[-1]
        is_cut = np.count_nonzero((first <= times) & (times <= last)) > len(shown)
        return is_reliable and not is_cut and self._times[0] <= first and self._context.field_order in (0, 1)

    def _find_turn(self) -> None:
        """By the first packet: a container's display matrix comes with its frame, even where that is hidden."""
        self._rewind()
        for packet in islice(self._packets(), 1):
            for frame in self._decode(iter([type(packet)(bytes(packet))])):  # a copy is not marked as hidden
                self.turn = _quarter_turns(frame)

    def _count(self) -> list[int]:
        """When each frame is shown, of all that a decoder gives."""
        self._rewind()
        times = []
        for frame in self._decode(self._packets()):
            times.append(frame.pts or 0)
            self.turn = _quarter_turns(frame)
        return times

    def _rate(self) -> Fraction:
        """The container's average; without one, that of the frames' times; of a single frame, 1."""
        if self._stream.average_rate:
            return Fraction(self._stream.average_rate)
        span = self._shown[-1] - self._shown[0]
        unit = self._stream.time_base
        return Fraction(self.frames - 1) / (span * unit) if span > 0 and unit else Fraction(1)

    # --- reading

    def read(self, indices: Sequence[int]) -> Iterator[Frame]:
        return self._read_indexed(indices) if self._is_indexed else self._read_all(indices)

    def _read_all(self, indices: Sequence[int]) -> Iterator[Frame]:
        wanted = set(indices)
        self._rewind()
        for index, frame in enumerate(self._decode(self._packets())):
            if index in wanted:
                yield self._pixels(frame)
            if index >= indices[-1]:
                return

    def _read_indexed(self, indices: Sequence[int]) -> Iterator[Frame]:
        places = {time: place for place, time in enumerate(self._times)}
        for entry, last, times in self._runs([self._shown[index] for index in indices], places):
            frames = self._decode(self._from(entry, last, places, set(times)))
            missing = iter(times)
            expected = next(missing, None)
            for frame in frames:
                if frame.pts == expected:
                    yield self._pixels(frame)
                    expected = next(missing, None)
            if expected is not None:
                raise WrongFormatError("broken video: a frame is missing")

    def _runs(self, times: Iterable[int], places: dict[int, int]) -> list[_Run]:
        """What to decode for frames at these times; from one entry on past others where that leaves nothing out."""
        runs: list[_Run] = []
        for time in times:
            place = places[time]
            entry = self._entry_for(place, time)
            if runs and self._entries[entry] <= runs[-1].last + 1:
                runs[-1].times.append(time)
                runs[-1] = runs[-1]._replace(last=max(place, runs[-1].last))
            else:
                runs.append(_Run(entry, place, [time]))
        return runs

    def _entry_for(self, place: int, time: int) -> int:
        """The last entry from which a decoder gives this frame: what is shown before an entry may need more."""
        entry = bisect_right(self._entries, place) - 1
        while self._times[self._entries[entry]] > time:
            entry -= 1
        return entry

    def _from(self, entry: int, last: int, places: dict[int, int], wanted: set[int]) -> Iterator[Packet[Any]]:
        """Packets from `entry` to `last`, without those that serve nothing."""
        first, is_under_way = self._entries[entry], False
        for packet in self._seek(entry, places):
            place = None if packet.pts is None else places.get(packet.pts)
            if place is None or place < first:
                if is_under_way:
                    yield packet  # is shown never, but others may refer to it
                continue
            is_under_way = True
            if packet.pts in wanted or self._nal is None or not self._nal.is_unreferenced(memoryview(packet)):
                yield packet
            if place >= last:
                return

    def _seek(self, entry: int, places: dict[int, int]) -> Iterator[Packet[Any]]:
        """Packets from `entry` or from before it. A container that seeks past it is read from its start."""
        if entry and (time := self._seek_times[entry]) is not None:
            self._container.seek(time, stream=self._stream)
            packets = self._packets()
            first = next(packets, None)
            if first and first.pts is not None and places.get(first.pts, len(places)) <= self._entries[entry]:
                yield first
                yield from packets
                return
        self._rewind()
        yield from self._packets()

    def _rewind(self) -> None:
        self._container.seek(self._start, stream=self._stream)

    def _packets(self) -> Iterator[Packet[Any]]:
        """Of the stream, but for the empty one that ends it."""
        return (packet for packet in self._container.demux(self._stream) if packet.size)

    def _decode(self, packets: Iterator[Packet[Any]]) -> Iterator[VideoFrame]:
        """All frames of these packets, in order of presentation."""
        for packet in packets:
            self.decoded += 1
            yield from self._context.decode(packet)
        yield from self._context.decode(None)

    def _pixels(self, frame: VideoFrame) -> Frame:
        check_pixels(frame.width, frame.height, self._limits.max_pixels)
        pixels: Any = frame.to_ndarray(format="rgb24")
        return np.ascontiguousarray(np.rot90(pixels, self.turn)) if self.turn else pixels
