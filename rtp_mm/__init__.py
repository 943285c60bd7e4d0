"""URL in, embeddings out: the multimodal part of an LLM, deployed on its own.

Public names are imported when they are first asked for, so that a process which only preprocesses never imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from rtp_mm.engine.process_engine import MMProcessEngine
    from rtp_mm.library import create_engine
    from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
    from rtp_mm.models.multimodal_common import (
        AudioEmbeddingInterface,
        ImageEmbeddingInterface,
        MultiModalEmbeddingInterface,
        VideoEmbeddingInterface,
    )
    from rtp_mm.models.multimodal_mixin import BaseVitWeights, MultiModalMixin, MultimodalMixin
    from rtp_mm.models.registry import register_model
    from rtp_mm.server.client import RemoteEngine
    from rtp_mm.server.tensors import trans_from_tensor, trans_tensor
    from rtp_mm.types import MMEmbeddingRes, MMPreprocessConfig, MMUrlType, MultimodalInput

_HOMES = {
    "AudioEmbeddingInterface": "rtp_mm.models.multimodal_common",
    "BaseVitWeights": "rtp_mm.models.multimodal_mixin",
    "GptInitModelParameters": "rtp_mm.models.gpt_init_model_parameters",
    "ImageEmbeddingInterface": "rtp_mm.models.multimodal_common",
    "MMEmbeddingRes": "rtp_mm.types",
    "MMPreprocessConfig": "rtp_mm.types",
    "MMProcessEngine": "rtp_mm.engine.process_engine",
    "MMUrlType": "rtp_mm.types",
    "MultiModalEmbeddingInterface": "rtp_mm.models.multimodal_common",
    "MultiModalMixin": "rtp_mm.models.multimodal_mixin",
    "MultimodalInput": "rtp_mm.types",
    "MultimodalMixin": "rtp_mm.models.multimodal_mixin",
    "RemoteEngine": "rtp_mm.server.client",
    "VideoEmbeddingInterface": "rtp_mm.models.multimodal_common",
    "create_engine": "rtp_mm.library",
    "register_model": "rtp_mm.models.registry",
    "trans_from_tensor": "rtp_mm.server.tensors",
    "trans_tensor": "rtp_mm.server.tensors",
}

__all__ = [
    "AudioEmbeddingInterface",
    "BaseVitWeights",
    "GptInitModelParameters",
    "ImageEmbeddingInterface",
    "MMEmbeddingRes",
    "MMPreprocessConfig",
    "MMProcessEngine",
    "MMUrlType",
    "MultiModalEmbeddingInterface",
    "MultiModalMixin",
    "MultimodalInput",
    "MultimodalMixin",
    "RemoteEngine",
    "VideoEmbeddingInterface",
    "__version__",
    "create_engine",
    "register_model",
    "trans_from_tensor",
    "trans_tensor",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__]
