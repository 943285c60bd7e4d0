"""Clips to patch rows, for the Qwen2-VL line: choose frames, decode these, crop, resize, cut; one frame at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rtp_mm import _core
from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.animation import open_animation
from rtp_mm.media.clip import Clip, ClipLimits, Frame, OpenClip
from rtp_mm.media.limits import check_pixels
from rtp_mm.media.sniff import sniff
from rtp_mm.media.video import decoder, open_video
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.patches import ImagePreprocessor, ResizePlan, new_rows
from rtp_mm.preprocess.sizes import crop_pixels
from rtp_mm.preprocess.video_config import checkpoints_rule
from rtp_mm.preprocess.video_rule import FPS, TOTAL_TOKENS, VideoRule
from rtp_mm.types import Blob, Layout, MMUrlType, Patches, PreprocessOptions, RowAllocator

if TYPE_CHECKING:
    from rtp_mm.config import Settings


class _Frames(NamedTuple):
    """How many there are, how large, and how many a second."""

    number: int
    height: int
    width: int
    fps: float


@dataclass(frozen=True, slots=True)
class VideoPreprocessor:
    """A function from a blob to its patches, with everything that it depends on. Picklable, for worker processes.

    Memory is the file, the rows and one frame, however long the clip.
    """

    rule: VideoRule
    image: ImagePreprocessor  # whose patches and limits these are
    limits: ClipLimits
    max_patches: int

    @classmethod
    def from_checkpoint(
        cls, folder: Path, config: ImageProcessorConfig, image: ImagePreprocessor, settings: Settings
    ) -> VideoPreprocessor:
        """The rule that the settings name; `config` is the checkpoint's for images. Raises `StartError`."""
        factor, step = config.patch_size * config.merge_size, config.temporal_patch_size
        rule = replace(
            VideoRule.published(settings.mm_video_rule, factor, step), server_max_frames=settings.mm_max_frames
        )
        if rule.name == "hf":
            rule = checkpoints_rule(folder, config, rule)
        patches = settings.mm_max_patches_per_item or int(TOTAL_TOKENS) * config.merge_size**2
        return cls(rule, image, ClipLimits.of(settings), patches)

    @property
    def cache_key(self) -> tuple[object, ...]:
        """All else that decides the bytes."""
        return (decoder(), *astuple(self.rule))

    def frame_times(self, data: bytes, options: PreprocessOptions) -> list[float]:
        """Seconds from the clip's beginning, by its average rate, of the frames that are taken. Raises as a call."""
        with open_clip(data, self.limits) as clip:
            return [index / float(clip.fps) for index in self.rule.choose_frames(clip.frames, clip.fps, options)]

    def predict(self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions) -> Layout | None:
        """How a clip's rows will lie, known before it is decoded: of frames that are decoded already, and of an
        animation; `None` for a container's, which takes FFmpeg to read. Raises `WrongFormatError` for a limit that it
        breaks, but for that of patches.
        """
        data = blob.data
        if isinstance(data, np.ndarray):
            frames = self._frames_of(data, options)
        elif sniff(data) is MMUrlType.IMAGE:
            with open_animation(data, self.limits) as clip:
                _, frames = self._choose(clip, options)
        else:
            return None
        plan = self.plan(frames.height, frames.width, frames.number, options)
        return self._layout(self.grid(frames.number, plan))

    def is_possible(self, layout: Layout, blob: Blob, mm_type: MMUrlType) -> bool:
        """Whether a clip's rows may lie so."""
        grid = layout.grid_thw
        return grid is not None and self.image.merges(grid) and layout == self._layout(grid)

    def plan(self, height: int, width: int, frames: int, options: PreprocessOptions) -> ResizePlan:
        """For each of so many frames of that size. Raises `WrongFormatError` for a limit that they break."""
        check_pixels(width, height, self.image.max_image_pixels)
        box = crop_pixels(height, width, options.crop)
        out_height, out_width = self.rule.frame_size(*box.size, frames, options)
        check_pixels(out_width, out_height, self.image.max_image_pixels)
        return ResizePlan.of(box, out_height, out_width, self.image.resize_rule)

    def grid(self, frames: int, plan: ResizePlan) -> tuple[int, int, int]:
        """(t, h, w) in patches."""
        patch, step = self.image.patch_size, self.rule.temporal_patch_size
        return -(-frames // step), plan.height // patch, plan.width // patch

    def checked_grid(self, frames: int, plan: ResizePlan) -> tuple[int, int, int]:
        """The same. Raises `WrongFormatError` for more patches than the limit."""
        t, h, w = grid = self.grid(frames, plan)
        if t * h * w > self.max_patches:
            raise WrongFormatError(
                f"{t * h * w} patches of {frames} frames of {plan.width}x{plan.height}, over the limit of "
                f"{self.max_patches} (MM_MAX_PATCHES_PER_ITEM); fewer frames (max_frames, fps) or smaller ones "
                "(max_pixels) fit"
            )
        return grid

    def __call__(
        self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, allocate: RowAllocator = new_rows
    ) -> Patches:
        """Rows [t * h * w, 3 * T * P * P], written to what `allocate` gives, the grid (t, h, w) and seconds from one t
        to the next.

        An array is frames at `options.fps` (2 a second unless set), all of which are taken. Raises `WrongFormatError`
        for what cannot be decoded, breaks a limit or has bad options, `NotSupportedError` for what is no video.
        """
        data = blob.data
        if isinstance(data, np.ndarray):
            return self._patches(data, self._frames_of(data, options), options, allocate)
        with open_clip(data, self.limits) as clip:
            chosen, frames = self._choose(clip, options)
            patches = self._patches(clip.read(chosen), frames, options, allocate)
            return replace(patches, decoded_frames=clip.decoded)

    def _frames_of(self, pixels: NDArray[np.uint8], options: PreprocessOptions) -> _Frames:
        """[T, H, W, 3], of which all are taken."""
        number, height, width, _ = pixels.shape
        self.rule.check_given(number)
        return _Frames(number, height, width, options.fps or FPS)

    def _choose(self, clip: Clip, options: PreprocessOptions) -> tuple[list[int], _Frames]:
        """Which frames are taken, and what these are."""
        chosen = self.rule.choose_frames(clip.frames, clip.fps, options)
        fps = len(chosen) / clip.frames * float(clip.fps)
        return chosen, _Frames(len(chosen), clip.height, clip.width, fps)

    def _layout(self, grid: tuple[int, int, int]) -> Layout:
        return Layout((prod(grid), self.image.row_bytes * self.rule.temporal_patch_size), grid)

    def _patches(
        self, frames: Iterable[Frame], shape: _Frames, options: PreprocessOptions, allocate: RowAllocator
    ) -> Patches:
        """The last frame is repeated where it leaves a temporal patch unfilled."""
        patch, merge, step = self.image.patch_size, self.image.merge_size, self.rule.temporal_patch_size
        count = shape.number
        plan = self.plan(shape.height, shape.width, count, options)
        grid = t, h, w = self.checked_grid(count, plan)
        rows = allocate(self._layout(grid).shape)  # from here on frames are decoded
        done = 0
        for frame in frames:
            slots = [done] if done + 1 < count else range(done, t * step)
            own = self._plan_frame(frame, plan, options)
            pixels = own.cut(frame)
            for slot in slots:
                pair = slot // step
                _core.resize_patchify(
                    pixels,
                    plan.height,
                    plan.width,
                    patch,
                    merge,
                    order=own.order,
                    temporal_patch_size=step,
                    slot=slot % step,
                    out=rows[pair * h * w : (pair + 1) * h * w],
                )
            done += 1
        if done != count:
            raise WrongFormatError(f"broken video: {done} of {count} frames came")
        return Patches(rows, grid, step / shape.fps)

    def _plan_frame(self, frame: Frame, plan: ResizePlan, options: PreprocessOptions) -> ResizePlan:
        """To the size of all, for a frame that may come in another than the clip's header says."""
        height, width, _ = frame.shape
        box = crop_pixels(height, width, options.crop)
        return ResizePlan.of(box, plan.height, plan.width, self.image.resize_rule)


def chosen_frames(data: bytes, limits: ClipLimits, rule: VideoRule, options: PreprocessOptions) -> Iterator[Frame]:
    """The frames of a file that `rule` and `options` choose. Raises `WrongFormatError` and `NotSupportedError`."""
    with open_clip(data, limits) as clip:
        yield from clip.read(rule.choose_frames(clip.frames, clip.fps, options))


def open_clip(data: bytes, limits: ClipLimits) -> OpenClip:
    """A video's file or an animation's. Raises `WrongFormatError` and `NotSupportedError`."""
    match sniff(data):
        case MMUrlType.IMAGE:
            return open_animation(data, limits)
        case MMUrlType.AUDIO:
            raise NotSupportedError("expected a video, got audio")
        case _:
            return open_video(data, limits)
