"""The peer that `compare` measures sounds against: Hugging Face's feature extractor, encoder and projector."""

from __future__ import annotations

import io
import wave
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig, WhisperFeatureExtractor
from transformers.masking_utils import create_bidirectional_mask
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder, Qwen2AudioMultiModalProjector

from rtp_mm.cli.hugging_face import ANY, exact_convolutions
from rtp_mm.errors import StartError
from rtp_mm.media.audio import decode_audio
from rtp_mm.types import MMUrlType, PreprocessOptions
from rtp_mm.vit.checkpoint import Checkpoint


class HuggingFaceAudioPeer:
    """Embeds one sound as `Qwen2AudioModel.forward` does, with SDPA; of a checkpoint's weights, those two modules'."""

    mm_type: ClassVar = MMUrlType.AUDIO

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        """Raises `StartError` where a tensor is missing."""
        config = AutoConfig.from_pretrained(folder)
        self.extractor: Any = WhisperFeatureExtractor.from_pretrained(folder)
        encoder: Any = Qwen2AudioEncoder
        self.encoder = encoder._from_config(config.audio_config, dtype=dtype).eval()
        self.projector: Any = Qwen2AudioMultiModalProjector(config).to(dtype).eval()
        weights = Checkpoint(folder)
        for prefix, module in (("audio_tower.", self.encoder), ("multi_modal_projector.", self.projector)):
            names = {name.removeprefix("model.").removeprefix(prefix): name for name in weights.names if prefix in name}
            if missing := module.state_dict().keys() - names.keys():
                raise StartError(f"{folder} lacks {', '.join(sorted(prefix + name for name in missing))}")
            module.load_state_dict({own: weights.tensor(name) for own, name in names.items()}, strict=True)
            module.to(device)

    @staticmethod
    def warm_up_file() -> bytes:
        """A tenth of a second of silence."""
        file = io.BytesIO()
        with wave.open(file, "wb") as out:
            out.setparams((1, 2, 16000, 0, "NONE", ""))
            out.writeframes(bytes(3200))
        return file.getvalue()

    def preprocess(self, data: bytes, options: PreprocessOptions = ANY) -> Any:
        """A file's samples, decoded and resampled as ours are, to `features`; no option is for sounds.

        Raises `MMError`.
        """
        rule = self.extractor
        return self.features(decode_audio(data, rate=rule.sampling_rate, max_samples=rule.n_samples).samples)

    def features(self, samples: NDArray[np.float32]) -> Any:
        """`input_features` [1, bins, 3000] and their `attention_mask` [1, 3000]."""
        rate = self.extractor.sampling_rate
        return self.extractor(samples, sampling_rate=rate, return_tensors="pt", return_attention_mask=True)

    def describe(self, inputs: Any) -> str:
        """Log-mel frames, without what pads them to 30 s."""
        return f"{int(inputs['attention_mask'].sum())} log-mel frames"

    @torch.inference_mode()
    def forward(self, inputs: Any) -> Tensor:
        """[tokens, out_hidden] on the host."""
        device = self.encoder.device
        features, mask = inputs["input_features"].to(device), inputs["attention_mask"].to(device)
        steps, tokens = self.encoder._get_feat_extract_output_lengths(mask.sum(-1))
        is_valid = torch.arange(features.shape[-1] // 2, device=device)[None] < steps[:, None]
        embeds = torch.zeros(1, is_valid.shape[1], 1, dtype=self.encoder.dtype, device=device)
        attention = create_bidirectional_mask(
            config=self.encoder.config, inputs_embeds=embeds, attention_mask=is_valid.long()
        )
        with exact_convolutions():
            hidden = self.encoder(features, attention_mask=attention).last_hidden_state
        embedding: Tensor = self.projector(hidden)[0, : int(tokens)]
        return embedding.cpu()

    def embed(self, samples: NDArray[np.float32]) -> Tensor:
        return self.forward(self.features(samples))
