"""transformers' own rules for videos, where torchvision is not installed: they ask for it only to resize pixels."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils import is_torchvision_available

_MODULE = "transformers.models.qwen2_vl.video_processing_qwen2_vl"
_TORCHVISION = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2")


@cache
def video_processing() -> Any:
    """The module with `Qwen2VLVideoProcessor` and `smart_resize`."""
    if is_torchvision_available():  # which is asked once, so before anything stands in for it
        return importlib.import_module(_MODULE)
    empty = {name: ModuleType(name) for name in (*_TORCHVISION, "torchvision.transforms.v2.functional")}
    for name in _TORCHVISION:
        child = next(each for each in empty if each.rpartition(".")[0] == name)
        setattr(empty[name], child.rpartition(".")[2], empty[child])
    sys.modules.update(empty)
    try:
        return importlib.import_module(_MODULE)
    finally:
        for name in empty:
            del sys.modules[name]


class VideoProcessor:
    """`Qwen2VLVideoProcessor` of a checkpoint, as far as it decides on frames and their size."""

    def __init__(self, folder: Path) -> None:
        self._processor = video_processing().Qwen2VLVideoProcessor.from_pretrained(folder)

    def frames(self, total: int, rate: Fraction | float, **asked: Any) -> list[int]:
        """What it takes of a clip, as its `preprocess` asks: what a call leaves out is the checkpoint's."""
        names = ("temporal_patch_size", "min_frames", "max_frames", "num_frames", "fps")
        own = {name: getattr(self._processor, name) for name in names}
        clip = SimpleNamespace(total_num_frames=total, fps=float(rate))
        indices: Sequence[int] = self._processor.sample_frames(clip, **own | asked).tolist()
        return list(indices)

    def size(self, height: int, width: int, frames: int) -> tuple[int, int]:
        """(height, width) that it has frames resized to."""
        asked: list[Any] = []
        owner = video_processing().BaseVideoProcessor
        with patch.object(owner, "resize", lambda self, image, size, resample: asked.append(size)):
            self._processor.resize(
                torch.empty(1, frames, 3, height, width, device="meta"),
                self._processor.size,
                self._processor.resample,
                factor=self._processor.patch_size * self._processor.merge_size,
                temporal_factor=self._processor.temporal_patch_size,
                cap_pixels_per_frame=self._processor.cap_pixels_per_frame,
            )
        return asked[0].height, asked[0].width
