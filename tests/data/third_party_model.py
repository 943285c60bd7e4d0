"""A third party's model, written against RTP-LLM's documented interface alone: every channel's mean in each quarter
of the image, times a weight from the checkpoint.
"""

from io import BytesIO

import numpy as np
import torch
from PIL import Image
from rtp_llm.config.gpt_init_model_parameters import GptInitModelParameters
from rtp_llm.model_factory_register import register_model
from rtp_llm.models.multimodal.multimodal_common import ImageEmbeddingInterface
from rtp_llm.models.multimodal.multimodal_mixin import BaseVitWeights, MultiModalMixin
from rtp_llm.utils.multimodal_util import MMPreprocessConfig, MMUrlType


class QuarterMeans(ImageEmbeddingInterface):
    def __init__(self, config):
        self.config = config
        self.scale = torch.nn.Linear(3, 4)

    def _mm_preprocess(self, data, **kwargs):
        assert isinstance(data, BytesIO)
        assert isinstance(kwargs["configs"], MMPreprocessConfig)
        assert kwargs["configs"].fps == -1
        assert isinstance(kwargs["mm_type"], MMUrlType)
        return Image.open(data).convert("RGB").resize((2, 2), Image.Resampling.BOX)

    @torch.inference_mode()
    def image_embedding(self, images):
        pixels = [torch.tensor(np.array(image), dtype=self.scale.weight.dtype).view(-1, 3) for image in images]
        return [self.scale(p) for p in pixels]


class QuarterMeansWeights(BaseVitWeights):
    def _set_weight_prefix(self):
        self._ckpt_prefix = "vision."
        self._ft_prefix = "self.mm_part.scale."


class QuarterMeansModel(MultiModalMixin):
    def _init_multimodal(self, config):
        self.mm_part = QuarterMeans(config)
        config.mm_related_params.vit_weights = QuarterMeansWeights({"scale": self.mm_part.scale})

    @classmethod
    def _create_config(cls, ckpt_path):
        config = GptInitModelParameters(head_num=0, size_per_head=0, layer_num=0, max_seq_len=8192, vocab_size=1000)
        config.ckpt_path = ckpt_path
        return config


register_model("quarter_means", QuarterMeansModel, ["QuarterMeansForConditionalGeneration"])
