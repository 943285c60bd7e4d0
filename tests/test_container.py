"""What lies between FFmpeg and the readers of videos and sounds."""

from __future__ import annotations

import errno
import io
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import av
import pytest
from sounds import encode, sine

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.container import opened, packets


def opens(data: bytes) -> None:
    with opened(data, ("wav", "avi"), "sound"):
        pass


def test_packets_end_with_the_empty_one_of_their_own_stream() -> None:
    """PyAV goes on to those of streams that came up on the way, and fails. A sample of no bytes is no end."""

    def demux(stream: object) -> Iterator[Any]:
        for size, time in [(7, 0), (0, 1), (7, 2), (0, None)]:
            yield SimpleNamespace(size=size, dts=time)
        raise IndexError("list index out of range")

    container: Any = SimpleNamespace(demux=demux)
    assert [packet.size for packet in packets(container, None)] == [7, 0, 7, 0]  # type: ignore[type-var]


@pytest.mark.parametrize("container", ["wav", "avi"])
def test_texts_longer_than_their_file_take_no_memory(container: str) -> None:
    """FFmpeg would take 1 GiB for these."""
    data = bytearray(encode(sine(1), 16000, container))
    at = data.index(b"LIST", data.index(b"INFO") - 8) + 4
    opens(bytes(data))
    data[at : at + 4] = struct.pack("<I", 1 << 30)
    data[at + 12 : at + 16] = struct.pack("<I", (1 << 30) - 12)
    with pytest.raises(WrongFormatError, match=r"broken sound: a file of \d+ bytes says that its texts are 1073741824"):
        opens(bytes(data))


@pytest.mark.parametrize("container", ["wav", "matroska", "mpegts", "ipod"])
def test_packets_are_those_of_pyav(container: str) -> None:
    data = encode(sine(1), 16000, container, "pcm_s16le" if container == "wav" else "aac")
    with av.open(io.BytesIO(data)) as source:
        expected = [bytes(packet) for packet in source.demux(audio=0)]
    with av.open(io.BytesIO(data)) as source:
        assert [bytes(packet) for packet in packets(source, source.streams.audio[0])] == expected
        assert expected[-1] == b""


@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EAGAIN])
def test_want_of_memory_is_no_broken_file(number: int) -> None:
    """Nor is a decoder's thread that cannot start, where there is no memory for its stack."""
    with pytest.raises(MemoryError), opened(encode(sine(1), 16000), ("wav",), "sound"):
        raise av.error.FFmpegError(number, "a word of FFmpeg's")


@pytest.mark.parametrize("bug", [ValueError, LookupError, OSError, EOFError, MemoryError])
def test_what_a_reader_does_wrong_is_no_broken_file(bug: type[Exception]) -> None:
    """PyAV's errors are such, too."""
    with pytest.raises(bug, match="ours") as caught, opened(encode(sine(1), 16000), ("wav",), "sound"):
        raise bug("ours")
    assert caught.type is bug
