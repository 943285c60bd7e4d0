"""Run by test_ops_triton.py, interpreted: tiny towers through the Triton kernels, and by the CPU's own way."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import torch

from rtp_mm.config import load_settings
from rtp_mm.models.registry import load_model
from rtp_mm.types import Patches
from rtp_mm.vit.linear import CublasGemm, FixedGemm, PackedGemm

random = np.random.default_rng(0)


def patches(t: int, h: int, w: int) -> Patches:
    return Patches(random.integers(0, 256, (t * h * w, 588), np.uint8), (t, h, w))


def tower(folder: Path, **options: object) -> torch.nn.Module:
    return load_model(load_settings(checkpoint_path=folder, act_type="fp32", device="cpu", **options)).mm_part.tower  # type: ignore[attr-defined, no-any-return]


items = [patches(1, 2, 4), patches(1, 10, 4)]  # the second with two windows
for folder in map(Path, sys.argv[1:]):
    fixed = tower(folder, mm_attention="sdpa")
    library = tower(folder, mm_attention="sdpa", mm_batch_invariant=False)
    by_triton = {"fixed": [e for e, _ in fixed(items)], "library": [e for e, _ in library(items[:1])]}
    [(alone, _)] = fixed(items[:1])
    interpreter = os.environ.pop("TRITON_INTERPRET")
    plain = tower(folder)
    expected = [e for e, _ in plain(items)]
    os.environ["TRITON_INTERPRET"] = interpreter
    gemms = [type(t.blocks[0].attn.qkv._gemm) for t in (fixed, library, plain)]
    assert gemms == [FixedGemm, CublasGemm, PackedGemm]
    for name, embeddings in by_triton.items():
        for ours, exact in zip(embeddings, expected, strict=False):
            error = float((ours - exact).norm() / exact.norm())
            assert error < 2e-6, f"{folder.name}, {name}: {error:.1e}"
    assert torch.equal(by_triton["fixed"][0], alone), f"{folder.name}: an item's bits depend on its neighbours"
print("all towers hold")
