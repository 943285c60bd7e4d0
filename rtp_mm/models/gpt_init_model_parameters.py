"""What an LLM engine knows of a model before it is loaded: RTP-LLM's `GptInitModelParameters`, from `config.json`."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rtp_mm.errors import StartError

if TYPE_CHECKING:
    from rtp_mm.config import Settings
    from rtp_mm.models.multimodal_mixin import BaseVitWeights


@dataclass
class VitParameters:
    """The multimodal part's configuration (`vision_config` and what the model adds) and the names of its weights."""

    config: dict[str, Any] = field(default_factory=dict)
    special_token_ids: dict[str, int] = field(default_factory=dict)
    special_tokens: dict[str, str] = field(default_factory=dict)
    vit_weights: BaseVitWeights | None = None


class GptInitModelParameters:
    """The language model's shape, as far as its multimodal part and an engine care; further keywords are kept as is.

    `mm_position_ids_style` is 2 for models with (t, h, w) position ids (mrope), else 0.
    """

    def __init__(
        self,
        head_num: int = 0,
        size_per_head: int = 0,
        layer_num: int = 0,
        max_seq_len: int = 0,
        vocab_size: int = 0,
        **extra: Any,
    ) -> None:
        self.head_num = head_num
        self.size_per_head = size_per_head
        self.layer_num = layer_num
        self.max_seq_len = max_seq_len
        self.vocab_size = vocab_size
        self.head_num_kv = head_num
        self.hidden_size = head_num * size_per_head
        self.inter_size = 0
        self.mrope_section: list[int] = []
        self.mm_position_ids_style = 0
        self.model_type = ""
        self.ckpt_path = ""
        self.data_type = "bf16"
        self.is_multimodal = True
        self.mm_related_params = VitParameters()
        self.settings: Settings | None = None  # the server's, for models that want them
        for name, value in extra.items():
            setattr(self, name, value)

    @classmethod
    def from_checkpoint(cls, folder: Path | str) -> GptInitModelParameters:
        """From `config.json`, flat (published) or nested under `text_config` (re-saved). Raises `StartError`."""
        config = read_json(Path(folder) / "config.json")
        text = {
            **config,
            **config_object(config, "text_config"),
        }  # nested values win: there the top level has few of them
        heads = text.get("num_attention_heads", 0)
        hidden = text.get("hidden_size", 0)
        rope = config_object(text, "rope_parameters") or config_object(text, "rope_scaling")
        parameters = cls(
            head_num=heads,
            size_per_head=text.get("head_dim") or (hidden // heads if heads else 0),
            layer_num=text.get("num_hidden_layers", 0),
            max_seq_len=text.get("max_position_embeddings", 0),
            vocab_size=text.get("vocab_size", 0),
            head_num_kv=text.get("num_key_value_heads", heads),
            hidden_size=hidden,
            inter_size=text.get("intermediate_size", 0),
            # `mrope_section` is what tells mrope: the type beside it is "mrope", "default" or absent by version.
            mrope_section=list(rope.get("mrope_section", [])),
            mm_position_ids_style=2 if "mrope_section" in rope else 0,
            model_type=config.get("model_type", ""),
            ckpt_path=str(folder),
        )
        parameters.mm_related_params.config = {**config_object(config, "vision_config"), "ckpt_path": str(folder)}
        parameters.mm_related_params.special_token_ids = {
            key: value for key, value in config.items() if key.endswith("_token_id") and isinstance(value, int)
        }
        return parameters


def config_object(config: dict[str, Any], key: str) -> dict[str, Any]:
    """A nested object; absent and null are empty."""
    value = config.get(key) or {}
    if not isinstance(value, dict):
        raise StartError(f"config.json: {key} must be an object, got {value!r}")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a checkpoint's file. Raises `StartError` that names the file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise StartError(
            f"{path} is missing: CHECKPOINT_PATH must be a model's folder in Hugging Face format"
        ) from None
    except (OSError, ValueError) as error:
        raise StartError(f"cannot read {path}: {error}") from None
    if not isinstance(value, dict):
        raise StartError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value
