"""What the tests of every tower share."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from conftest import require
from torch_threads import torch_threads

from rtp_mm.config import load_settings
from rtp_mm.models.multimodal_common import as_embedding
from rtp_mm.models.registry import load_model

Load = Callable[..., Any]


def loader(folder: Path, device: str) -> Load:
    """Gives the checkpoint's `mm_part` in a dtype, loaded once. Skips without the device."""
    if device == "cuda":
        require("cuda")

    @cache
    def load(act_type: str = "fp32") -> Any:
        return load_model(load_settings(checkpoint_path=folder, act_type=act_type, device=device)).mm_part

    return load


def multiplying_bf16(folder: Path) -> Any:
    """The checkpoint's `mm_part` as on a CPU with AVX-512 BF16 or AMX; elsewhere as with the former, slowly."""
    settings = load_settings(checkpoint_path=folder, act_type="bf16", device="cpu", mm_compute_type="bf16")
    return load_model(settings).mm_part


def check_batching_is_invisible(part: Any, items: Sequence[Any]) -> None:
    """An item has the same bits alone, among others, and wherever it stands among them; also while another thread runs
    its own batch, where that is allowed, and whatever number of torch's threads either has.
    """
    alone = [as_embedding(part.mm_process(item)) for item in items]

    def check(seed: int, threads: int) -> None:
        torch.set_num_threads(threads)
        shuffled = random.Random(seed)
        order = shuffled.sample(range(len(items)), shuffled.randint(2, len(items)))
        together = map(as_embedding, part.mm_process_batch([items[i] for i in order], [], []))
        for i, (embedding, position_ids) in zip(order, together, strict=True):
            assert torch.equal(embedding, alone[i][0]), f"item {i} in {order}, {threads} threads"
            assert position_ids is alone[i][1] or torch.equal(position_ids, alone[i][1])

    with torch_threads():
        for seed in range(4):
            check(seed, torch.get_num_threads())
        if part.is_reentrant:
            with ThreadPoolExecutor(2) as lanes:
                assert len([*lanes.map(check, range(8), [1, 2, 3, 1] * 2)]) == 8
