"""Qwen2-Audio (7B, 7B-Instruct): sound of up to 30 s to a token for every 40 ms, with plain positions.

Source: arXiv 2407.10759 and the published checkpoints' `config.json`.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rtp_mm.config import Settings, load_settings
from rtp_mm.errors import StartError
from rtp_mm.logs import log_event
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters, config_object, read_json
from rtp_mm.models.multimodal_common import Embedding
from rtp_mm.models.multimodal_mixin import MultimodalMixin, TowerWeights
from rtp_mm.models.registry import register_model
from rtp_mm.models.tower_embedding import TowerEmbedding
from rtp_mm.preprocess.audio import MIN_STEPS, AudioPreprocessor
from rtp_mm.preprocess.audio_config import mel_rule
from rtp_mm.preprocess.log_mel import MelRule
from rtp_mm.types import LogMel, MMPreprocessConfig, MMUrlType
from rtp_mm.vit.audio_tower import AudioTower, AudioTowerConfig
from rtp_mm.vit.tower_base import TowerOptions

_log = logging.getLogger(__name__)

FAMILY = "qwen2_audio"
# The published preprocessor_config.json.
PUBLISHED_RULE = MelRule(bins=128, rate=16000, hop=160, window=400, seconds=30)


class Qwen2AudioEmbedding(TowerEmbedding):
    """`mm_part` of Qwen2-Audio: sound to [tokens, out_hidden_size], without position ids."""

    tower: AudioTower

    def __init__(self, config: GptInitModelParameters, tower: AudioTowerConfig) -> None:
        super().__init__(config)
        settings: Settings = config.settings or load_settings()
        rule = mel_rule(Path(config.ckpt_path), PUBLISHED_RULE)
        if (rule.bins, rule.max_frames) != (tower.num_mel_bins, 2 * tower.max_source_positions):
            raise StartError(
                f"the checkpoint disagrees with itself on (mel bins, frames): ({tower.num_mel_bins}, "
                f"{2 * tower.max_source_positions}) in its config.json, ({rule.bins}, {rule.max_frames}) for its sounds"
            )
        self.preprocessor = AudioPreprocessor(rule)
        self._leave_to_subclass()
        if importlib.util.find_spec("av") is None:
            log_event(
                _log, "no PyAV: sounds are refused, tensors are not; pip install 'rtp_mm[media]'", logging.WARNING
            )
        self.tower = AudioTower(tower, self._data_type, torch.get_default_device(), TowerOptions.of(settings))

    def mm_process(self, mm_input: LogMel, **kwargs: Any) -> Tensor:
        return self.tower([mm_input])[0]  # type: ignore[no-any-return]

    def mm_process_batch(
        self, mm_inputs: Sequence[LogMel], mm_types: Sequence[MMUrlType], configs: Sequence[MMPreprocessConfig]
    ) -> list[Tensor | Embedding]:
        if self._is_by_item:
            return super().mm_process_batch(mm_inputs, mm_types, configs)
        return self.tower(mm_inputs)  # type: ignore[no-any-return]

    def patches(self, mm_input: Any) -> int | None:
        """Steps, which are rows of the tower as patches are; `None` for what a subclass made."""
        return mm_input.steps if isinstance(mm_input, LogMel) else None


class Qwen2Audio(MultimodalMixin):
    mm_part: Qwen2AudioEmbedding

    @classmethod
    def _create_config(cls, ckpt_path: str) -> GptInitModelParameters:
        """The language model's width may be left to the class default, the published 4096."""
        config = GptInitModelParameters.from_checkpoint(ckpt_path)
        config.hidden_size = config.hidden_size or 4096
        config.mm_related_params.config |= config_object(read_json(Path(ckpt_path) / "config.json"), "audio_config")
        return config

    @staticmethod
    def tower_config(audio: dict[str, Any], out_hidden_size: int) -> AudioTowerConfig:
        """`audio_config` to a tower. Re-saved files drop values that equal the class defaults given here."""
        if audio.get("scale_embedding"):
            raise StartError("audio_config: scale_embedding=true is not supported")
        return AudioTowerConfig(
            num_mel_bins=audio.get("num_mel_bins", 128),
            d_model=audio.get("d_model", 1280),
            encoder_layers=audio.get("encoder_layers", 32),
            encoder_attention_heads=audio.get("encoder_attention_heads", 20),
            encoder_ffn_dim=audio.get("encoder_ffn_dim", 5120),
            max_source_positions=audio.get("max_source_positions", 1500),
            activation_function=audio.get("activation_function", "gelu"),
            out_hidden_size=out_hidden_size,
        )

    def _init_multimodal(self, config: GptInitModelParameters) -> None:
        tower = self.tower_config(config.mm_related_params.config, config.hidden_size)
        self.mm_part = Qwen2AudioEmbedding(config, tower)
        config.mm_related_params.vit_weights = TowerWeights(
            self.mm_part.tower, prefix="", owned=("audio_tower.", "multi_modal_projector.")
        )

    def on_weights_loaded(self) -> None:
        """Packs the tower, and sees that a silence comes out of it."""
        tower = self.mm_part.tower
        tower.finish_loading()
        silence = np.zeros((2 * MIN_STEPS + 2, tower.config.num_mel_bins), np.float32)
        [embedding] = tower([LogMel(silence)])
        if not torch.isfinite(embedding).all():
            raise StartError(f"the tower in {self.config.ckpt_path} makes NaN or infinite values of silence")


register_model(FAMILY, Qwen2Audio, ["Qwen2AudioForConditionalGeneration"])
register_model("qwen_v2_audio", Qwen2Audio)  # RTP-LLM's name for it
