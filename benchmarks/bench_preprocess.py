"""Decoded pixels, and JPEG bytes, to patch rows: Pillow's resize alone, Hugging Face's PIL processor, ours.

    python -m benchmarks.bench_preprocess

One thread: milliseconds of that thread's time. All cores: wall time for as many threads as cores. Before anything is
timed, the rows of every instruction set are compared with those of the processor.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import skimage.data
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import Qwen2VLImageProcessorPil

from benchmarks.harness import Timing, interleave, on_threads, plot_speedups
from benchmarks.report import RESULTS, write_result
from rtp_mm import _core
from rtp_mm.config import load_settings
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.preprocess.resize_order import installed_rule, resize_order
from rtp_mm.preprocess.sizes import smart_resize
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

PATCH, MERGE = 14, 2
MIN_PIXELS, MAX_PIXELS = 3136, 12845056  # as published for Qwen2-VL and Qwen2.5-VL
JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Case:
    """A photograph of this size, resized within `max_pixels`."""

    width: int
    height: int
    max_pixels: int = MAX_PIXELS

    @property
    def target(self) -> tuple[int, int]:
        """(height, width) after resizing."""
        return smart_resize(self.height, self.width, PATCH * MERGE, MIN_PIXELS, self.max_pixels)

    def __str__(self) -> str:
        height, width = self.target
        return f"{self.width}x{self.height} to {width}x{height}"


CASES = (
    Case(640, 480),
    Case(1024, 768),
    Case(2048, 1365),
    Case(3840, 2160),
    Case(3840, 2160, max_pixels=1003520),
    Case(8064, 6048, max_pixels=1003520),
)


def photograph(case: Case) -> Image.Image:
    """A real one, enlarged: its content does not matter to a resize, but to a JPEG decoder."""
    photo = Image.fromarray(skimage.data.coffee())
    return photo.resize((case.width, case.height), Image.Resampling.LANCZOS)


class Contenders:
    """All ways from one photograph to its rows."""

    def __init__(self, case: Case) -> None:
        self.image = photograph(case)
        self.pixels: NDArray[np.uint8] = np.asarray(self.image)
        self.height, self.width = case.target
        self.order = resize_order(case.height, case.width, *case.target, installed_rule())
        file = io.BytesIO()
        self.image.save(file, "JPEG", quality=JPEG_QUALITY)
        self.jpeg = file.getvalue()
        self.processor = Qwen2VLImageProcessorPil(min_pixels=MIN_PIXELS, max_pixels=case.max_pixels)
        config = ImageProcessorConfig(PATCH, MERGE, 2, MIN_PIXELS, case.max_pixels, (0.5,) * 3, (0.5,) * 3)
        self.preprocessor = ImagePreprocessor.from_config(config, load_settings())
        self.rows = np.empty((self.height // PATCH * (self.width // PATCH), 3 * PATCH * PATCH), np.uint8)

    def check(self) -> None:
        """Every level's rows are the processor's, before it turns them to floats."""
        output = self.processor(self.image, do_rescale=False, do_normalize=False, return_tensors="np")
        frames = output["pixel_values"].reshape(len(self.rows), 3, 2, PATCH * PATCH)
        expected = frames[:, :, 0].reshape(self.rows.shape)
        for level in _core.resize_levels():
            if not np.array_equal(self.resize_patchify(level), expected):
                raise SystemExit(f"level {level} differs from Hugging Face")

    def resize_patchify(self, level: str | None = None) -> NDArray[np.uint8]:
        return _core.resize_patchify(
            self.pixels, self.height, self.width, PATCH, MERGE, order=self.order, level=level, out=self.rows
        )

    def from_pixels(self) -> dict[str, Callable[[], object]]:
        """Ours by instruction set, fastest first, after its peers."""
        size = (self.width, self.height)
        ours = {f"ours, {level}": lambda level=level: self.resize_patchify(level) for level in _core.resize_levels()}
        return {
            "Hugging Face": lambda: self.processor(self.image, return_tensors="np"),
            "Pillow resize": lambda: self.image.resize(size, Image.Resampling.BICUBIC),
            "copy of the pixels": self.pixels.copy,
            **dict(reversed(ours.items())),
        }

    def from_jpeg(self) -> dict[str, Callable[[], object]]:
        blob, options = Blob(self.jpeg, b"", ""), PreprocessOptions()

        def decode() -> Image.Image:
            return Image.open(io.BytesIO(self.jpeg)).convert("RGB")

        return {
            "Hugging Face": lambda: self.processor(decode(), return_tensors="np"),
            "Pillow decode": decode,
            "ours": lambda: self.preprocessor(blob, MMUrlType.IMAGE, options),
        }

    def on_all_cores(self, cores: int) -> dict[str, Callable[[], object]]:
        """Threads, each with rows of its own."""
        order = self.order
        contenders = {
            "Hugging Face": lambda: self.processor(self.image, return_tensors="np"),
            "ours": lambda: _core.resize_patchify(self.pixels, self.height, self.width, PATCH, MERGE, order=order),
        }
        return {name: on_threads(run, cores, calls=2) for name, run in contenders.items()}


def show(title: str, results: dict[str, dict[str, Timing]]) -> None:
    """Medians in milliseconds, and how many times faster than Hugging Face."""
    table = Table(title=title)
    table.add_column("ms")
    for case in results:
        table.add_column(case, justify="right")
    for name in next(iter(results.values())):
        cells = [f"{t[name].median:.2f} ({t['Hugging Face'].median / t[name].median:.1f}x)" for t in results.values()]
        table.add_row(name, *cells)
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="of each contender")
    options = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    pixels, jpeg, threads = {}, {}, {}
    for case in track(CASES, "sizes"):
        contenders = Contenders(case)
        contenders.check()
        name = str(case)
        pixels[name] = interleave(contenders.from_pixels(), options.rounds, time.thread_time)
        jpeg[name] = interleave(contenders.from_jpeg(), options.rounds, time.thread_time)
        threads[name] = interleave(contenders.on_all_cores(cores), max(3, options.rounds // 4))
    tables = {
        "decoded pixels to rows, one thread": pixels,
        "JPEG bytes to rows, one thread": jpeg,
        f"decoded pixels to rows, 2 images on each of {cores} cores": threads,
    }
    for title, results in tables.items():
        show(title, results)
    fastest = f"ours, {_core.resize_levels()[-1]}"
    speedups = {
        case: {
            "Hugging Face": pixels[case]["Hugging Face"].median / pixels[case][fastest].median,
            "Pillow resize alone": pixels[case]["Pillow resize"].median / pixels[case][fastest].median,
            "Hugging Face, from JPEG bytes": jpeg[case]["Hugging Face"].median / jpeg[case]["ours"].median,
        }
        for case in pixels
    }
    write_result(
        "preprocess",
        {
            "command": "python -m benchmarks.bench_preprocess",
            "unit": "ms",
            "levels": _core.resize_levels(),
            "tables": {
                title: {case: {n: asdict(t) for n, t in timings.items()} for case, timings in results.items()}
                for title, results in tables.items()
            },
        },
    )
    plot_speedups(RESULTS / "preprocess.png", f"{fastest}: times faster than", speedups)


if __name__ == "__main__":
    main()
