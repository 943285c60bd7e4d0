"""Which pass of a resize goes first: Pillow's rule, which changed between its releases.

Each pass rounds to bytes, so the order shows: in a fifth of the bytes, mostly by 1.
"""

from __future__ import annotations

from typing import Literal

import PIL

Order = Literal["horizontal", "vertical"]
ResizeRule = Literal[
    "pillow-12.1", "pillow-12.2", "pillow-13.0"
]  # named by the first release that has it; the oldest by the last

_SLIM = 100  # height over width from which Pillow 12.2 goes vertically first


def resize_order(height: int, width: int, out_height: int, out_width: int, rule: ResizeRule) -> Order:
    """The pass that Pillow takes first from (height, width) to (out_height, out_width)."""
    match rule:
        case "pillow-12.1":
            is_vertical_first = False
        case "pillow-12.2":
            is_vertical_first = height > _SLIM * width and out_height < height
        case "pillow-13.0":
            shrunk_by = height - out_height
            is_vertical_first = shrunk_by > max(0, 2 * (width - out_width))
    return "vertical" if is_vertical_first else "horizontal"


def installed_rule() -> ResizeRule:
    """The rule of the Pillow that is installed."""
    major, minor = (int(part) for part in PIL.__version__.split(".")[:2])
    if (major, minor) >= (13, 0):
        return "pillow-13.0"
    return "pillow-12.2" if (major, minor) >= (12, 2) else "pillow-12.1"
