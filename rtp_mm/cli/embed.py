"""`rtp-mm embed`: embeddings and position ids of URLs, printed or saved."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

import rtp_mm
from rtp_mm.errors import StartError
from rtp_mm.types import MMEmbeddingRes, MMPreprocessConfig

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".safetensors", ".npz")


def run(
    urls: Sequence[str],
    checkpoint: Path | None,
    server: str | None,
    save: Path | None,
    min_pixels: int | None,
    max_pixels: int | None,
    act_type: str,
    device: str,
) -> None:
    """Raises `StartError` and `MMError`."""
    if save is not None and save.suffix not in SUFFIXES:
        raise StartError(f"--save must end in {' or '.join(SUFFIXES)}, got {save}")
    if server is None and checkpoint is None:
        raise StartError("name a model: --checkpoint FOLDER, or --server IP:PORT")

    console = Console(stderr=True)
    with console.status("connecting" if server else "loading the tower") as status:
        engine = (
            rtp_mm.create_engine(vit_separation=2, remote_vit_server_ip=server)
            if server
            else rtp_mm.create_engine(vit_separation=0, checkpoint_path=checkpoint, act_type=act_type, device=device)
        )
        try:
            status.update("embedding")
            config = MMPreprocessConfig(min_pixels=min_pixels or -1, max_pixels=max_pixels or -1)
            result = engine.submit([absolute(url) for url in urls], preprocess_configs=[config] * len(urls))
        finally:
            engine.close()
    if save is not None:
        _save(save, result)
    Console().print(_table(urls, result), _timings(result), sep="\n")


def absolute(url: str) -> str:
    """A path as seen from here, so that a server with another working directory finds the same file."""
    return url if url.startswith("data:") or "://" in url else os.path.abspath(url)


def _table(urls: Sequence[str], result: MMEmbeddingRes) -> Table:
    table = Table("item", "embedding", "dtype", "mean", "std", "first values", "position ids (t, h, w)")
    for index, (url, embedding) in enumerate(zip(urls, result.embeddings, strict=True)):
        values = embedding.float()
        positions = "none" if result.position_ids is None else _span(result.position_ids[index])
        table.add_row(
            url if len(url) <= 40 else f"{url[:20]}...{url[-17:]}",
            " x ".join(map(str, embedding.shape)),
            str(embedding.dtype).removeprefix("torch."),
            f"{values.mean():.4f}",
            f"{values.std():.4f}",
            " ".join(f"{value:.4f}" for value in values.flatten()[:4].tolist()),
            positions,
        )
    return table


def _span(positions: Tensor) -> str:
    first, last = positions[0].tolist(), positions[-1].tolist()
    return f"{tuple(first)} ... {tuple(last)}"


def _timings(result: MMEmbeddingRes) -> str:
    return "  ".join(f"{stage} {milliseconds:.1f} ms" for stage, milliseconds in result.timings_ms.items())


def _save(path: Path, result: MMEmbeddingRes) -> None:
    """`embedding.N` and `position_ids.N` of every item; numpy has no bf16, so an .npz holds float32 in its place."""
    tensors = {f"embedding.{i}": tensor for i, tensor in enumerate(result.embeddings)}
    tensors |= {f"position_ids.{i}": tensor for i, tensor in enumerate(result.position_ids or ())}
    if path.suffix == ".safetensors":
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return
    import numpy as np
    import torch

    with path.open("wb") as file:
        arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in tensors.items()}
        np.savez(file, allow_pickle=False, **arrays)
