"""Loads the native operators into `torch.ops.rtp_mm`; the only file that knows where they are."""

from __future__ import annotations

from pathlib import Path

import torch

PACKAGE = Path(__file__).resolve().parent.parent


def load_operators() -> None:
    """`_C.so`, and `_C_cuda.so` where torch sees a GPU. Loading twice does nothing. Raises `ImportError`."""
    _load(PACKAGE / "_C.so", "run `pip install -e .`")
    if torch.cuda.is_available():
        _load(
            PACKAGE / "_C_cuda.so",
            "run `RTP_MM_CUDA=1 pip install -e .`, which needs nvcc (CUDA_VISIBLE_DEVICES= runs on the CPU)",
        )


def _load(path: Path, remedy: str) -> None:
    if not path.is_file():
        raise ImportError(f"{path} is not built: {remedy}")
    try:
        torch.ops.load_library(path)
    except OSError as error:
        raise ImportError(f"{path} does not load with torch {torch.__version__}: {error}; {remedy}") from error


load_operators()
