"""One preprocessor for all that a model takes: the modality is the request's, else what the bytes tell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rtp_mm.errors import NotSupportedError
from rtp_mm.media.sniff import sniff
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.patches import ImagePreprocessor, new_rows
from rtp_mm.preprocess.video import VideoPreprocessor
from rtp_mm.types import Blob, Layout, MMUrlType, Patches, PreprocessOptions, RowAllocator

if TYPE_CHECKING:
    from rtp_mm.config import Settings


def file_kind(data: bytes, asked: MMUrlType) -> MMUrlType:
    """What a file is taken for: what the request says, else what the bytes tell."""
    return (sniff(data) or MMUrlType.IMAGE) if asked is MMUrlType.DEFAULT else asked


@dataclass(frozen=True, slots=True)
class MediaPreprocessor:
    """Stills and clips. Picklable, for worker processes."""

    image: ImagePreprocessor
    video: VideoPreprocessor

    @classmethod
    def from_checkpoint(cls, folder: Path, config: ImageProcessorConfig, settings: Settings) -> MediaPreprocessor:
        """`config` is the checkpoint's for images. Raises `StartError` for what the folder says of videos."""
        image = ImagePreprocessor.from_config(config, settings)
        return cls(image, VideoPreprocessor.from_checkpoint(folder, config, image, settings))

    def bounded(self, max_patches: int) -> MediaPreprocessor:
        """The same, that refuses a clip of more patches before it decodes its frames."""
        return replace(self, video=replace(self.video, max_patches=max_patches))

    @property
    def cache_key(self) -> tuple[object, ...]:
        return (*self.image.cache_key, *self.video.cache_key)

    @property
    def row_bytes(self) -> int:
        """Of one patch of a still image."""
        return self.image.row_bytes

    @property
    def merge_size(self) -> int:
        return self.image.merge_size

    def predict(self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions) -> Layout | None:
        """How an item's rows will lie, known before it is decoded; `None` where that takes a decoder's library. Raises
        `WrongFormatError` and `NotSupportedError`.
        """
        return self._own(blob, mm_type).predict(blob, mm_type, options)

    def is_possible(self, layout: Layout, blob: Blob, mm_type: MMUrlType) -> bool:
        """Whether an item's rows may lie so. Raises `NotSupportedError`."""
        return self._own(blob, mm_type).is_possible(layout, blob, mm_type)

    def __call__(
        self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, allocate: RowAllocator = new_rows
    ) -> Patches:
        """Raises `WrongFormatError` and `NotSupportedError`."""
        return self._own(blob, mm_type)(blob, mm_type, options, allocate)

    def _own(self, blob: Blob, mm_type: MMUrlType) -> ImagePreprocessor | VideoPreprocessor:
        """Of the item's modality. Raises `NotSupportedError`."""
        if isinstance(blob.data, np.ndarray):
            if blob.data.ndim != 4:
                raise NotSupportedError(f"this model takes images and videos, the tensor is {list(blob.data.shape)}")
            kind = MMUrlType.IMAGE if len(blob.data) == 1 else MMUrlType.VIDEO
        else:
            kind = file_kind(blob.data, mm_type)
        if kind not in (MMUrlType.IMAGE, MMUrlType.VIDEO):
            raise NotSupportedError(f"this model takes images and videos, not {kind.name.lower()}")
        return self.image if kind is MMUrlType.IMAGE else self.video
