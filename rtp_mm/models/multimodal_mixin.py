"""RTP-LLM's mixin: a model inherits `MultimodalMixin`, instantiates `self.mm_part` and names its weights."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import nn

from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.multimodal_common import ACT_DTYPES, MultiModalEmbeddingInterface
from rtp_mm.vit.checkpoint import Checkpoint
from rtp_mm.vit.tower_base import Tower
from rtp_mm.vit.weights import WeightPlan, load_weights, weights_fingerprint


class BaseVitWeights:
    """Names of the weights of a multimodal part.

    `vit_part` maps names to modules or parameters. With one part its weights are named as in its `state_dict`; with
    several, or `with_prefix`, each name begins with its part's. In the checkpoint a weight stands at
    `ckpt_prefix + name`, in the model at `ft_prefix + name`; subclasses set both in `_set_weight_prefix`.
    """

    def __init__(self, vit_part: Mapping[str, nn.Module | nn.Parameter], with_prefix: bool = False) -> None:
        self.weight_names: list[str] = []
        self._set_weight_prefix()
        self._get_vit_params(vit_part, with_prefix)

    def _set_weight_prefix(self) -> None:
        self._ckpt_prefix = "model."
        self._ft_prefix = "self.mm_part."

    @property
    def ckpt_prefix(self) -> str:
        return self._ckpt_prefix

    @property
    def ft_prefix(self) -> str:
        return self._ft_prefix

    @ft_prefix.setter
    def ft_prefix(self, prefix: str) -> None:
        self._ft_prefix = prefix

    def _get_vit_params(self, vit_part: Mapping[str, nn.Module | nn.Parameter], with_prefix: bool = False) -> None:
        for part_name, part in vit_part.items():
            if isinstance(part, nn.Parameter):
                self.weight_names.append(part_name)
            elif isinstance(part, nn.Module):
                prefix = f"{part_name}." if with_prefix or len(vit_part) > 1 else ""
                self.weight_names.extend(prefix + name for name in part.state_dict())
            else:
                raise TypeError(f"vit_part[{part_name!r}] must be a Module or a Parameter, got {type(part).__name__}")

    def plan(self) -> WeightPlan:
        """Where in the model each weight goes."""
        root = self._ft_prefix.removeprefix("self.")
        return WeightPlan({root + name: (name,) for name in self.weight_names}, self._ckpt_prefix)


class TowerWeights(BaseVitWeights):
    """Weights of our own tower at `self.mm_part.tower`, some of them fused; `owned` as in `WeightPlan`."""

    def __init__(self, tower: Tower, *, prefix: str = "visual.", owned: tuple[str, ...] = ("",)) -> None:
        self._sources = tower.checkpoint_names()
        self._owned = owned
        self._prefix = prefix
        super().__init__({})

    def _set_weight_prefix(self) -> None:
        self._ckpt_prefix, self._ft_prefix = self._prefix, "self.mm_part.tower."

    def _get_vit_params(self, vit_part: Mapping[str, nn.Module | nn.Parameter], with_prefix: bool = False) -> None:
        self.weight_names = [name for sources in self._sources.values() for name in sources]

    def plan(self) -> WeightPlan:
        root = self._ft_prefix.removeprefix("self.")
        return WeightPlan({root + path: names for path, names in self._sources.items()}, self._ckpt_prefix, self._owned)


class MultimodalMixin:
    """A model with a multimodal part.

    `weights_fingerprint` stands in every embedding's cache key.
    """

    mm_part: MultiModalEmbeddingInterface
    weights_fingerprint: str = ""

    def __init__(self, config: GptInitModelParameters) -> None:
        self.config = config

    @classmethod
    def _create_config(cls, ckpt_path: str) -> GptInitModelParameters:
        """The model's parameters; by default what `config.json` says."""
        return GptInitModelParameters.from_checkpoint(ckpt_path)

    def _init_multimodal(self, config: GptInitModelParameters) -> None:
        """Sets `self.mm_part` and `config.mm_related_params.vit_weights`."""
        raise NotImplementedError(f"{type(self).__name__} must define _init_multimodal")

    def init_multimodal(self, config: GptInitModelParameters, device: torch.device | str) -> None:
        """Builds `mm_part` with `device` and the model's dtype as defaults."""
        default_dtype = torch.get_default_dtype()
        torch.set_default_dtype(ACT_DTYPES[config.data_type])
        try:
            with torch.device(device):
                self._init_multimodal(config)
                self.mm_part.assigned_device = torch.get_default_device()
            # Also where a third party's __init__ does not call ours.
            self.mm_part.data_type, self.mm_part.settings = config.data_type, config.settings
        finally:
            torch.set_default_dtype(default_dtype)

    def load_mm_weight(self, folder: Path, device: torch.device | str) -> None:
        """Loads what `vit_weights` names, if anything, and only that, while a thread makes the fingerprint of the same
        bytes. Raises `StartError`.
        """
        weights = self.config.mm_related_params.vit_weights
        if weights is None:
            self.on_weights_loaded()
            return
        plan, checkpoint = weights.plan(), Checkpoint(folder)
        with ThreadPoolExecutor(1) as thread:
            fingerprint = thread.submit(weights_fingerprint, plan, checkpoint)
            load_weights(self, plan, checkpoint, torch.device(device))
            self.on_weights_loaded()
            self.weights_fingerprint = fingerprint.result()

    def on_weights_loaded(self) -> None:
        """For what depends on the weights: folding, packing."""


MultiModalMixin = MultimodalMixin
