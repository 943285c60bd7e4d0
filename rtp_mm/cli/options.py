"""`rtp-mm options`: every option with its default and meaning, from `Settings` itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.table import Table

from rtp_mm.config import Settings


def run(markdown: bool) -> None:
    if markdown:
        print(markdown_table(), end="")
        return
    table = Table("option", "default", "meaning")
    for row in _rows():
        table.add_row(*row)
    Console().print(table, markup=False)


def markdown_table() -> str:
    """The table of docs/OPTIONS.md."""
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for name, default, meaning in _rows():
        lines.append(f"| `{name}` | {f'`{default}`' if default else ''} | {meaning.replace('|', chr(92) + '|')} |")
    return "\n".join(lines) + "\n"


def _rows() -> Iterator[tuple[str, str, str]]:
    for name, field in Settings.model_fields.items():
        yield name.upper(), _default(field), _meaning(field)


def _meaning(field: FieldInfo) -> str:
    """What it does, and the values it may have, where these are few and not all of them told."""
    text = field.description or ""
    values = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    untold = any(not re.search(rf"\b{value}\b", text) for value in values)
    return f"{text} ({', '.join(map(str, values))})" if untold else text


def _default(field: FieldInfo) -> str:
    """As one would write it in the environment; empty where unset, or where the description says how it is chosen."""
    if field.default in (None, PydanticUndefined, ()):
        return ""
    return str(int(field.default)) if isinstance(field.default, bool) else str(field.default)
