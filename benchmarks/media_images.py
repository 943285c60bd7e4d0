"""Image files of every format to RGB pixels: Pillow's `convert("RGB")`, as most services decode, and ours.

All are one photograph. Ours runs as in a worker, with kept buffers; before anything is timed, its pixels are compared
with Pillow's. Milliseconds of one thread.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import skimage.data
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.harness import interleave
from benchmarks.report import write_result
from rtp_mm.media.image import decode, keep_decode_buffers

WIDTH, HEIGHT = 1024, 768


def files() -> dict[str, bytes]:
    """The photograph in every format, by a name that says what is special about it."""
    photo = Image.fromarray(skimage.data.coffee()).resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)

    def saved(image: Image.Image, image_format: str, **options: Any) -> bytes:
        file = io.BytesIO()
        image.save(file, image_format, **options)
        return file.getvalue()

    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    return {
        "JPEG 4:2:0": saved(photo, "JPEG", quality=90),
        "JPEG 4:4:4": saved(photo, "JPEG", quality=90, subsampling=0),
        "JPEG progressive": saved(photo, "JPEG", quality=90, progressive=True),
        "JPEG grey": saved(photo.convert("L"), "JPEG", quality=90),
        "JPEG CMYK": saved(photo.convert("CMYK"), "JPEG", quality=90),
        "PNG": saved(photo, "PNG"),
        "PNG RGBA": saved(photo.convert("RGBA"), "PNG"),
        "PNG grey": saved(photo.convert("L"), "PNG"),
        "PNG palette": saved(photo.quantize(256), "PNG"),
        "PNG 16-bit grey": saved(deep, "PNG"),
        "WebP": saved(photo, "WEBP", quality=90),
        "WebP lossless": saved(photo, "WEBP", lossless=True),
        "AVIF": saved(photo, "AVIF", quality=80),
        "JPEG 2000": saved(photo, "JPEG2000", quality_layers=[30]),
        "TIFF LZW": saved(photo, "TIFF", compression="tiff_lzw"),
        "GIF": saved(photo, "GIF"),
        "BMP": saved(photo, "BMP"),
    }


def decoders(data: bytes) -> dict[str, Callable[[], Any]]:
    """Ways from these bytes to [H, W, 3] pixels."""
    return {
        "Pillow": lambda: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "ours": lambda: decode(data, max_pixels=10**9, allow_truncated=False, exif_transpose=False),
    }


def run(rounds: int) -> None:
    keep_decode_buffers()
    results = {}
    for name, data in track(files().items(), "images"):
        ways = decoders(data)
        if not np.array_equal(ways["ours"]()[..., :3], ways["Pillow"]()):
            raise SystemExit(f"{name}: pixels differ from Pillow's")
        timings = interleave(ways, rounds, time.thread_time)
        results[name] = {"bytes": len(data), **{way: asdict(timing) for way, timing in timings.items()}}
    table = Table("format", "KB", "Pillow, ms", "ours, ms", "faster by", title=f"{WIDTH}x{HEIGHT} to RGB pixels")
    for name, row in results.items():
        pillow, ours = row["Pillow"]["median"], row["ours"]["median"]
        table.add_row(name, f"{row['bytes'] / 1e3:.0f}", f"{pillow:.2f}", f"{ours:.2f}", f"{pillow / ours:.2f}x")
    Console().print(table)
    write_result("media_images", {"unit": "ms", "size": [WIDTH, HEIGHT], "formats": results})
