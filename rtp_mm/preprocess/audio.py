"""Sound to log-mel frames, for Qwen2-Audio: decode, mix, resample, cut, transform."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.audio import Sound, decode_audio, decoder
from rtp_mm.media.sniff import sniff
from rtp_mm.preprocess.log_mel import LOUDEST, MelRule, log_mel
from rtp_mm.preprocess.patches import new_rows
from rtp_mm.types import Blob, Layout, LogMel, MMUrlType, PreprocessOptions, RowAllocator

MIN_STEPS = 2  # make a token


@dataclass(frozen=True, slots=True)
class AudioPreprocessor:
    """A function from a blob to its log-mel frames, with everything that it depends on. Picklable, for workers.

    The frames are those of `WhisperFeatureExtractor` (transformers 5.23), but for its rounding, 6e-5 at most.
    """

    rule: MelRule

    @property
    def cache_key(self) -> tuple[object, ...]:
        """All else that decides the frames."""
        return ("log-mel", f"numpy {np.__version__}", decoder(), *astuple(self.rule))

    def __call__(
        self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, allocate: RowAllocator = new_rows
    ) -> LogMel:
        """Frames of a file's sound or of samples at `rule.rate`, written to what `allocate` gives. What is longer than
        the rule has it is cut, as Hugging Face cuts it.

        Raises `WrongFormatError` for what cannot be decoded, is too short for a token or absurdly loud,
        `NotSupportedError` for images.
        """
        samples, is_cut = self._sound(blob, mm_type)
        steps = -(-self.rule.frames(len(samples)) // 2)
        if steps < MIN_STEPS:
            least = (2 * MIN_STEPS - 2) * self.rule.hop + 1
            raise WrongFormatError(f"{len(samples)} samples at {self.rule.rate} Hz are too short; at least {least}")
        if (loudest := np.abs(samples).max()) > LOUDEST:
            raise WrongFormatError(f"a sample of {loudest:.0e}, over the limit of {LOUDEST:.0e}")
        rows = allocate((2 * steps + 2, 4 * self.rule.bins)).view(np.float32)
        rows[0] = 0
        frames = min(len(rows) - 1, self.rule.max_frames)
        rows[1 : 1 + frames] = log_mel(samples, self.rule, frames)
        rows[1 + frames :] = 0
        return LogMel(rows, float(self.rule.seconds) if is_cut else None)

    def is_possible(self, layout: Layout, blob: Blob, mm_type: MMUrlType) -> bool:
        """Whether a sound's rows may lie so."""
        count, columns = layout.shape
        steps, rest = divmod(count - 2, 2)
        most = -(-self.rule.frames(self.rule.max_samples) // 2)
        return layout.grid_thw is None and columns == 4 * self.rule.bins and not rest and MIN_STEPS <= steps <= most

    def _sound(self, blob: Blob, mm_type: MMUrlType) -> Sound:
        data = blob.data
        if isinstance(data, np.ndarray):
            return self._sound_of_tensor(data)
        if mm_type is MMUrlType.DEFAULT:
            mm_type = sniff(data) or MMUrlType.AUDIO
        if mm_type is MMUrlType.IMAGE:
            raise NotSupportedError("this model takes sound only, not images")
        return decode_audio(data, rate=self.rule.rate, max_samples=self.rule.max_samples)

    def _sound_of_tensor(self, samples: NDArray[np.float32]) -> Sound:
        if samples.ndim != 1:
            raise NotSupportedError(f"this model takes sound only, the tensor is pixels {list(samples.shape)}")
        return Sound(samples[: self.rule.max_samples], len(samples) > self.rule.max_samples)
