"""The peer: Hugging Face's processor and tower on the same checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
    Qwen2_5_VLVisionConfig,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig

TOWERS: dict[str, tuple[Any, Any]] = {
    "qwen2_vl": (Qwen2VisionTransformerPretrainedModel, Qwen2VLVisionConfig),
    "qwen2_5_vl": (Qwen2_5_VisionTransformerPretrainedModel, Qwen2_5_VLVisionConfig),
}


class HuggingFace:
    """Embeds RGB arrays as a transformers user would, with SDPA."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        config = json.loads((folder / "config.json").read_text())
        tower, tower_config = TOWERS[config["model_type"]]
        vision = tower_config(**config["vision_config"])
        vision._attn_implementation = "sdpa"
        with torch.device("meta"):
            self.tower = tower(vision)
        state = {
            name[name.index("visual.") + len("visual.") :]: tensor.to(dtype)
            for file in sorted(folder.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
            if "visual." in name
        }
        self.tower.load_state_dict(state, strict=True, assign=True)
        # Not in the checkpoint, and left on the meta device by assign.
        self.tower.rotary_pos_emb = type(self.tower.rotary_pos_emb)(vision)
        self.tower.eval()
        self.dtype = dtype
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)

    def pixels(self, image: NDArray[np.uint8], **overrides: Any) -> tuple[Tensor, Tensor]:
        """[N, 1176] float32 pixel values and [1, 3] grid."""
        features = self.processor(images=[Image.fromarray(image)], return_tensors="pt", **overrides)
        return features["pixel_values"], features["image_grid_thw"]

    @torch.inference_mode()
    def embed(self, image: NDArray[np.uint8]) -> Tensor:
        """[tokens, out_hidden]."""
        values, grid = self.pixels(image)
        return self.tower(values.to(self.dtype), grid_thw=grid).pooler_output  # type: ignore[no-any-return]


def relative_l2(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, both in float64."""
    difference = ours.double() - reference.double()
    return float(difference.norm() / reference.double().norm())
