"""Logs a person can read and a machine can parse: one line per event on stderr, `time level event key=value ...`."""

from __future__ import annotations

import json
import logging
import re
import sys
from datetime import UTC, datetime
from typing import Any

_FIELDS = "rtp_mm_fields"  # attribute of a LogRecord
_BARE = re.compile(r"[!#-<>-\[\]-~]+")  # printable ASCII without space, quote, = and backslash


def setup_logs(level: str) -> None:
    """Sends to stderr what `rtp_mm` logs from `level` up, and the warnings of the libraries below it.

    For the server's process; a library leaves this to its host.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(KeyValueFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("rtp_mm").setLevel(level)


def log_event(logger: logging.Logger, event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Logs one event with its fields; a field that is `None` is left out."""
    logger.log(level, event, extra={_FIELDS: {k: v for k, v in fields.items() if v is not None}})


class KeyValueFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO ready http=0.0.0.0:8088 model=qwen2_5_vl`; a stack follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        message = record.getMessage().replace("\n", "\\n")
        words = [time, record.levelname, message]
        words += [f"{key}={_value(value)}" for key, value in getattr(record, _FIELDS, {}).items()]
        stack = f"\n{self.formatException(record.exc_info)}" if record.exc_info else ""
        return " ".join(words) + stack


def _value(value: Any) -> str:
    """Bare where that is unambiguous, else a JSON string: a URL in an error cannot forge a field or a line."""
    if isinstance(value, float):
        return f"{value:.2f}"
    text = str(value)
    return text if _BARE.fullmatch(text) else json.dumps(text)
