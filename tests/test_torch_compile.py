"""MM_TORCH_COMPILE=1: answers as exact, bits that do not depend on the batch, and few compilations for all sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface import relative_l2
from towers import check_batching_is_invisible

from rtp_mm.config import load_settings
from rtp_mm.models.multimodal_common import as_embedding
from rtp_mm.models.registry import load_model
from rtp_mm.types import LogMel, Patches

SIDES = [(2, 2), (4, 6), (8, 8), (10, 18), (16, 12), (22, 14), (30, 22)]  # in patches
MOST_GRAPHS = 24  # of all sizes: a block's in one piece, or in two around attention that cannot be traced; a merger's
RECOMPILATIONS = 8  # of one function that torch allows; beyond, it would give up


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch.compiler.reset()


def load(folder: Path, **settings: Any) -> Any:
    return load_model(load_settings(checkpoint_path=folder, **{"device": "cpu", "act_type": "fp32"} | settings)).mm_part


def images() -> list[Patches]:
    rng = np.random.default_rng(0)
    return [Patches(rng.integers(0, 256, (h * w, 588), np.uint8), (1, h, w)) for h, w in SIDES]


def sounds() -> list[LogMel]:
    return [LogMel(np.random.default_rng(n).standard_normal((n, 128), np.float32)) for n in (10, 102, 1002)]


def check(folder: Path, items: Sequence[Any], **settings: Any) -> None:
    eager = load(folder, **settings)
    compiled = load(folder, **settings, mm_torch_compile=True)
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(recompile_limit=RECOMPILATIONS, fail_on_recompile_limit_hit=True):
        for item in items:
            answer, expected = (as_embedding(part.mm_process(item))[0] for part in (compiled, eager))
            assert relative_l2(answer, expected) < 1e-6
        assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= MOST_GRAPHS
        check_batching_is_invisible(compiled, items)


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
def test_compiled_blocks_answer_images_as_eager_ones_do(tiny_checkpoint: Path, attention: str) -> None:
    check(tiny_checkpoint, images(), mm_attention=attention)


def test_compiled_blocks_multiply_bf16_as_eager_ones_do(tiny_qwen2_5_vl: Path) -> None:
    check(tiny_qwen2_5_vl, images(), act_type="bf16", mm_compute_type="bf16")


def test_compiled_blocks_answer_sounds_as_eager_ones_do(tiny_qwen2_audio: Path) -> None:
    check(tiny_qwen2_audio, sounds())
