"""The peer on arrays: Hugging Face's processor and tower on the same checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rtp_mm.cli.hugging_face import HuggingFacePeer


class HuggingFace(HuggingFacePeer):
    """Embeds RGB arrays as a transformers user would, with SDPA."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(folder, dtype, torch.device("cpu"))

    def pixels(self, image: NDArray[np.uint8], **overrides: Any) -> tuple[Tensor, Tensor]:
        """[N, 1176] float32 pixel values and [1, 3] grid."""
        features = self.processor(images=[Image.fromarray(image)], return_tensors="pt", **overrides)
        return features["pixel_values"], features["image_grid_thw"]

    def embed(self, image: NDArray[np.uint8]) -> Tensor:
        """[tokens, out_hidden]."""
        values, grid = self.pixels(image)
        return self.forward({"pixel_values": values, "image_grid_thw": grid})


def relative_l2(ours: Tensor, reference: Tensor) -> float:
    """|ours - reference| / |reference|, both in float64 on the host."""
    ours, reference = ours.cpu().double(), reference.cpu().double()
    return float((ours - reference).norm() / reference.norm())
