"""Image files of every format to RGB pixels: Pillow's `convert("RGB")`, as most services decode, and ours; beside them,
where DALI is installed, its decoders for the CPU, for the files that our adapter gives them.

All are one photograph. Ours runs as in a worker, with kept buffers; before anything is timed, its pixels are compared
with Pillow's. Milliseconds of processor time: one thread's, and DALI has one.
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
from rtp_mm.media import dali
from rtp_mm.media.decode_backend import DeviceDecoder, DeviceDecoders, choose_for_image
from rtp_mm.media.image import decode, keep_decode_buffers
from rtp_mm.media.probe import probe

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


def decoders(data: bytes, dali_decoder: DeviceDecoder | None) -> dict[str, Callable[[], Any]]:
    """Ways from these bytes to [H, W, 3] pixels."""
    ways: dict[str, Callable[[], Any]] = {
        "Pillow": lambda: np.asarray(Image.open(io.BytesIO(data)).convert("RGB")),
        "ours": lambda: decode(data, max_pixels=10**9, allow_truncated=False, exif_transpose=False),
    }
    if dali_decoder is not None:
        takes = DeviceDecoders(dali.library(), dali.FORMATS, ())
        if choose_for_image(probe(data), data, "gpu", takes, exif_transpose=False).is_on_device:
            ways["DALI"] = lambda: np.from_dlpack(dali_decoder.image(data))
    return ways


def run(rounds: int) -> None:
    keep_decode_buffers()
    dali_decoder = dali.DaliDecoder(None) if dali.is_installed() else None
    results: dict[str, dict[str, Any]] = {}
    for name, data in track(files().items(), "images", auto_refresh=False):  # no thread of its own
        ways = decoders(data, dali_decoder)
        pillow = ways["Pillow"]()
        if not np.array_equal(ways["ours"]()[..., :3], pillow):
            raise SystemExit(f"{name}: pixels differ from Pillow's")
        results[name] = {"bytes": len(data)}
        if "DALI" in ways:
            results[name]["DALI_max_difference"] = int(np.abs(ways["DALI"]().astype(int) - pillow).max())
        timings = interleave(ways, rounds, time.process_time)
        results[name] |= {way: asdict(timing) for way, timing in timings.items()}
    table = Table("format", "KB", "Pillow, ms", "ours, ms", "faster by", title=f"{WIDTH}x{HEIGHT} to RGB pixels")
    if dali_decoder is not None:
        table.add_column("DALI, ms")
    for name, row in results.items():
        pillow_ms, ours_ms = row["Pillow"]["median"], row["ours"]["median"]
        dali_ms = f"{row['DALI']['median']:.2f}" if "DALI" in row else ""
        cells = (f"{row['bytes'] / 1e3:.0f}", f"{pillow_ms:.2f}", f"{ours_ms:.2f}", f"{pillow_ms / ours_ms:.2f}x")
        table.add_row(name, *cells, *([dali_ms] if dali_decoder is not None else []))
    Console().print(table)
    library = dali.library() or None
    write_result("media_images", {"unit": "ms", "size": [WIDTH, HEIGHT], "dali": library, "formats": results})
