"""Sound files to log-mel frames: PyAV's decoder and resampler with Hugging Face's feature extractor, and ours.

Half a minute of stereo noise at 44.1 kHz (48 kHz for Opus) in every format. The decode alone stands beside. The
resamplers differ: FFmpeg's default in the peer, 128 taps in ours (`rtp_mm/media/audio.py` says why).
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import WhisperFeatureExtractor

from benchmarks.harness import interleave
from benchmarks.report import write_result
from rtp_mm.media.audio import decode_audio
from rtp_mm.models.qwen2_audio import PUBLISHED_RULE
from rtp_mm.preprocess.audio import AudioPreprocessor
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

SECONDS = 30
# Container, codec and rate, by name.
FORMATS = {
    "WAV": ("wav", "pcm_s16le", 44100),
    "FLAC": ("flac", "flac", 44100),
    "MP3": ("mp3", "libmp3lame", 44100),
    "AAC": ("mp4", "aac", 44100),
    "Opus": ("ogg", "libopus", 48000),
    "WAV, 16 kHz": ("wav", "pcm_s16le", 16000),
}


def encoded(container: str, codec: str, rate: int) -> bytes:
    """Filtered noise that swells, another on each side."""
    white = np.random.default_rng(0).standard_normal((2, rate * SECONDS))
    swell = np.abs(np.sin(np.arange(rate * SECONDS) * 4 / rate))
    sides = np.stack([0.1 * swell * np.convolve(side, np.ones(8) / 8, "same") for side in white])
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=rate, layout="stereo")
        samples = (sides.T.reshape(1, -1) * 32767).astype(np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="stereo")
        frame.sample_rate = rate
        out.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


def with_pyav(data: bytes) -> NDArray[np.float32]:
    """Mono at 16 kHz, as PyAV's documentation resamples."""
    resampler = av.AudioResampler("flt", "mono", 16000)
    with av.open(io.BytesIO(data)) as container:
        frames = [resampled for frame in container.decode(audio=0) for resampled in resampler.resample(frame)]
    frames += resampler.resample(None)
    return np.concatenate([frame.to_ndarray()[0] for frame in frames])


def contenders(data: bytes) -> dict[str, Callable[[], Any]]:
    extractor: Any = WhisperFeatureExtractor(feature_size=128)
    preprocessor, blob, options = AudioPreprocessor(PUBLISHED_RULE), Blob(data, b"", ""), PreprocessOptions()
    return {
        "decode with PyAV": lambda: with_pyav(data),
        "PyAV and Hugging Face": lambda: extractor(with_pyav(data), sampling_rate=16000, return_attention_mask=True),
        "our decode": lambda: decode_audio(data, rate=16000, max_samples=16000 * SECONDS),
        "ours": lambda: preprocessor(blob, MMUrlType.AUDIO, options),
    }


def run(rounds: int) -> None:
    results = {}
    for name, how in track(FORMATS.items(), "sounds"):
        data = encoded(*how)
        timings = interleave(contenders(data), rounds)
        results[name] = {"bytes": len(data), **{way: asdict(timing) for way, timing in timings.items()}}
    ways = [way for way in next(iter(results.values())) if way != "bytes"]
    table = Table("format", "MB", *(f"{way}, ms" for way in ways), "faster by", title=f"{SECONDS} s of stereo sound")
    for name, row in results.items():
        medians = [row[way]["median"] for way in ways]
        faster = row["PyAV and Hugging Face"]["median"] / row["ours"]["median"]
        table.add_row(name, f"{row['bytes'] / 1e6:.1f}", *(f"{ms:.0f}" for ms in medians), f"{faster:.1f}x")
    Console().print(table)
    write_result("media_sounds", {"unit": "ms", "seconds": SECONDS, "formats": results})
