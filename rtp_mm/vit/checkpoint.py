"""Tensors of a checkpoint folder by name: safetensors or `pytorch_model*.bin`, sharded or single, memory-mapped.

Only headers are read until a tensor is asked for, and then only that tensor's bytes: a language model's shards beside
the tower cost nothing.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from rtp_mm.errors import StartError

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
PATTERNS = ("*.safetensors", "pytorch_model*.bin")  # without an index; the first that matches anything
_LFS_POINTER = b"version https://git-lfs"


class Checkpoint:
    """The tensors of `folder`. Raises `StartError` for a folder without weights or a file that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[Path, Any] = {}  # opened when first needed
        self._file_of = self._read_index() or self._read_headers()

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """The tensor on the host, a view of the mapped file: copy it before the file may change."""
        path = self._file_of[name]
        try:
            file = self._open(path)
            tensor: Tensor = file[name] if isinstance(file, Mapping) else file.get_tensor(name)
        except (KeyError, SafetensorError) as error:
            raise StartError(f"{path.name} does not hold {name}, which the index says it does: {error}") from None
        return tensor.detach()  # of parameters, which `torch.save` keeps as such, too

    def _read_index(self) -> dict[str, Path]:
        for index in INDEXES:
            path = self.folder / index
            if path.exists():
                try:
                    weight_map: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
                    return {name: self.folder / file for name, file in weight_map.items()}
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise StartError(f"{path} is no index of a checkpoint: {error!r}") from None
        return {}

    def _read_headers(self) -> dict[str, Path]:
        for pattern in PATTERNS:
            if paths := sorted(self.folder.glob(pattern)):
                return {name: path for path in paths for name in self._open(path).keys()}  # noqa: SIM118  # no Mapping
        raise StartError(f"no weights in {self.folder}: expected {' or '.join(PATTERNS)}")

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = _open_file(path)
            except FileNotFoundError:
                raise StartError(f"{path} is missing, but the index of {self.folder} names it") from None
            except (SafetensorError, OSError, RuntimeError, pickle.UnpicklingError) as error:
                raise StartError(f"cannot read {path}: {_why(path) or str(error).splitlines()[0]}") from None
        return self._files[path]


def _why(path: Path) -> str | None:
    """Why it holds no tensors, where that is known."""
    try:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
    except OSError:
        return None
    return "a pointer of Git LFS, not what it points to: git lfs pull" if is_pointer else None


def _open_file(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return safe_open(path, framework="pt")
    tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if not isinstance(tensors, Mapping):
        raise StartError(f"{path} must hold tensors by name, got {type(tensors).__name__}")
    return tensors
