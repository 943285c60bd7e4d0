"""Sound: file bytes to mono samples at a model's rate, with FFmpeg (PyAV).

Channels are averaged, then FFmpeg's swresample changes the rate, with its default filter (polyphase windowed sinc of 32
taps, cut off at 0.97 of the lower Nyquist frequency). Models of the field are trained on librosa's mean and soxr's
resampling, whose filter is longer: what differs lies above 7 kHz of 8 (README). No resampling, no difference.
"""

from __future__ import annotations

import importlib.metadata
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtp_mm.errors import NotSupportedError, WrongFormatError

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

# Demuxers by FFmpeg's names, video's among them. Never those that open other files or addresses (hls, dash, concat).
CONTAINERS = (
    "wav", "w64", "aiff", "au", "caf", "flac", "mp3", "ogg", "aac", "ac3", "eac3", "amr", "wv",
    "mov", "mp4", "matroska", "webm", "asf", "avi", "flv", "mpegts", "mpeg",
)  # fmt: skip
CODECS = (
    "aac", "mp3", "mp3float", "mp2", "mp2float", "flac", "alac", "opus", "libopus", "vorbis", "ac3", "eac3", "wavpack",
    "amrnb", "amrwb", "wmav1", "wmav2", "wmapro", "adpcm_ms", "adpcm_ima_wav", "gsm_ms", "speex", "libspeex",
)  # fmt: skip
MAX_STREAMS = 64
MAX_CHANNELS = 64
RATES = range(1000, 768_001)  # Hz
MAX_DAMAGED = 0.1  # of the packets; FFmpeg's own tools leave any number out


class Sound(NamedTuple):
    """Mono samples [S] float32, and whether the file holds more of them than were asked for."""

    samples: NDArray[np.float32]
    is_cut: bool


def decoder() -> str:
    """The library that decides the samples, with its version: a part of every cache key."""
    try:
        return f"av {importlib.metadata.version('av')}"
    except importlib.metadata.PackageNotFoundError:
        return "no av"


def decode_audio(data: bytes, *, rate: int, max_samples: int) -> Sound:
    """The sound of a file, of a video too, at `rate`: its first `max_samples`; nothing after them is decoded.

    Raises `WrongFormatError` for what is broken or holds no sound, `NotSupportedError` for other containers and codecs,
    or without PyAV.
    """
    with _open(data) as container:
        stream = _stream(container)
        parts: list[NDArray[np.float32]] = []
        count = 0
        for part in _resampled(_frames(container, stream), rate):
            parts.append(part)
            count += len(part)
            if count > max_samples:
                break
    if not count:
        raise WrongFormatError("a sound without samples")
    samples = np.concatenate(parts)[:max_samples]
    if not np.isfinite(samples).all():
        raise WrongFormatError("broken sound: samples must be finite")
    return Sound(samples, count > max_samples)


@contextmanager
def _open(data: bytes) -> Iterator[InputContainer]:
    try:
        import av
    except ImportError:
        raise NotSupportedError("sound needs PyAV on the server (pip install 'rtp_mm[media]')") from None

    options = {"format_whitelist": ",".join(CONTAINERS), "max_streams": str(MAX_STREAMS)}
    try:
        with av.open(io.BytesIO(data), container_options=options, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise WrongFormatError(f"broken sound: {error.strerror or type(error).__name__}") from None


def _stream(container: InputContainer) -> AudioStream:
    stream = container.streams.best("audio")
    if stream is None:
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise WrongFormatError(f"no sound in this file, it holds {kinds}")
    name = stream.codec_context.name if stream.codec_context is not None else "unknown"
    if name not in CODECS and not name.startswith("pcm_"):
        raise NotSupportedError(f"sound in codec {name} is not decoded")
    return stream  # type: ignore[return-value]


def _frames(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """All frames in order; single damaged packets are left out, as FFmpeg's own tools do."""
    import av

    packets = damaged = 0
    for packet in container.demux(stream):
        packets += 1
        try:
            frames = packet.decode()
        except av.InvalidDataError:
            damaged += 1
            continue
        yield from frames
    if damaged > MAX_DAMAGED * packets:
        raise WrongFormatError(f"broken sound: {damaged} of {packets} packets cannot be decoded")


def _resampled(frames: Iterator[AudioFrame], rate: int) -> Iterator[NDArray[np.float32]]:
    """Mono samples at `rate`, as they come."""
    resampler: Any = None
    source_rate = rate
    for frame in frames:
        if frame.sample_rate not in RATES or not 0 < frame.layout.nb_channels <= MAX_CHANNELS:
            raise WrongFormatError(f"sound of {frame.layout.nb_channels} channels at {frame.sample_rate} Hz")
        if frame.sample_rate != source_rate:
            yield from _flush(resampler)
            source_rate = frame.sample_rate
            resampler = _resampler(rate) if source_rate != rate else None
        mono = _mono(frame)
        yield from [mono] if resampler is None else _resample(resampler, mono, source_rate)
    yield from _flush(resampler)


def _resampler(rate: int) -> Any:
    from av.audio.resampler import AudioResampler

    return AudioResampler(format="flt", layout="mono", rate=rate)


def _resample(resampler: Any, mono: NDArray[np.float32], source_rate: int) -> Iterator[NDArray[np.float32]]:
    from av.audio.frame import AudioFrame

    frame = AudioFrame.from_ndarray(mono[None], format="flt", layout="mono")
    frame.sample_rate = source_rate
    yield from (out.to_ndarray()[0] for out in resampler.resample(frame))


def _flush(resampler: Any) -> Iterator[NDArray[np.float32]]:
    if resampler is not None:
        yield from (out.to_ndarray()[0] for out in resampler.resample(None))


def _mono(frame: AudioFrame) -> NDArray[np.float32]:
    """[S]: the mean of the channels; integers to -1..1."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    if values.dtype.kind == "u":
        values = values.astype(np.float32) - np.float32(128)
        scale = 2.0**-7
    else:
        scale = 2.0 ** (1 - 8 * values.dtype.itemsize) if values.dtype.kind == "i" else 1.0
    mono: NDArray[np.float32] = values.mean(axis=0, dtype=np.float64 if values.dtype.itemsize > 4 else np.float32)
    return (mono * scale).astype(np.float32)
