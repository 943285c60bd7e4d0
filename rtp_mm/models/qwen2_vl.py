"""Qwen2-VL (2B, 7B, 72B): full attention per frame, LayerNorm, quick GELU.

Source: arXiv 2409.12191 and the published checkpoints' `config.json`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtp_mm.config import Settings, load_settings
from rtp_mm.errors import StartError
from rtp_mm.models.device_preprocessor import DevicePreprocessor
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.multimodal_common import Embedding
from rtp_mm.models.multimodal_mixin import MultimodalMixin, TowerWeights
from rtp_mm.models.registry import register_model
from rtp_mm.models.tower_embedding import TowerEmbedding
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import DevicePatches, MMPreprocessConfig, MMUrlType, Patches
from rtp_mm.vit.packing import to_device
from rtp_mm.vit.tower import TowerConfig, VisionTower
from rtp_mm.vit.tower_base import TowerOptions

# The published preprocessor_config.json: 4 to 16384 tokens of 28 x 28 pixels. Hugging Face's class default for the
# upper limit is 1280 tokens, so that a checkpoint without the file would silently shrink images.
PUBLISHED_PROCESSOR = ImageProcessorConfig(
    patch_size=14,
    merge_size=2,
    temporal_patch_size=2,
    min_pixels=4 * 28 * 28,
    max_pixels=16384 * 28 * 28,
    image_mean=(0.48145466, 0.4578275, 0.40821073),
    image_std=(0.26862954, 0.26130258, 0.27577711),
)


class Qwen2VLEmbedding(TowerEmbedding):
    """`mm_part` of the Qwen2-VL line: images and clips to [tokens, out_hidden_size] and (t, h, w) position ids."""

    tower: VisionTower

    def __init__(self, config: GptInitModelParameters, tower: TowerConfig) -> None:
        super().__init__(config)
        settings: Settings = config.settings or load_settings()
        device = torch.get_default_device()
        self.processor = ImageProcessorConfig.from_checkpoint(Path(config.ckpt_path), PUBLISHED_PROCESSOR)
        self.processor.check(tower.patch_size, tower.spatial_merge_size, tower.temporal_patch_size)
        self.preprocessor = MediaPreprocessor.from_checkpoint(Path(config.ckpt_path), self.processor, settings)
        self.tower = VisionTower(tower, self._data_type, device, TowerOptions.of(settings))
        self.device_preprocessor = DevicePreprocessor.for_device(self.preprocessor, device, settings)
        self._leave_to_subclass()
        self._tokens_per_second = self._time_scale(config) if settings.mm_pos_t == "scaled" else None

    @property
    def answer_key(self) -> tuple[object, ...]:
        return *super().answer_key, self._tokens_per_second

    def mm_process(self, mm_input: Patches | DevicePatches, **kwargs: Any) -> Embedding:
        [answer] = self._embed([mm_input])
        return answer

    def mm_process_batch(
        self,
        mm_inputs: Sequence[Patches | DevicePatches],
        mm_types: Sequence[MMUrlType],
        configs: Sequence[MMPreprocessConfig],
    ) -> list[Tensor | Embedding]:
        if self._is_by_item:
            return super().mm_process_batch(mm_inputs, mm_types, configs)
        return [*self._embed(mm_inputs)]

    def _embed(self, items: Sequence[Patches | DevicePatches]) -> list[Embedding]:
        answers = self.tower(items)
        if self._tokens_per_second is None:
            return answers  # type: ignore[no-any-return]
        return [
            (embedding, _in_time(ids, item, self._tokens_per_second))
            for item, (embedding, ids) in zip(items, answers, strict=True)
        ]

    @staticmethod
    def _time_scale(config: GptInitModelParameters) -> float:
        """Steps of t in a second, for MM_POS_T=scaled. Raises `StartError` for a model that counts none."""
        scale = config.mm_related_params.config.get("tokens_per_second")
        if not isinstance(scale, int | float) or scale <= 0:
            raise StartError(f"MM_POS_T=scaled: this model's tokens_per_second is {scale!r}, it counts t by index")
        return float(scale)


def _in_time(ids: Tensor, item: Patches | DevicePatches, tokens_per_second: float) -> Tensor:
    """[tokens, 3] ids of a clip with t by the clock: floor(t * tokens_per_second * seconds_per_grid), in float32 as
    `get_rope_index` of transformers 5.23. A still stays as it is.
    """
    if item.seconds_per_grid is None:
        return ids
    interval = np.float32(tokens_per_second * item.seconds_per_grid)
    times = (np.arange(item.grid_thw[0], dtype=np.float32) * interval).astype(np.int32)
    by_index = to_device(torch.from_numpy(times), ids.device)
    return torch.cat((by_index[ids[:, :1].long()], ids[:, 1:]), dim=1)


class Qwen2VL(MultimodalMixin):
    """Also the base of later members of the line, which say only how their tower differs."""

    mm_part: Qwen2VLEmbedding

    @staticmethod
    def tower_config(vision: dict[str, Any]) -> TowerConfig:
        """`vision_config` to a tower. Re-saved files drop values that equal the class defaults given here."""
        width = vision.get("embed_dim", 1280)  # `hidden_size` is the language model's width in this family
        return TowerConfig(
            depth=vision.get("depth", 32),
            hidden_size=width,
            num_heads=vision.get("num_heads", 16),
            intermediate_size=int(width * vision.get("mlp_ratio", 4)),
            out_hidden_size=vision.get("hidden_size", 3584),
            patch_size=vision.get("patch_size", 14),
            spatial_merge_size=vision.get("spatial_merge_size", 2),
            temporal_patch_size=vision.get("temporal_patch_size", 2),
            in_channels=vision.get("in_channels", 3),
            norm="layer",
            activation=vision.get("hidden_act", "quick_gelu"),
            is_gated=False,
        )

    def _init_multimodal(self, config: GptInitModelParameters) -> None:
        self.mm_part = Qwen2VLEmbedding(config, self.tower_config(config.mm_related_params.config))
        config.mm_related_params.vit_weights = TowerWeights(self.mm_part.tower)

    def on_weights_loaded(self) -> None:
        """Folds the processor's normalisation into the tower, and sees that an image comes out of it, as wide as the
        language model is, where the file says that.
        """
        tower, processor = self.mm_part.tower, self.mm_part.processor
        width, language = tower.config.out_hidden_size, self.config.hidden_size
        if language and width != language:
            raise StartError(
                f"the checkpoint disagrees with itself on the width of embeddings: {width} of its tower "
                f"(merger.mlp.2), {language} of its language model (hidden_size)"
            )
        tower.finish_loading(processor.image_mean, processor.image_std)
        side = processor.merge_size
        grey = np.full((side**2, 3 * processor.patch_size**2), 128, np.uint8)
        [(embedding, _)] = tower([Patches(grey, (1, side, side))])
        if not torch.isfinite(embedding).all():
            raise StartError(f"the tower in {self.config.ckpt_path} makes NaN or infinite values of a grey image")


register_model("qwen2_vl", Qwen2VL, ["Qwen2VLForConditionalGeneration"])
