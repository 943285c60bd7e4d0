"""Where a checkpoint says how its inputs are prepared, and its figures, checked."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rtp_mm.errors import StartError

_log = logging.getLogger(__name__)

# A file, and the key in it where it holds several processors. `processor_config.json` goes first, as in transformers 5.
ProcessorFiles = Sequence[tuple[str, str | None]]


def find_rules(folder: Path, files: ProcessorFiles) -> tuple[Mapping[str, Any], str] | None:
    """The rules in the first of `files` that has some, and the file's name for errors. Raises `StartError`."""
    for name, key in files:
        path = folder / name
        if path.is_file():
            file = _read(path)
            rules = file if key is None else file.get(key)
            if rules is not None and not isinstance(rules, Mapping):
                raise StartError(f"{path}: {key} must be an object")
            if rules is not None:
                return rules, str(path)
    _log.warning("%s has no preprocessor_config.json: the family's published values are used", folder)
    return None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        file = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StartError(f"{path}: {error}") from None
    if not isinstance(file, dict):
        raise StartError(f"{path}: must hold an object")
    return file


def positive(rules: Mapping[str, Any], name: str, default: int, source: str) -> int:
    """A positive integer, or `default` where there is none. Raises `StartError` for anything else."""
    value = rules.get(name)
    if value is None:
        return default
    if type(value) is not int or value < 1:
        raise StartError(f"{source}: {name}={value!r} must be a positive integer")
    return value


def positive_number(rules: Mapping[str, Any], name: str, default: float, source: str) -> float:
    """The same, of any number."""
    value = rules.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise StartError(f"{source}: {name}={value!r} must be a positive number")
    return float(value)
