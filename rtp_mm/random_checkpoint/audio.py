"""What a checkpoint of Qwen2-Audio holds: names, shapes and config keys as published."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from rtp_mm.errors import StartError
from rtp_mm.random_checkpoint.shapes import Language, TensorSpec, language_tensors, linear, norm

FAMILY: Final = "qwen2_audio"
PREPROCESSOR_CONFIG: Final = {
    "chunk_length": 30,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "n_fft": 400,
    "n_samples": 480000,
    "nb_max_frames": 3000,
    "padding_side": "right",
    "padding_value": 0.0,
    "processor_class": "Qwen2AudioProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
}
_AUDIO: Final = {
    "model_type": "qwen2_audio_encoder",
    "activation_function": "gelu",
    "d_model": 1280,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "encoder_layers": 32,
    "max_source_positions": 1500,
    "num_mel_bins": 128,
    "scale_embedding": False,
}
_TINY: Final = {"d_model": 64, "encoder_attention_heads": 4, "encoder_ffn_dim": 172, "encoder_layers": 4}
SIZES: Final[dict[str, tuple[dict[str, Any], Language]]] = {
    "tiny": (_AUDIO | _TINY, Language(48, 2, 3, 3, 96, 156032, False, 8192, None)),
    "7b": (_AUDIO, Language(4096, 32, 32, 32, 11008, 156032, False, 8192, None)),
}
# Prefix of the tower to that of the language model's layers, and its head.
_LANGUAGE_PREFIX: Final = {
    "": ("language_model.model.", "language_model.lm_head.weight"),
    "model.": ("model.language_model.", "lm_head.weight"),
}


def checkpoint_tensors(size: str, prefix: str) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The tensors of tower with projector, and of the language model. Raises `StartError`."""
    audio, language = _shapes(size)
    if prefix not in _LANGUAGE_PREFIX:
        raise StartError(f"prefix must be one of {', '.join(map(repr, _LANGUAGE_PREFIX))}; got {prefix!r}")
    tower = [replace(spec, name=prefix + spec.name) for spec in _tower_tensors(audio, language.width)]
    return tower, list(language_tensors(language, *_LANGUAGE_PREFIX[prefix]))


def model_config(size: str) -> dict[str, Any]:
    """`config.json`. At 7B what is a class default is left out of `text_config`, as published. Raises `StartError`."""
    audio, language = _shapes(size)
    widths = {
        "hidden_size": language.width,
        "num_attention_heads": language.heads,
        "num_hidden_layers": language.layers,
        "num_key_value_heads": language.kv_heads,
    }
    return {
        "architectures": ["Qwen2AudioForConditionalGeneration"],
        "model_type": FAMILY,
        "audio_config": audio,
        "audio_token_index": 151646,
        "ignore_index": -100,
        "text_config": {
            "model_type": "qwen2",
            "intermediate_size": language.intermediate,
            "max_position_embeddings": language.max_positions,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000,
            "sliding_window": 32768,
            "vocab_size": language.vocabulary,
            **({} if size == "7b" else widths),
        },
        "torch_dtype": "bfloat16",
        "vocab_size": language.vocabulary,
    }


def _shapes(size: str) -> tuple[dict[str, Any], Language]:
    if size not in SIZES:
        raise StartError(f"there is no {FAMILY} {size}; there are {', '.join(SIZES)}")
    return SIZES[size]


def _tower_tensors(audio: dict[str, Any], out: int) -> Iterator[TensorSpec]:
    width, bins, inner = audio["d_model"], audio["num_mel_bins"], audio["encoder_ffn_dim"]
    for name, channels in (("conv1", bins), ("conv2", width)):
        yield TensorSpec(f"audio_tower.{name}.weight", (width, channels, 3), std=(3 * channels) ** -0.5)
        yield TensorSpec(f"audio_tower.{name}.bias", (width,), std=0.02)
    yield TensorSpec("audio_tower.embed_positions.weight", (audio["max_source_positions"], width), std=0.5)
    residual = (2 * audio["encoder_layers"]) ** -0.5  # all branches together add one unit of variance
    for layer in range(audio["encoder_layers"]):
        block = f"audio_tower.layers.{layer}"
        yield from linear(f"{block}.self_attn.k_proj", width, width, has_bias=False)
        yield from linear(f"{block}.self_attn.v_proj", width, width)
        yield from linear(f"{block}.self_attn.q_proj", width, width)
        yield from linear(f"{block}.self_attn.out_proj", width, width, gain=residual)
        yield from norm(f"{block}.self_attn_layer_norm", width)
        yield from linear(f"{block}.fc1", inner, width)
        yield from linear(f"{block}.fc2", width, inner, gain=residual)
        yield from norm(f"{block}.final_layer_norm", width)
    yield from norm("audio_tower.layer_norm", width)
    yield from linear("multi_modal_projector.linear", out, width)
