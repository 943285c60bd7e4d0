"""`rtp-mm embed`: embeddings and position ids of URLs, printed or saved."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from rich.console import Console

import rtp_mm
from rtp_mm.cli.inputs import absolute, check_picture_options, enclosed, family_of, is_here
from rtp_mm.cli.outputs import check_output, writing
from rtp_mm.errors import StartError
from rtp_mm.types import MMEmbeddingRes, MMPreprocessConfig, MMUrlType, PreprocessOptions

SUFFIXES = (".safetensors", ".npz")


def run(
    urls: Sequence[str],
    checkpoint: Path | None,
    server: str | None,
    save: Path | None,
    mm_type: MMUrlType,
    options: PreprocessOptions,
    act_type: str,
    device: str,
) -> None:
    """Raises `StartError` and `MMError`."""
    if save is not None:
        check_output("--save", save, SUFFIXES)
    if server is None and checkpoint is None:
        raise StartError("name a model: --checkpoint FOLDER, or --server IP:PORT")
    if server is not None and checkpoint is not None:
        raise StartError("--checkpoint and --server name two models: leave one out")
    check_picture_options(options, partial(_family, checkpoint, server), mm_type)

    console = Console(stderr=True)
    with console.status("connecting" if server else "loading the tower") as status:
        engine = (
            rtp_mm.create_engine(vit_separation=2, remote_vit_server_ip=server)
            if server
            else rtp_mm.create_engine(vit_separation=0, checkpoint_path=checkpoint, act_type=act_type, device=device)
        )
        try:
            status.update("embedding")
            config = MMPreprocessConfig.from_options(options)
            count = len(urls)
            reachable = absolute if server is None or is_here(server) else enclosed
            result = engine.submit(
                [reachable(url) for url in urls], types=[mm_type] * count, preprocess_configs=[config] * count
            )
        finally:
            engine.close()
    if save is not None:
        with writing(save):
            save_result(save, result)
    print(*_lines(urls, result), sep="\n")


def _family(checkpoint: Path | None, server: str | None) -> str | None:
    """Of the model that will be asked."""
    if server is None:
        return None if checkpoint is None else family_of(checkpoint)
    from rtp_mm.server.client import RemoteEngine

    engine = RemoteEngine(server)
    try:
        return engine.model()
    finally:
        engine.close()


def _lines(urls: Sequence[str], result: MMEmbeddingRes) -> Iterator[str]:
    for index, (url, embedding) in enumerate(zip(urls, result.embeddings, strict=True)):
        values = embedding.float()
        shape, dtype = list(embedding.shape), str(embedding.dtype).removeprefix("torch.")
        first = " ".join(f"{value:.4f}" for value in values.flatten()[:4].tolist())
        yield url if len(url) <= 100 else f"{url[:50]}...{url[-47:]}"
        yield f"  embedding     {shape} {dtype}, mean {values.mean():.4f}, std {values.std():.4f}, {first} ..."
        if result.position_ids is not None:
            positions = result.position_ids[index]
            ends = f"{positions[0].tolist()} to {positions[-1].tolist()}"
            yield f"  position ids  {list(positions.shape)} int32, (t, h, w) from {ends}"
    yield "  ".join(f"{stage} {milliseconds:.1f} ms" for stage, milliseconds in result.timings_ms.items())


def save_result(path: Path, result: MMEmbeddingRes) -> None:
    """`embedding.N` and `position_ids.N` of every item; numpy has no bf16, so an .npz holds float32 in its place."""
    tensors = {f"embedding.{i}": tensor for i, tensor in enumerate(result.embeddings)}
    tensors |= {f"position_ids.{i}": tensor for i, tensor in enumerate(result.position_ids or ())}
    if path.suffix == ".safetensors":
        from safetensors.torch import save

        path.write_bytes(save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        return
    import numpy as np
    import torch

    with path.open("wb") as file:
        arrays = {name: (t.float() if t.dtype == torch.bfloat16 else t).numpy() for name, t in tensors.items()}
        np.savez(file, allow_pickle=False, **arrays)
