"""`mm_part` around a tower of our own: what follows from the tower alone."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.vit.tower_base import Tower


class TowerEmbedding(MultiModalEmbeddingInterface):
    tower: Tower

    @property
    def _device(self) -> torch.device:
        return self.tower.device

    @property
    def is_reentrant(self) -> bool:
        return self.tower.is_reentrant

    @property
    def quantization(self) -> str:
        return self.tower.options.quantization

    @property
    def answer_key(self) -> tuple[object, ...]:
        return self.tower.attention_backend, self.tower.options

    def call_between_steps(self, callback: Callable[[], None]) -> None:
        self.tower.between_blocks = callback
