"""Files that commands write: refused before anything is spent, where that can be known."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rtp_mm.errors import StartError


def check_output(option: str, path: Path, suffixes: Sequence[str]) -> None:
    """Raises `StartError` for a file of another kind, or where none can be written."""
    if path.suffix not in suffixes:
        raise StartError(f"{option} must end in {' or '.join(suffixes)}, got {path}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise StartError(f"{option}: {path} cannot be written")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raises `StartError` in place of `OSError`."""
    try:
        yield
    except OSError as error:
        raise StartError(f"{path} cannot be written: {error}") from None
