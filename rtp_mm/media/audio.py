"""Sound: file bytes to mono samples at a model's rate: FFmpeg (PyAV) decodes, soxr resamples.

Channels are averaged before soxr's "HQ" changes the rate: flat to 0.91 of the lower Nyquist frequency, nothing above
it. So does librosa, with which the models' makers read sound; FFmpeg's own default loses 4 % at 7 kHz of 8.
"""

from __future__ import annotations

import errno
import importlib.metadata
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.container import opened, packets

if TYPE_CHECKING:
    import soxr
    from av.audio.fifo import AudioFifo
    from av.audio.frame import AudioFrame
    from av.audio.stream import AudioStream
    from av.container import InputContainer

CONTAINERS = (
    "wav", "w64", "aiff", "au", "caf", "flac", "mp3", "ogg", "aac", "ac3", "eac3", "amr", "wv",
    "mov", "mp4", "matroska", "webm", "asf", "avi", "flv", "mpegts", "mpeg",
)  # fmt: skip
CODECS = (
    "aac", "mp3", "mp3float", "mp2", "mp2float", "flac", "alac", "opus", "libopus", "vorbis", "ac3", "eac3", "wavpack",
    "amrnb", "amrwb", "wmav1", "wmav2", "wmapro", "adpcm_ms", "adpcm_ima_wav", "gsm_ms", "speex", "libspeex",
)  # fmt: skip
CHUNK = 1 << 16  # samples of each channel that are converted and resampled at a time
MAX_CHANNELS = 64
RATES = range(1000, 768_001)  # Hz
MAX_TAGS = 16
_ID3 = re.compile(rb"ID3[^\xff]{2}(.[\0-\x7f]{4})", re.DOTALL)  # version; flags and size
MAX_DAMAGED = 0.1  # of the packets; FFmpeg's own tools leave any number out


class Sound(NamedTuple):
    """Mono samples [S] float32, and whether the file holds more of them than were asked for."""

    samples: NDArray[np.float32]
    is_cut: bool


def decoder() -> str:
    """The libraries that decide the samples, with their versions: a part of every cache key."""
    try:
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("av", "soxr"))
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def decode_audio(data: bytes, *, rate: int, max_samples: int) -> Sound:
    """The sound of a file, of a video too, at `rate`: its first `max_samples`; nothing after them is decoded.

    Raises `WrongFormatError` for what is broken or holds no sound, `NotSupportedError` for other containers and codecs,
    or without PyAV.
    """
    with opened(_behind_tags(data), CONTAINERS, "sound") as container:
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


def decode_channels(data: bytes, *, max_seconds: float) -> tuple[NDArray[np.float32], int]:
    """The whole sound of a file as it is: [channels, S] float32, and its rate. For whoever mixes and resamples alone.

    Raises as `decode_audio`, and `WrongFormatError` for more than `max_seconds` (MM_MAX_AUDIO_SECONDS).
    """
    parts: list[NDArray[np.float32]] = []
    count = rate = 0
    with opened(_behind_tags(data), CONTAINERS, "sound") as container:
        for frame in _joined(_frames(container, _stream(container))):
            parts.append(_channels(frame))
            count, rate = count + parts[-1].shape[1], rate or frame.sample_rate
            if frame.sample_rate != rate or len(parts[-1]) != len(parts[0]):
                raise WrongFormatError("a sound whose rate or channels change within it")
            if count > max_seconds * rate:
                raise WrongFormatError(f"sound of more than {max_seconds} s (MM_MAX_AUDIO_SECONDS)")
    if not count:
        raise WrongFormatError("a sound without samples")
    return np.concatenate(parts, axis=1), rate


def _behind_tags(data: bytes) -> bytes:
    """Without the ID3v2 tags before a sound: behind more than 1 MiB of them, which is a large picture, FFmpeg looks for
    nothing but MP3. Source: id3.org, ID3v2.4.0 (3.1).
    """
    at = 0
    for _ in range(MAX_TAGS):
        if (tag := _ID3.match(data, at)) is None:
            break
        flags, *size = tag[1]
        at += 10 + sum(seven << shift for seven, shift in zip(size, (21, 14, 7, 0), strict=True))
        at += 10 if flags & 0x10 else 0  # a footer
    return data[at:]


def _stream(container: InputContainer) -> AudioStream:
    stream = container.streams.best("audio")
    if stream is None:
        if container.streams.audio:
            raise WrongFormatError("broken sound: no channels, or too many")
        kinds = ", ".join(sorted({stream.type for stream in container.streams})) or "nothing"
        raise WrongFormatError(f"no sound in this file, it holds {kinds}")
    name = stream.codec_context.name if stream.codec_context is not None else "unknown"
    is_pcm = name.startswith("pcm_") and not name.startswith("pcm_s64")  # for which PyAV has no array
    if name not in CODECS and not is_pcm:
        raise NotSupportedError(f"sound in codec {name} is not decoded")
    stream.codec_context.thread_count = 1  # WavPack's takes one more than there are cores
    return stream  # type: ignore[return-value]


def _frames(container: InputContainer, stream: AudioStream) -> Iterator[AudioFrame]:
    """All frames in order; single damaged packets are left out, as FFmpeg's own tools do."""
    import av

    count = damaged = 0
    for packet in packets(container, stream):
        count += 1
        try:
            frames = packet.decode()
        except av.FFmpegError as error:
            if error.errno == errno.ENOMEM:
                raise
            damaged += 1
            continue
        yield from frames
    if damaged > MAX_DAMAGED * count:
        raise WrongFormatError(f"broken sound: {damaged} of {count} packets cannot be decoded")


def _joined(frames: Iterator[AudioFrame]) -> Iterator[AudioFrame]:
    """The same samples in frames of `CHUNK` or a little more, a shorter one before a change of format and at the end.

    What is done for each frame costs more than what is done to a thousand samples. Raises `WrongFormatError` for a
    format that is not taken, at its first frame: at 1 Hz FFmpeg makes one of every sample.
    """
    from av.audio.fifo import AudioFifo

    fifo, kind = AudioFifo(), None
    for frame in frames:
        frame.pts = None  # where it stands does not matter, only its order
        if kind != (kind := (frame.format.name, frame.layout.name, frame.sample_rate)):
            yield from _rest(fifo)
            fifo = AudioFifo()
            channels, rate = frame.layout.nb_channels, frame.sample_rate
            if rate not in RATES or not 0 < channels <= MAX_CHANNELS:
                most = f"at most {MAX_CHANNELS} at {RATES.start} to {RATES.stop - 1} Hz are taken"
                raise WrongFormatError(f"sound of {channels} channels at {rate} Hz; {most}")
        fifo.write(frame)
        if fifo.samples >= CHUNK:
            yield from _rest(fifo)
    yield from _rest(fifo)


def _rest(fifo: AudioFifo) -> Iterator[AudioFrame]:
    if (frame := fifo.read()) is not None:
        yield frame


def _resampled(frames: Iterator[AudioFrame], rate: int) -> Iterator[NDArray[np.float32]]:
    """Mono samples at `rate`, as they come."""
    try:
        import soxr
    except ImportError:
        raise NotSupportedError("sound needs soxr on the server (pip install 'rtp_mm[media]')") from None

    resampler: soxr.ResampleStream | None = None
    source_rate = rate
    for frame in _joined(frames):
        mono: NDArray[np.float32] = _channels(frame).mean(axis=0)
        if frame.sample_rate != source_rate:
            if resampler is not None:
                yield _rest_of(resampler)
            source_rate = frame.sample_rate
            resampler = soxr.ResampleStream(source_rate, rate, 1) if source_rate != rate else None
        yield resampler.resample_chunk(mono) if resampler is not None else mono
    if resampler is not None:
        yield _rest_of(resampler)


def _rest_of(resampler: soxr.ResampleStream) -> NDArray[np.float32]:
    """What the filter held back; the last call."""
    rest: NDArray[np.float32] = resampler.resample_chunk(np.zeros(0, np.float32), last=True)
    return rest


def _channels(frame: AudioFrame) -> NDArray[np.float32]:
    """[channels, S]; integers to -1..1."""
    values = frame.to_ndarray()
    is_integer, bits = values.dtype.kind != "f", 8 * values.dtype.itemsize
    middle = 2.0 ** (bits - 1) if values.dtype.kind == "u" else 0.0
    if not frame.format.is_planar:
        values = values.reshape(-1, frame.layout.nb_channels).T
    samples = values.astype(np.float32, order="C")
    return (samples - np.float32(middle)) / np.float32(2.0 ** (bits - 1)) if is_integer else samples
