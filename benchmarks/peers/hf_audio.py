"""The peer for sounds: Hugging Face's feature extractor, encoder and projector on the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder, Qwen2AudioMultiModalProjector


class HuggingFaceAudio:
    """Embeds samples as `Qwen2AudioModel.forward` does, with SDPA."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        config = AutoConfig.from_pretrained(folder)
        self.extractor: Any = WhisperFeatureExtractor.from_pretrained(folder)
        self.encoder = Qwen2AudioEncoder._from_config(config.audio_config, dtype=dtype).eval()
        self.projector = Qwen2AudioMultiModalProjector(config).to(dtype).eval()
        tensors = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for prefix, module in (("audio_tower.", self.encoder), ("multi_modal_projector.", self.projector)):
            own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            module.load_state_dict(own, strict=True)

    def features(self, samples: NDArray[np.float32]) -> tuple[Tensor, Tensor]:
        """[1, bins, 3000] and their mask [1, 3000]."""
        out = self.extractor(samples, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
        return out["input_features"], out["attention_mask"]

    @torch.inference_mode()
    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """[tokens, out_hidden]."""
        steps, tokens = self.encoder._get_feat_extract_output_lengths(mask.sum(-1))
        is_valid = torch.arange(features.shape[-1] // 2)[None] < steps[:, None]
        embeds = torch.zeros(1, is_valid.shape[1], 1, dtype=self.encoder.dtype)
        attention = create_bidirectional_mask(
            config=self.encoder.config, inputs_embeds=embeds, attention_mask=is_valid.long()
        )
        hidden = self.encoder(features, attention_mask=attention).last_hidden_state
        embedding: Tensor = self.projector(hidden)[0, : int(tokens)]
        return embedding

    def embed(self, samples: NDArray[np.float32]) -> Tensor:
        return self.forward(*self.features(samples))
