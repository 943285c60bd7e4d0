"""Files that FFmpeg (PyAV) opens: from memory, by demuxers that open nothing else, with its errors in our terms."""

from __future__ import annotations

import errno
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rtp_mm.errors import NotSupportedError, WrongFormatError

if TYPE_CHECKING:
    from av.audio.stream import AudioStream
    from av.container import InputContainer
    from av.packet import Packet
    from av.video.stream import VideoStream

AnyStream = TypeVar("AnyStream", "AudioStream", "VideoStream")

MAX_STREAMS = 64
_TEXTS = re.compile(rb"LIST(.{4})INFO", re.DOTALL)  # of a RIFF file: its length


@contextmanager
def opened(data: bytes, demuxers: Sequence[str], kind: str) -> Iterator[InputContainer]:
    """The container in `data`, and what is raised while it is read as `MMError`: "broken `kind`".

    demuxers: by FFmpeg's names; never those that open other files or addresses (hls, dash, concat). Raises
    `NotSupportedError` without PyAV, `WrongFormatError` for what is broken, `MemoryError`.
    """
    try:
        import av
    except ImportError:
        raise NotSupportedError(f"{kind} needs PyAV on the server (pip install 'rtp_mm[media]')") from None

    if data.startswith((b"RIFF", b"RF64")):
        _check_texts(data, kind)
    is_open = False
    options = {"format_whitelist": ",".join(demuxers), "max_streams": str(MAX_STREAMS)}
    try:
        with av.open(io.BytesIO(data), "r", container_options=options, metadata_errors="replace") as container:
            is_open = True
            yield container
    except av.FFmpegError as error:
        if error.errno in (errno.ENOMEM, errno.EAGAIN) and is_open:  # EAGAIN: for the stack of a decoder's thread
            raise MemoryError from None
        if error.errno == errno.ENOMEM:  # which is what FFmpeg says of too many streams
            raise WrongFormatError(f"broken {kind}: over {MAX_STREAMS} streams, or larger than memory") from None
        if error.errno == errno.EPERM:  # -1, which is all that some of FFmpeg's decoders say
            raise WrongFormatError(f"broken {kind}: it cannot be decoded") from None
        raise WrongFormatError(f"broken {kind}: {error.strerror or type(error).__name__}") from None


def _check_texts(data: bytes, kind: str) -> None:
    """FFmpeg allocates the length that a RIFF text claims: refuses one that is larger than the file."""
    for found in _TEXTS.finditer(data):
        if (length := int.from_bytes(found[1], "little")) > len(data):
            raise WrongFormatError(f"broken {kind}: a file of {len(data)} bytes says that its texts are {length}")


def packets(container: InputContainer, stream: AnyStream) -> Iterator[Packet[AnyStream]]:
    """Of the stream from here on, and an empty one at the end, for which a decoder gives what it holds back. PyAV (18)
    would go on to streams that came up on the way, of which it knows nothing.
    """
    for packet in container.demux(stream):
        yield packet
        if not packet.size and packet.dts is None:
            return
