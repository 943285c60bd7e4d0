"""Which frames of a clip a model sees, and how large: numbers in, integers out. Two published rules.

qwen: qwen-vl-utils 0.0.14 (`smart_nframes`, `fetch_video`), which the model cards of Qwen2-VL and Qwen2.5-VL use: fps
      frames a second (2 unless asked), at least 4 and at most 768, an even count, spread from the first frame to the
      last. A frame has 128 to 768 tokens, all together 115200 tokens of temporal pairs (0.9 of 128000).
hf:   transformers 5.23 (`Qwen2VLVideoProcessor.sample_frames`, with fps given): the same count but for the limits'
      rounding, frames at the start of equal spans, and no limit on all frames together. A checkpoint may say otherwise
      (see `rtp_mm/preprocess/video_config.py`): other figures, a number of frames for clips of any length, a limit on
      all frames together. The size of a frame is the checkpoint's, by default 128 to 768 tokens.

Both count in float32 where torch does (`linspace`, `arange`), so that the same frames come out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np

from rtp_mm.errors import WrongFormatError
from rtp_mm.preprocess.sizes import smart_resize
from rtp_mm.types import PreprocessOptions

RuleName = Literal["qwen", "hf"]

FPS = 2.0
MIN_FRAMES, MAX_FRAMES = 4, 768
MIN_TOKENS, MAX_TOKENS = 128, 768  # of a frame
TOTAL_TOKENS = 128000 * 0.9  # of a clip, in pairs of frames
IMAGE_MIN_TOKENS, IMAGE_MAX_TOKENS = 4, 16384  # of a frame whose size is asked for


@dataclass(frozen=True, slots=True)
class VideoRule:
    """One rule for one model.

    factor:       pixels on a token's side.
    min_pixels, max_pixels: of a frame, after resizing.
    server_max_frames: MM_MAX_FRAMES.
    fps, min_frames, max_frames: where a request does not say.
    num_frames:   hf: of every clip instead, whatever its length; a multiple of the temporal patch.
    clip_tokens:  hf: of all frames together, in pairs of frames, of which 0.9 are shared.
    """

    name: RuleName
    factor: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    server_max_frames: int = MAX_FRAMES
    fps: float = FPS
    min_frames: int = MIN_FRAMES
    max_frames: int = MAX_FRAMES
    num_frames: int | None = None
    clip_tokens: int | None = None

    @classmethod
    def published(cls, name: RuleName, factor: int, temporal_patch_size: int) -> VideoRule:
        """With the limits that the libraries have built in."""
        token = factor * factor
        return cls(name, factor, temporal_patch_size, MIN_TOKENS * token, MAX_TOKENS * token)

    def check_given(self, frames: int) -> None:
        """For a clip that is sent as its frames. Raises `WrongFormatError` for more than are taken."""
        if frames > self.server_max_frames:
            raise WrongFormatError(f"{frames} frames, over the limit of {self.server_max_frames} (MM_MAX_FRAMES)")

    def choose_frames(self, total: int, fps: Fraction | float, options: PreprocessOptions) -> list[int]:
        """Indices of the frames to take of `total` that come at `fps` a second, ascending.

        A clip of one frame, which both rules refuse, is that frame. Raises `WrongFormatError` for options that leave
        no frames.
        """
        if total == 1:
            return [0]
        count = self._count(total, float(fps), options)
        if count > self.server_max_frames:
            raise WrongFormatError(
                f"{count} frames, over the limit of {self.server_max_frames} (MM_MAX_FRAMES); fewer are taken with a "
                "lower max_frames or fps"
            )
        return _spread(total, count) if self.name == "qwen" else _spans(total, count)

    def frame_size(self, height: int, width: int, frames: int, options: PreprocessOptions) -> tuple[int, int]:
        """(height, width) that each of `frames` frames is resized to. Raises `WrongFormatError`."""
        if self.name == "qwen" and options.height is not None and options.width is not None:
            limits = (IMAGE_MIN_TOKENS * self.factor**2, IMAGE_MAX_TOKENS * self.factor**2)
            return smart_resize(options.height, options.width, self.factor, *limits, least=1)
        min_pixels = options.min_pixels or self.min_pixels
        max_pixels: float = options.max_pixels or self.max_pixels
        if self.name == "qwen":
            total_pixels = TOTAL_TOKENS * self.factor**2
            share = max(min(self.max_pixels, total_pixels / frames * self.temporal_patch_size), int(min_pixels * 1.05))
            max_pixels = min(options.max_pixels or share, share)
        elif self.clip_tokens is not None:
            share = int(self.clip_tokens * self.factor**2 * 0.9) * self.temporal_patch_size // frames
            max_pixels = max(min(max_pixels, share), int(min_pixels * 1.05))
        height, width = options.height or height, options.width or width
        least = 1 if self.name == "qwen" else 0
        return smart_resize(height, width, self.factor, min_pixels, max_pixels, least=least)

    def _count(self, total: int, fps: float, options: PreprocessOptions) -> int:
        if self.num_frames is not None:
            return self._fixed_count(self.num_frames, total, options)
        step = self.temporal_patch_size
        least = options.min_frames or self.min_frames
        most = options.max_frames or min(self.max_frames, total)
        if self.name == "qwen":
            least = math.ceil(least / step) * step
        else:
            most = min(most, total)
        most = math.floor(most / step) * step
        wanted = total / fps * (options.fps or self.fps)
        count = math.floor(min(max(wanted, least), most, total) / step) * step
        if count < step:
            raise WrongFormatError(f"at least {step} frames must be taken, max_frames {most} of {total} frames")
        return count

    def _fixed_count(self, count: int, total: int, options: PreprocessOptions) -> int:
        if (options.fps, options.min_frames, options.max_frames) != (None, None, None):
            raise WrongFormatError(f"this model takes {count} frames of every clip: no fps, min_frames or max_frames")
        if count > total:
            raise WrongFormatError(f"this model takes {count} frames of every clip, this one has {total}")
        return count


def _spread(total: int, count: int) -> list[int]:
    """`torch.linspace(0, total - 1, count).round()`: from both ends towards the middle, halves to even."""
    last = total - 1
    step = float(np.float32(last) / np.float32(count - 1))
    places = np.arange(count)
    values = np.where(places < count // 2, step * places, last - step * (count - 1 - places))
    indices: list[int] = np.rint(values.astype(np.float32)).astype(np.int64).tolist()
    return indices


def _spans(total: int, count: int) -> list[int]:
    """`torch.arange(0, total, total / count).int()`, which for some sizes has one more than `count`.

    torch fills float32 in vectors of 8, two at a time: the first value of a vector is rounded, then what is added to
    it. One value in some thousands is another frame than without that.
    """
    step = total / count
    places = np.arange(math.ceil(total / step))
    values = (places * step).astype(np.float32)
    vectors = values[: len(places) // 16 * 16].reshape(-1, 8)
    vectors[:] = vectors[:, :1].astype(np.float64) + np.arange(8) * step
    indices: list[int] = values.astype(np.int64).tolist()
    return indices
