"""Log-mel spectrograms as Whisper defines them (arXiv 2212.04356): transformers' `WhisperFeatureExtractor`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

FLOOR = 1e-10  # of the energy in a band
_FRAMES_AT_ONCE = 64  # whose windows, spectra and power stay in a core's cache
RANGE = 8.0  # decades below the loudest band, to which all quieter ones are lifted
# Slaney's mel scale (Auditory Toolbox, 1998): 3 mel per 200 Hz up to 1 kHz, then 27 mel for each factor of 6.4.
_LINEAR_MEL, _KNEE_HZ, _LOG_MEL = 3 / 200, 1000.0, 27 / np.log(6.4)


@dataclass(frozen=True, slots=True)
class MelRule:
    """Of a checkpoint: how samples become frames. Frame i is centred on sample i * `hop`."""

    MAX_HERTZ: ClassVar = 8000

    bins: int  # mel bands, from 0 Hz to `MAX_HERTZ`
    rate: int  # Hz
    hop: int  # samples
    window: int  # samples, also the FFT's length
    seconds: int  # of the longest sound; a shorter one is followed by silence up to here

    @property
    def max_samples(self) -> int:
        return self.seconds * self.rate

    @property
    def max_frames(self) -> int:
        return self.max_samples // self.hop

    def frames(self, samples: int) -> int:
        """How many begin within so many samples."""
        return -(-samples // self.hop)


LOUDEST = np.float32(1e16)  # of a sample; the power of a window of them, at most 4e4 times its square, is a float32


def log_mel(samples: NDArray[np.float32], rule: MelRule, frames: int) -> NDArray[np.float32]:
    """The first frames [`frames`, bins] of samples [S], S at most `rule.max_samples`; silence follows them.

    The FFT is in float64, which numpy has faster than float32: nearer to the exact values than PyTorch's, by which
    Hugging Face computes. Frames must be enough to hold the loudest band: the samples' own, or more.
    """
    half, reach = rule.window // 2, (frames - 1) * rule.hop + rule.window  # samples, from `half` before the first
    padded = np.zeros(reach)
    end = min(half + len(samples), reach)
    padded[half:end] = samples[: end - half]
    # Mirrored without the edge itself, at both ends of the longest sound.
    padded[:half] = padded[2 * half : half : -1]
    if (beyond := reach - half - rule.max_samples) > 0:
        edge = half + rule.max_samples
        padded[edge:] = padded[edge - 2 : edge - 2 - beyond : -1]
    windows = np.lib.stride_tricks.sliding_window_view(padded, rule.window)[:: rule.hop]
    log_energy = np.empty((frames, rule.bins), np.float32)
    for begin in range(0, frames, _FRAMES_AT_ONCE):
        some = slice(begin, begin + _FRAMES_AT_ONCE)
        spectrum = np.fft.rfft(windows[some] * _hann(rule.window))
        power = (spectrum.real**2 + spectrum.imag**2).astype(np.float32)
        energy = np.maximum(power @ mel_filters(rule), np.float32(FLOOR))
        np.log10(energy, out=log_energy[some])
    np.maximum(log_energy, log_energy.max() - np.float32(RANGE), out=log_energy)
    return (log_energy + np.float32(4)) / np.float32(4)


@cache
def mel_filters(rule: MelRule) -> NDArray[np.float32]:
    """[window / 2 + 1, bins]: triangles on Slaney's scale, each of area 1 (per 2 Hz)."""
    edges = _hertz(np.linspace(0, _mel(np.array(rule.MAX_HERTZ)), rule.bins + 2))
    hertz = np.linspace(0, rule.rate // 2, rule.window // 2 + 1)[:, None]
    rising = (hertz - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - hertz) / (edges[2:] - edges[1:-1])
    triangles = np.maximum(0, np.minimum(rising, falling))
    return (triangles * (2 / (edges[2:] - edges[:-2]))).astype(np.float32)


@cache
def _hann(window: int) -> NDArray[np.float64]:
    """Periodic."""
    return np.hanning(window + 1)[:-1]


def _mel(hertz: NDArray[np.float64]) -> NDArray[np.float64]:
    knee = _KNEE_HZ * _LINEAR_MEL
    return np.where(hertz < _KNEE_HZ, hertz * _LINEAR_MEL, knee + np.log(np.maximum(hertz, 1) / _KNEE_HZ) * _LOG_MEL)


def _hertz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    knee = _KNEE_HZ * _LINEAR_MEL
    return np.where(mel < knee, mel / _LINEAR_MEL, _KNEE_HZ * np.exp((mel - knee) / _LOG_MEL))
