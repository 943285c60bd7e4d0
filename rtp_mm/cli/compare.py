"""`rtp-mm compare`: ours against Hugging Face on the same checkpoint and image, video or sound."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import rtp_mm
from rtp_mm.cli.hugging_face import ANY, Peer, peer_for
from rtp_mm.cli.inputs import check_picture_options, family_of, fetch
from rtp_mm.config import load_settings
from rtp_mm.errors import BadItemsError, StartError
from rtp_mm.media.redact import redact
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.registry import choose_device
from rtp_mm.types import MMPreprocessConfig, PreprocessOptions


@dataclass(frozen=True, slots=True)
class Task:
    """What to compare on. The median of `repeat` runs counts."""

    url: str
    checkpoint: Path
    options: PreprocessOptions = ANY
    repeat: int = 1
    act_type: str = "bf16"
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class Run:
    """An embedding [tokens, out_hidden] and the median milliseconds it took; `facts` of what the tower got."""

    embedding: Tensor
    preprocess_ms: float
    forward_ms: float
    facts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Comparison:
    """Ours and Hugging Face's in one dtype, and Hugging Face's in float32, the reference for errors."""

    ours: Run
    peer: Run
    reference: Tensor

    def token_cosines(self) -> Tensor:
        """[tokens]: ours against Hugging Face in the same dtype."""
        return torch.nn.functional.cosine_similarity(self.ours.embedding.double(), self.peer.embedding.double(), dim=-1)

    def max_error(self) -> float:
        """Largest difference of one value, ours against Hugging Face in the same dtype."""
        return float((self.ours.embedding.double() - self.peer.embedding.double()).abs().max())

    def relative_error(self, run: Run) -> float:
        """Relative L2 against the reference."""
        reference = self.reference.double()
        return float((run.embedding.double() - reference).norm() / reference.norm())


def run(task: Task) -> None:
    """Raises `StartError` and `MMError`."""
    with Console(stderr=True).status("") as status:
        comparison = compare(task, report=status.update)
    Console().print(table(comparison, task))


def compare(task: Task, report: Callable[[str], None] = lambda step: None) -> Comparison:
    """Each side warms up on a small file and then runs `task.repeat` times: first calls cost allocations and thread
    pools that a server has behind it. Raises `StartError` and `MMError`.
    """
    settings = load_settings(checkpoint_path=task.checkpoint)
    peer_type = peer_for(task.checkpoint)
    check_picture_options(task.options, partial(family_of, task.checkpoint))
    data = fetch(task.url, settings, peer_type.mm_type).data
    assert isinstance(data, bytes)
    report(f"ours, {task.act_type}")
    ours = _ours(task, data, peer_type)
    report(f"Hugging Face, {task.act_type}")
    peer = _peer(task, data, peer_type)
    if task.act_type == "fp32":
        return Comparison(ours, peer, reference=peer.embedding)
    report("Hugging Face, fp32: the reference")
    return Comparison(ours, peer, reference=_peer(replace(task, act_type="fp32", repeat=1), data, peer_type).embedding)


def _ours(task: Task, data: bytes, peer_type: type[Peer]) -> Run:
    mm_types = [peer_type.mm_type]
    engine = rtp_mm.create_engine(
        vit_separation=0,
        checkpoint_path=task.checkpoint,
        act_type=task.act_type,
        device=task.device,
        mm_embedding_cache_mb=0,
        mm_patch_cache_mb=0,
    )
    try:
        engine.submit([_data_url(peer_type.warm_up_file())], mm_types)
        config = MMPreprocessConfig.from_options(task.options)
        results = [engine.submit([_data_url(data)], mm_types, preprocess_configs=[config]) for _ in range(task.repeat)]
    except BadItemsError as error:  # which names the data URL
        raise StartError(f"{redact(task.url)}: {error.verdict}") from None
    finally:
        engine.close()
    return Run(
        results[0].embeddings[0],
        preprocess_ms=median(result.timings_ms["preprocess"] for result in results),
        forward_ms=median(result.timings_ms["forward"] for result in results),
        facts=tuple(f"{s:.4g} s per grid" for s in results[0].seconds_per_grid if s is not None),
    )


def _peer(task: Task, data: bytes, peer_type: type[Peer]) -> Run:
    peer = peer_type(task.checkpoint, ACT_DTYPES[task.act_type], choose_device(task.device))
    peer.forward(peer.preprocess(peer_type.warm_up_file()))
    embeddings, preprocess_ms, forward_ms = [], [], []
    for _ in range(task.repeat):
        start = time.perf_counter()
        inputs = peer.preprocess(data, task.options)
        between = time.perf_counter()
        embeddings.append(peer.forward(inputs))
        preprocess_ms.append(1e3 * (between - start))
        forward_ms.append(1e3 * (time.perf_counter() - between))
    return Run(embeddings[0], median(preprocess_ms), median(forward_ms), facts=(peer.describe(inputs),))


def _data_url(data: bytes) -> str:
    return f"data:application/octet-stream;base64,{base64.b64encode(data).decode()}"


def table(comparison: Comparison, task: Task) -> Table:
    """What agrees and what it costs."""
    ours, peer, cosines = comparison.ours, comparison.peer, comparison.token_cosines()
    tokens, width = ours.embedding.shape
    facts = ", ".join([*peer.facts, *ours.facts, f"{tokens} tokens of {width}", task.act_type])
    result = Table("", "ours", "Hugging Face", title=facts)
    for row in ("preprocess_ms", "forward_ms"):
        result.add_row(row.replace("_", ", "), *(f"{getattr(side, row):.1f}" for side in (ours, peer)))
    errors = (f"{comparison.relative_error(side):.2e}" for side in (ours, peer))
    result.add_row("relative L2 error against float32", *errors)
    result.add_section()
    result.add_row("cosine per token, min / mean", f"{cosines.min():.6f} / {cosines.mean():.6f}")
    result.add_row("largest difference of a value", f"{comparison.max_error():.2e}")
    return result
