"""Checkpoints of the published shapes with random weights, in the published layout, for tests, demos and
benchmarks: `config.json`, `preprocessor_config.json` and safetensors, one file or shards with an index.

Shapes, names and config keys: the files published with Qwen2-VL 2B and 7B and Qwen2.5-VL 3B and 7B; Qwen2-Audio's are
in `audio.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from rtp_mm.errors import StartError
from rtp_mm.random_checkpoint import audio
from rtp_mm.random_checkpoint.shapes import Language, TensorSpec, language_tensors, linear, norm

Progress = Callable[[int, int], None]  # bytes of the tower written so far, bytes of the tower

SHARD_BYTES: Final = 4 * 10**9  # the published number of files: 2 for 3B, 5 for 7B

# Qwen2-VL calls the tower's width embed_dim and the language model's hidden_size;
# Qwen2.5-VL calls them hidden_size and out_hidden_size.
_WIDTH_KEY: Final = {"qwen2_vl": "embed_dim", "qwen2_5_vl": "hidden_size"}
_OUT_KEY: Final = {"qwen2_vl": "hidden_size", "qwen2_5_vl": "out_hidden_size"}
_VISION: Final[dict[str, dict[str, Any]]] = {
    "qwen2_vl": {
        "depth": 32,
        "embed_dim": 1280,
        "mlp_ratio": 4,
        "num_heads": 16,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "temporal_patch_size": 2,
    },
    "qwen2_5_vl": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
}
# 4 layers of 4 heads of 16; as in the published ones, the MLP's width is no multiple of 8 and the last block is full.
_TINY_VISION: Final[dict[str, dict[str, Any]]] = {
    "qwen2_vl": {"depth": 4, "embed_dim": 64, "num_heads": 4},
    "qwen2_5_vl": {
        "depth": 4,
        "hidden_size": 64,
        "intermediate_size": 172,
        "num_heads": 4,
        "fullatt_block_indexes": [1, 3],
    },
}


_TINY: Final = Language(48, 2, 3, 1, 96, 151936, True, 32768, (2, 3, 3))
_LANGUAGE: Final[dict[tuple[str, str], Language]] = {
    ("qwen2_vl", "tiny"): _TINY,
    ("qwen2_vl", "2b"): Language(1536, 28, 12, 2, 8960, 151936, True, 32768),
    ("qwen2_vl", "7b"): Language(3584, 28, 28, 4, 18944, 152064, False, 32768),
    ("qwen2_5_vl", "tiny"): _TINY,
    ("qwen2_5_vl", "3b"): Language(2048, 36, 16, 2, 11008, 151936, True, 128000),
    ("qwen2_5_vl", "7b"): Language(3584, 28, 28, 4, 18944, 152064, False, 128000),
}
_CLASS_PREFIX: Final = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}
_LANGUAGE_PREFIX: Final = {"visual.": "model.", "model.visual.": "model.language_model."}


def write_checkpoint(
    folder: Path,
    family: str,
    size: str,
    *,
    seed: int = 0,
    sparse_llm: bool = False,
    shard_bytes: int = SHARD_BYTES,
    prefix: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint whose tower is real in shape and random in value; the same `seed` gives the same bytes.

    Weights are scaled as in a freshly initialised transformer, so that activations stay near 1 through every layer;
    drawn in float32 and stored as bf16. The language model is left out or, with `sparse_llm`, stands in index
    and headers with its real shapes over holes in the files (16.6 GB apparent at 7B, 1.4 GB on disk).

    family:      "qwen2_vl", "qwen2_5_vl" or "qwen2_audio".
    size:        "tiny", or a published one: 2b and 7b of Qwen2-VL, 3b and 7b of Qwen2.5-VL, 7b of Qwen2-Audio.
    shard_bytes: most bytes of tensors in a file; what fits one is a single `model.safetensors` without an index.
    prefix:      of the tower; as published ("visual.", none for Qwen2-Audio), or as saved by later versions of
                 transformers ("model.visual.", "model.").

    `config.json` comes last, so a folder that has one is complete. Peak memory is the largest tensor's, thrice.
    Raises `StartError` where there is no such model, or the folder already holds one.
    """
    tower, language = checkpoint_tensors(family, size, prefix=prefix)
    if (folder / "config.json").exists():
        raise StartError(f"{folder} already holds a checkpoint")
    folder.mkdir(parents=True, exist_ok=True)

    shards = _shards([*tower, *language] if sparse_llm else tower, shard_bytes)
    files = _file_names(len(shards))
    total, written = sum(spec.nbytes for spec in tower), 0
    for name, specs in zip(files, shards, strict=True):
        with (folder / name).open("wb") as file:
            for nbytes in _write_shard(file, specs, seed):
                written += nbytes
                if progress is not None:
                    progress(written, total)
    if len(files) > 1:
        _write_json(folder / "model.safetensors.index.json", _index(files, shards))
    _write_json(folder / "preprocessor_config.json", _preprocessor_config(family))
    _write_json(folder / "config.json", model_config(family, size))


def checkpoint_tensors(
    family: str, size: str, *, prefix: str | None = None
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    """The tensors of the tower and of the language model, in the published order. Raises `StartError`."""
    if family == audio.FAMILY:
        return audio.checkpoint_tensors(size, prefix or "")
    prefix = prefix or "visual."
    vision, language = _vision(family, size), _LANGUAGE[family, size]
    if prefix not in _LANGUAGE_PREFIX:
        raise StartError(f"prefix must be one of {', '.join(_LANGUAGE_PREFIX)}; got {prefix}")
    tower = [replace(spec, name=prefix + spec.name) for spec in _tower_tensors(family, vision)]
    return tower, list(language_tensors(language, _LANGUAGE_PREFIX[prefix]))


def model_config(family: str, size: str) -> dict[str, Any]:
    """`config.json` in its original layout: the language model's fields flat, beside `vision_config`.

    Qwen2-Audio's has them nested. Raises `StartError`.
    """
    if family == audio.FAMILY:
        return audio.model_config(size)
    vision, language = _vision(family, size), _LANGUAGE[family, size]
    return {
        "architectures": [f"{_CLASS_PREFIX[family]}ForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "vision_token_id": 151654,
        "image_token_id": 151655,
        "video_token_id": 151656,
        "hidden_act": "silu",
        "hidden_size": language.width,
        "initializer_range": 0.02,
        "intermediate_size": language.intermediate,
        "max_position_embeddings": language.max_positions,
        "max_window_layers": language.layers,
        "model_type": family,
        "num_attention_heads": language.heads,
        "num_hidden_layers": language.layers,
        "num_key_value_heads": language.kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": language.has_tied_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": vision,
        "rope_scaling": {"type": "mrope", "mrope_section": language.mrope_section},
        "vocab_size": language.vocabulary,
    }


def _vision(family: str, size: str) -> dict[str, Any]:
    """The published `vision_config`."""
    if (family, size) not in _LANGUAGE:
        known = [*_LANGUAGE, *((audio.FAMILY, each) for each in audio.SIZES)]
        raise StartError(f"there is no {family} {size}; there are {', '.join(map(' '.join, known))}")
    tiny = _TINY_VISION[family] if size == "tiny" else {}
    return _VISION[family] | tiny | {_OUT_KEY[family]: _LANGUAGE[family, size].width}


def _tower_tensors(family: str, vision: dict[str, Any]) -> Iterator[TensorSpec]:
    width = vision[_WIDTH_KEY[family]]
    patch = (vision["in_chans"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    yield TensorSpec("patch_embed.proj.weight", (width, *patch), std=math.prod(patch) ** -0.5)

    has_norm_bias = family == "qwen2_vl"  # LayerNorm there, RMSNorm in Qwen2.5-VL
    residual = (2 * vision["depth"]) ** -0.5  # all branches together add one unit of variance to the residual stream
    for layer in range(vision["depth"]):
        block = f"blocks.{layer}"
        yield from norm(f"{block}.norm1", width, has_norm_bias)
        yield from norm(f"{block}.norm2", width, has_norm_bias)
        yield from linear(f"{block}.attn.qkv", 3 * width, width)
        yield from linear(f"{block}.attn.proj", width, width, gain=residual)
        if family == "qwen2_vl":
            inner = vision["mlp_ratio"] * width
            yield from linear(f"{block}.mlp.fc1", inner, width)
            yield from linear(f"{block}.mlp.fc2", width, inner, gain=residual)
        else:
            inner = vision["intermediate_size"]
            yield from linear(f"{block}.mlp.gate_proj", inner, width)
            yield from linear(f"{block}.mlp.up_proj", inner, width)
            yield from linear(f"{block}.mlp.down_proj", width, inner, gain=residual)

    merged = vision["spatial_merge_size"] ** 2 * width
    yield from norm("merger.ln_q", width, has_norm_bias)
    yield from linear("merger.mlp.0", merged, merged)
    yield from linear("merger.mlp.2", vision[_OUT_KEY[family]], merged)


def _shards(specs: Sequence[TensorSpec], shard_bytes: int) -> list[list[TensorSpec]]:
    """Fills one shard after the other; a tensor larger than a shard has one to itself."""
    shards: list[list[TensorSpec]] = [[]]
    filled = 0
    for spec in specs:
        if shards[-1] and filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(spec)
        filled += spec.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_shard(file: BinaryIO, specs: Sequence[TensorSpec], seed: int) -> Iterator[int]:
    """Writes a safetensors file: header length (8 bytes), JSON header, tensors. Yields the bytes of each tensor."""
    ends = list(accumulate(spec.nbytes for spec in specs))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for spec, end in zip(specs, ends, strict=True):
        header[spec.name] = {"dtype": "BF16", "shape": spec.shape, "data_offsets": [end - spec.nbytes, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors start aligned
    file.write(len(encoded).to_bytes(8, "little") + encoded)
    start = file.tell()
    for spec, end in zip(specs, ends, strict=True):
        if spec.std is None:
            file.seek(start + end)
        else:
            file.write(_draw(spec, spec.std, seed))
            yield spec.nbytes
    file.truncate(start + ends[-1])


def _draw(spec: TensorSpec, std: float, seed: int) -> memoryview:
    """The tensor's bytes; they depend on seed and name alone, not on what else is written."""
    digest = hashlib.blake2b(f"{seed}/{spec.name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little", signed=True))
    values = torch.empty(spec.shape).normal_(spec.mean, std, generator=generator)
    return values.to(torch.bfloat16).view(torch.uint8).numpy().data


def _index(files: Sequence[str], shards: Sequence[Sequence[TensorSpec]]) -> dict[str, Any]:
    weight_map = {spec.name: name for name, specs in zip(files, shards, strict=True) for spec in specs}
    total = sum(spec.nbytes for specs in shards for spec in specs)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _preprocessor_config(family: str) -> dict[str, Any]:
    if family == audio.FAMILY:
        return audio.PREPROCESSOR_CONFIG
    return {
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{_CLASS_PREFIX[family]}Processor",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
