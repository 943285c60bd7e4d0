"""A tower's weights asked of the disk while torch is imported, so that loading finds them in memory. Knows no torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

TOWERS = ("visual.", "audio_tower.")  # in the names of their tensors, whatever stands before
STEP = 1 << 17  # bytes: for one call a system fetches no more than it reads ahead, by default this
_INDEX = "model.safetensors.index.json"
_MOST_HEADER_BYTES = 100_000_000  # safetensors' own limit


def read_ahead(folder: Path) -> None:
    """Of safetensors. A hint: where files are not as they should be, loading will tell. Returns once the disk has been
    asked for everything, which waits where its queue is full.
    """
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
        for path in _files(folder):
            with path.open("rb") as file:
                for begin, end in _places(file):
                    for offset in range(begin, end, STEP):
                        os.posix_fadvise(file.fileno(), offset, min(STEP, end - offset), os.POSIX_FADV_WILLNEED)


def _files(folder: Path) -> list[Path]:
    """Those that hold a tower's tensors, as an index says; without one, all."""
    if not (index := folder / _INDEX).exists():
        return sorted(folder.glob("*.safetensors"))
    weight_map: dict[str, str] = json.loads(index.read_bytes())["weight_map"]
    return sorted({folder / file for name, file in weight_map.items() if _is_of_tower(name)})


def _places(file: BinaryIO) -> Iterator[tuple[int, int]]:
    """Where the tensors of a tower begin and end in it."""
    file_bytes = os.fstat(file.fileno()).st_size
    header_bytes = int.from_bytes(file.read(8), "little")
    if header_bytes > _MOST_HEADER_BYTES:
        return
    header: dict[str, dict[str, list[int]]] = json.loads(file.read(header_bytes))
    for name, tensor in header.items():
        if _is_of_tower(name):
            begin, end = (8 + header_bytes + offset for offset in tensor["data_offsets"])
            yield begin, min(end, file_bytes)


def _is_of_tower(name: str) -> bool:
    return any(part in name for part in TOWERS)
