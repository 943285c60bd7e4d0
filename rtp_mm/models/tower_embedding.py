"""`mm_part` around a tower of our own: what follows from the tower alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface, Preprocessor
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import Blob, MMPreprocessConfig, MMUrlType
from rtp_mm.vit.tower_base import Tower


class TowerEmbedding(MultiModalEmbeddingInterface):
    """Prepares by `preprocessor` and batches, unless a subclass defines a step of its own: then that is taken."""

    tower: Tower
    _family_preprocessor: Preprocessor | None = None

    def _mm_preprocess(self, data: Any, **kwargs: Any) -> Any:
        """What the family's preprocessor makes of a file's `BytesIO` or of a tensor, for who asks by this name."""
        blob = Blob(data.numpy() if isinstance(data, Tensor) else data.read(), b"", "")
        configs: MMPreprocessConfig = kwargs.get("configs") or MMPreprocessConfig()
        assert self._family_preprocessor is not None
        return self._family_preprocessor(blob, kwargs.get("mm_type", MMUrlType.DEFAULT), configs.options())

    def _leave_to_subclass(self) -> None:
        """Once the preprocessors are made: none where a subclass has a `_mm_preprocess`, which is called instead."""
        self._family_preprocessor = self.preprocessor
        if type(self)._mm_preprocess is not TowerEmbedding._mm_preprocess:
            self.preprocessor = self.device_preprocessor = None

    def bound_clips(self, max_patches: int) -> None:
        super().bound_clips(max_patches)
        if isinstance(self._family_preprocessor, MediaPreprocessor):  # which a subclass's own step may call
            self._family_preprocessor = self._family_preprocessor.bounded(max_patches)

    @property
    def _is_by_item(self) -> bool:
        """Whether a subclass has a `mm_process`, below the `mm_process_batch` that knows nothing of it."""
        classes = type(self).__mro__
        one, batch = (
            next(i for i, cls in enumerate(classes) if step in vars(cls)) for step in ("mm_process", "mm_process_batch")
        )
        return one < batch

    @property
    def _device(self) -> torch.device:
        return self.tower.device

    @property
    def is_reentrant(self) -> bool:
        return self.tower.is_reentrant and not self._is_by_item

    @property
    def quantization(self) -> str:
        return self.tower.options.quantization

    @property
    def products(self) -> str:
        return self.tower.products

    @property
    def answer_key(self) -> tuple[object, ...]:
        return self.tower.attention_backend, self.tower.options

    def call_between_steps(self, callback: Callable[[], None]) -> None:
        self.tower.between_blocks = callback
