"""Shapes of a checkpoint's tensors, with what random values make good weights of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

BF16_BYTES: Final = 2


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A bf16 tensor of a checkpoint: normal around `mean`, or, with `std` of `None`, a hole that reads as zeros."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float | None = None

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * BF16_BYTES


@dataclass(frozen=True, slots=True)
class Language:
    """The language model beside a tower; `mrope_section` splits half a head into (t, h, w), for those positions."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    has_tied_embeddings: bool
    max_positions: int
    mrope_section: tuple[int, int, int] | None = (16, 24, 24)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def linear(name: str, rows: int, columns: int, gain: float = 1.0, has_bias: bool = True) -> Iterator[TensorSpec]:
    """Gives unit inputs a standard deviation of `gain`."""
    yield TensorSpec(f"{name}.weight", (rows, columns), std=gain * columns**-0.5)
    if has_bias:
        yield TensorSpec(f"{name}.bias", (rows,), std=0.02)


def norm(name: str, width: int, has_bias: bool = True) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (width,), mean=1.0, std=0.05)
    if has_bias:
        yield TensorSpec(f"{name}.bias", (width,), std=0.02)


def language_tensors(language: Language, prefix: str, head: str = "lm_head.weight") -> Iterator[TensorSpec]:
    width, kv_width = language.width, language.kv_heads * language.head_dim
    yield TensorSpec(f"{prefix}embed_tokens.weight", (language.vocabulary, width))
    for layer in range(language.layers):
        block = f"{prefix}layers.{layer}"
        for name, rows in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
            yield TensorSpec(f"{block}.self_attn.{name}.weight", (rows, width))
            yield TensorSpec(f"{block}.self_attn.{name}.bias", (rows,))
        yield TensorSpec(f"{block}.self_attn.o_proj.weight", (width, width))
        yield TensorSpec(f"{block}.mlp.gate_proj.weight", (language.intermediate, width))
        yield TensorSpec(f"{block}.mlp.up_proj.weight", (language.intermediate, width))
        yield TensorSpec(f"{block}.mlp.down_proj.weight", (width, language.intermediate))
        yield TensorSpec(f"{block}.input_layernorm.weight", (width,))
        yield TensorSpec(f"{block}.post_attention_layernorm.weight", (width,))
    yield TensorSpec(f"{prefix}norm.weight", (width,))
    if not language.has_tied_embeddings:
        yield TensorSpec(head, (language.vocabulary, width))
