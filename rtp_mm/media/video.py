"""Videos: chosen frames of a file, with FFmpeg (PyAV).

Frame i is the i-th that a decoder gives which decodes the whole file; what the container's edit list hides is none.
Pixels are libswscale's conversion to RGB as PyAV asks for it (bilinear chroma where the frame's layout has no direct
conversion; the frame's own matrix and range). They are turned as the container's display matrix says, as decord and
torchcodec (0.11) do, and mirrored, as FFmpeg does and these do not; the sample aspect ratio is ignored.
"""

from __future__ import annotations

import importlib.metadata
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.clip import MIRRORED, Clip, ClipHeader, ClipLimits, Frame
from rtp_mm.media.container import opened, packets
from rtp_mm.media.decode_threads import DECODE_THREADS
from rtp_mm.media.limits import check_pixels
from rtp_mm.media.nal import NalReader
from rtp_mm.media.packet_index import PacketIndex, Run

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream

CONTAINERS = ("mov", "mp4", "matroska", "webm", "avi", "flv", "mpegts", "mpeg", "ogg", "asf")
CODECS = ("h264", "hevc", "vp8", "vp9", "libdav1d", "av1", "mpeg4", "mjpeg", "mpeg1video", "mpeg2video", "theora",
          "h263", "msmpeg4", "wmv2", "vc1", "prores", "ffv1", "rawvideo", "png")  # fmt: skip
_STREAMED = ("flv", "mpegts", "mpeg")  # demuxers that begin at any byte, and may find no time in a file of one frame
_TIMED = ("mov", "matroska")  # demuxers whose packets all tell when they are shown


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


def _copied(packet: Packet[Any]) -> Packet[Any]:
    """In memory of FFmpeg's. A packet on Python's bytes is freed with the GIL held, by whatever thread of a decoder's,
    and PyAV (18) holds the GIL while it closes a decoder and so waits for its threads: dav1d's would never end.
    """
    copy = type(packet)(packet.size)
    copy.update(bytes(packet))
    return copy


def _turn(frame: VideoFrame) -> int:
    """As `ClipHeader.turn`. 0 without a display matrix, and with a singular one, of which FFmpeg's angle is NaN."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0
    degrees = frame.rotation
    quarters = round(degrees / 90) % 4 if -360 <= degrees <= 360 else 0
    a, b, _, c, d = struct.unpack_from("5i", matrix)
    return quarters if a * d >= b * c else quarters + MIRRORED


class _NotIndexedError(Exception):
    """Its packets do not tell what a decoder shows."""


class _Video:
    """Reads all packets once, without decoding. Then only the packets are decoded that the chosen frames need: from the
    last entry before a frame up to it, without those that no other frame refers to. An edit list may hide packets
    before the first frame that is shown, and after the last: these are decoded where others refer to them.

    Where packets do not tell what is shown and when (AVI with reordered frames or H.263, program streams, broken
    starts, a cut in the middle), the whole file is decoded, once to count and once to read.
    """

    def __init__(
        self, container: InputContainer, stream: VideoStream, limits: ClipLimits, *, may_decode_all: bool = True
    ) -> None:
        """Raises `_NotIndexedError` where all would have to be decoded, and may not."""
        self._container, self._stream, self._limits = container, stream, limits
        self._context = stream.codec_context
        # On a damaged file frame threads of the VP9 decoder (FFmpeg 8) were seen to crash, now and then.
        self._context.thread_type = "SLICE" if self._context.name == "vp9" else "AUTO"
        self._context.thread_count = DECODE_THREADS.count if may_decode_all else 1  # which of one frame is enough
        self.decoded = 0
        check_pixels(self._context.width, self._context.height, limits.max_pixels)
        for duration, unit in ((stream.duration, stream.time_base), (container.duration, Fraction(1, 1_000_000))):
            if duration is not None and unit is not None:
                limits.check_seconds(float(duration * unit))
        self.turn = 0  # as `ClipHeader.turn`
        try:
            nal = NalReader.of(self._context.name, self._context.extradata)
            self._index = PacketIndex(self._packets(), self._context.name, nal)
        except MemoryError:  # nothing is decoded yet: it is the size that a packet says it has
            raise WrongFormatError("broken video: a packet that is larger than memory") from None
        self.is_trimmed = self._index.is_trimmed
        is_told = self._index.is_exact and self._is_entered() and self._is_timed()
        self._is_indexed = is_told and self._context.field_order in (0, 1)
        if not (self._is_indexed or may_decode_all):
            raise _NotIndexedError
        if self._is_indexed:
            self._find_turn()
            self._shown = self._index.shown
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

    def _is_entered(self) -> bool:
        """Whether decoding may start at the packets that say so. FFmpeg's parser takes each of H.263's in an AVI for
        such. In a program stream it gives a frame the time of another, where reading starts in the midst of one.
        """
        container = self._container.format.name
        return container != "mpeg" and (self._context.name, container) != ("h263", "avi")

    def _is_timed(self) -> bool:
        """Whether the times of packets are those of frames, and not of decoding. A packet of DivX may hold two frames,
        before one that stands for the second.
        """
        container = self._container.format.name.split(",")[0]
        is_packed = container == "matroska" and self._context.name == "mpeg4"
        return not self._context.has_b_frames or (container in _TIMED and not is_packed)

    def _find_turn(self) -> None:
        """By the first packet: a container's display matrix comes with its frame, even where that is hidden."""
        self._rewind()
        for packet in islice(self._packets(), 1):
            for frame in self._decode(iter([_copied(packet)])):  # a copy is not marked as hidden
                self.turn = _turn(frame)

    def _count(self) -> list[int]:
        """When each frame is shown, of all that a decoder gives."""
        self._rewind()
        times = []
        for frame in self._decode(self._packets()):
            times.append(frame.pts or 0)
            self.turn = _turn(frame)
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
        for run in self._index.runs(self._shown[index] for index in indices):
            missing = iter(run.times)
            expected = next(missing, None)
            for frame in self._decode(self._index.needed(run, self._packets_from(run))):
                if frame.pts == expected:
                    yield self._pixels(frame)
                    expected = next(missing, None)
            if expected is not None:
                raise WrongFormatError("broken video: a frame is missing")

    def _packets_from(self, run: Run) -> Iterator[Packet[Any]]:
        """From a run's first or from before it. A container that seeks past it is read from its start."""
        if run.first and run.seek_time is not None and self._seek(run.seek_time):
            packets = self._packets()
            found = next(packets, None)
            if found and self._index.is_before(found, run):
                return chain([found], packets)
        self._rewind()
        return self._packets()

    def _rewind(self) -> None:
        if self._container.format.name in _STREAMED:
            self._container.seek(0, unsupported_byte_offset=True)
        elif not self._seek(self._index.start):
            raise WrongFormatError("broken video: no key frame to decode from")

    def _seek(self, time: int) -> bool:
        """Whether FFmpeg finds a place to seek to."""
        try:
            self._container.seek(time, stream=self._stream)
        except PermissionError:  # -1, which is all that it says
            return False
        return True

    def _packets(self) -> Iterator[Packet[Any]]:
        """Of the stream, but for the empty one that ends it."""
        return (packet for packet in packets(self._container, self._stream) if packet.size)

    def _decode(self, packets: Iterator[Packet[Any]]) -> Iterator[VideoFrame]:
        """All frames of these packets, in order of presentation."""
        for packet in packets:
            self.decoded += 1
            yield from self._context.decode(packet)
        yield from self._context.decode(None)

    def _pixels(self, frame: VideoFrame) -> Frame:
        check_pixels(frame.width, frame.height, self._limits.max_pixels)
        pixels: Any = frame.to_ndarray(format="rgb24", threads=1)  # else as many as there are cores, anew for each
        upright = pixels[::-1] if self.turn >= MIRRORED else pixels
        return np.ascontiguousarray(np.rot90(upright, self.turn)) if self.turn else pixels
