"""Sounds for tests: made of sines and noise, encoded with PyAV."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray

FORMATS = {  # name: container, codec, rate, and how far decoded samples may be off
    "wav": ("wav", "pcm_s16le", 16000, 1e-4),
    "wav-44k": ("wav", "pcm_s16le", 44100, 1e-4),
    "wav-u8": ("wav", "pcm_u8", 8000, 1e-2),
    "wav-s24": ("wav", "pcm_s24le", 96000, 1e-4),
    "wav-f32": ("wav", "pcm_f32le", 48000, 1e-4),
    "w64": ("w64", "pcm_s24le", 48000, 1e-4),
    "aiff": ("aiff", "pcm_s24be", 44100, 1e-4),
    "caf": ("caf", "pcm_s16be", 44100, 1e-4),
    "au": ("au", "pcm_mulaw", 8000, 2e-2),
    "flac": ("flac", "flac", 22050, 1e-4),
    "mp3": ("mp3", "libmp3lame", 44100, 5e-2),
    "opus": ("ogg", "libopus", 48000, 3e-2),
    "webm": ("webm", "libopus", 48000, 3e-2),
    "m4a": ("ipod", "aac", 44100, 3e-2),
    "mkv": ("matroska", "ac3", 48000, 1e-2),
}


def sine(seconds: float, rate: int = 16000, hertz: float = 440.0) -> NDArray[np.float32]:
    """[S], amplitude a half."""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def speech(samples: int, seed: int = 0) -> NDArray[np.float32]:
    """[S] at 16 kHz, like speech to a spectrogram: a gliding voice with overtones in syllables, pauses, and noise."""
    generator = np.random.default_rng(seed)
    t = np.arange(samples) / 16000
    pitch = np.cumsum(120 + 40 * np.sin(2 * np.pi * 0.7 * t + seed)) / 16000
    voice = sum(np.sin(2 * np.pi * n * pitch) / n**1.5 for n in range(1, 20))
    syllables = np.clip(np.sin(2 * np.pi * 3.1 * t), 0, 1)
    sound = 0.2 * voice * syllables + 0.003 * generator.standard_normal(samples)
    return sound.astype(np.float32)


def encode(
    channels: NDArray[np.float32], rate: int, container: str = "wav", codec: str = "pcm_s16le", video: bool = False
) -> bytes:
    """A file of [channels, S] or [S]; with `video`, beside ten black pictures."""
    import av  # machines without it still have `sine` and `speech`

    channels = np.atleast_2d(channels)
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(channels)]
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        pictures = out.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p") if video else None
        stream = out.add_stream(codec, rate=rate, layout=layout)
        context = stream.codec_context
        source = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels), format="fltp", layout=layout)
        source.sample_rate = rate
        source.pts = 0
        fit = av.AudioResampler(context.format, context.layout, rate, context.frame_size or None)
        if pictures is not None:
            for _ in range(10):
                black = np.zeros((48, 64, 3), np.uint8)
                out.mux(pictures.encode(av.VideoFrame.from_ndarray(black, format="rgb24")))
            out.mux(pictures.encode(None))
        for frame in [*fit.resample(source), *fit.resample(None), None]:
            out.mux(stream.encode(frame))
    return file.getvalue()
