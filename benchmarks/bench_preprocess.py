"""Decoded pixels, and files, to patch rows: Pillow's resize alone, Hugging Face's PIL processor, ours.

    python -m benchmarks.bench_preprocess [--tables pixels jpeg ...] [--torchvision FOLDER]

One thread: milliseconds of that thread's time. All cores: wall time for as many threads as cores. Before anything is
timed, the rows of every instruction set are compared with those of the processor.

Ours writes to the same memory again and again, as a worker does to its slab, and reads pixels from numpy's, as the JPEG
decoder leaves them. The peers allocate what they return. "Kept blocks" is Pillow with `keep_decode_buffers`, as in a
worker; elsewhere it has its own settings. Hugging Face's processor by torchvision, whose bytes are others, is timed
where a folder holds it (see `benchmarks/bench_torchvision.py`).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table as Grid

from benchmarks.bench_torchvision import use_torchvision
from benchmarks.harness import interleave, on_threads, plot_speedups
from benchmarks.report import RESULTS, write_result
from rtp_mm import _core
from rtp_mm.config import load_settings
from rtp_mm.media.image import decode, keep_decode_buffers
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.preprocess.resize_order import installed_rule, resize_order
from rtp_mm.preprocess.sizes import smart_resize
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

TORCHVISION = "Hugging Face, torchvision"
PATCH, MERGE = 14, 2
MIN_PIXELS, MAX_PIXELS = 3136, 12845056  # as published for Qwen2-VL and Qwen2.5-VL
QUALITY = 90  # of JPEG and WebP

Runs = dict[str, Callable[[], object]]
Table = dict[str, dict[str, dict[str, Any]]]  # by size, by contender: a Timing


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

    @property
    def nbytes(self) -> int:
        """Of the pixels that are read and the rows that are written."""
        return 3 * (self.width * self.height + prod(self.target))

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

    has_torchvision = False

    def __init__(self, case: Case) -> None:
        self.image = photograph(case)
        self.pixels: NDArray[np.uint8] = np.array(self.image)
        self.height, self.width = case.target
        self.order = resize_order(case.height, case.width, *case.target, installed_rule())
        import transformers  # not before `use_torchvision`

        limits = {"min_pixels": MIN_PIXELS, "max_pixels": case.max_pixels}
        self.processor = transformers.Qwen2VLImageProcessorPil(**limits)
        self.by_torchvision = transformers.Qwen2VLImageProcessor(**limits) if self.has_torchvision else None
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

    def from_pixels(self) -> Runs:
        """Ours by instruction set, fastest first, after its peers."""
        size = (self.width, self.height)
        ours = {f"ours, {level}": lambda level=level: self.resize_patchify(level) for level in _core.resize_levels()}
        return {
            "Hugging Face": lambda: self.processor(self.image, return_tensors="np"),
            **self.torchvision(),
            "Pillow resize": lambda: self.image.resize(size, Image.Resampling.BICUBIC),
            "copy of the pixels": self.pixels.copy,
            **dict(reversed(ours.items())),
        }

    def torchvision(self) -> Runs:
        processor = self.by_torchvision
        return {} if processor is None else {TORCHVISION: lambda: processor(self.image, return_tensors="pt")}

    def from_file(self, format: str, **encoding: Any) -> Runs:
        """With the decode alone, Pillow's and ours, and of a JPEG libjpeg-turbo's without Pillow, beside."""
        file = io.BytesIO()
        self.image.save(file, format, quality=QUALITY, **encoding)
        data = file.getvalue()
        blob, options = Blob(data, b"", ""), PreprocessOptions()
        limits = {"max_pixels": 10**9, "allow_truncated": False, "exif_transpose": False}

        def pillow() -> Image.Image:
            return Image.open(io.BytesIO(data)).convert("RGB")

        turbo: Runs = {"libjpeg-turbo decode": lambda: simplejpeg.decode_jpeg(data, "RGB")} if format == "JPEG" else {}
        return {
            "Hugging Face": lambda: self.processor(pillow(), return_tensors="np"),
            "Pillow decode": pillow,
            **turbo,
            "our decode": lambda: decode(data, **limits),
            "ours": lambda: self.preprocessor(blob, MMUrlType.IMAGE, options, lambda _: self.rows),
        }

    def on_all_cores(self) -> Runs:
        """Threads, each with rows of its own."""
        contenders: Runs = {
            "Hugging Face": lambda: self.processor(self.image, return_tensors="np"),
            "ours": lambda: _core.resize_patchify(self.pixels, self.height, self.width, PATCH, MERGE, order=self.order),
        }
        return {name: on_threads(run, CORES, calls=2) for name, run in contenders.items()}


@contextmanager
def kept_blocks() -> Iterator[None]:
    size, kept = Image.core.get_block_size(), Image.core.get_blocks_max()
    keep_decode_buffers()
    yield
    Image.core.set_blocks_max(kept)
    Image.core.set_block_size(size)


@dataclass(frozen=True, slots=True)
class Section:
    """One table: what runs, over which sizes, by which clock."""

    title: str
    runs: Callable[[Contenders], Runs]
    cases: Sequence[Case] = CASES
    clock: Callable[[], float] = time.thread_time
    state: Callable[[], AbstractContextManager[None]] = nullcontext

    def measure(self, rounds: int) -> Table:
        """Milliseconds by size and contender."""
        table: Table = {}
        for case in track(self.cases, self.title):
            contenders = Contenders(case)
            contenders.check()
            with self.state():
                timings = interleave(self.runs(contenders), rounds, self.clock)
            table[str(case)] = {name: asdict(timing) for name, timing in timings.items()}
        return table


CORES = len(os.sched_getaffinity(0))
SECTIONS = {
    "pixels": Section("decoded pixels to rows, one thread", Contenders.from_pixels),
    "jpeg": Section("JPEG bytes to rows, one thread", lambda c: c.from_file("JPEG")),
    "jpeg-kept": Section(
        "JPEG bytes to rows, one thread, kept blocks", lambda c: c.from_file("JPEG"), state=kept_blocks
    ),
    "jpeg-progressive": Section(
        "progressive JPEG bytes to rows, one thread", lambda c: c.from_file("JPEG", progressive=True)
    ),
    "png-kept": Section(
        "PNG bytes to rows, one thread, kept blocks", lambda c: c.from_file("PNG"), CASES[:5], state=kept_blocks
    ),
    "webp": Section("WebP bytes to rows, one thread", lambda c: c.from_file("WEBP"), CASES[:5]),
    "webp-kept": Section(
        "WebP bytes to rows, one thread, kept blocks", lambda c: c.from_file("WEBP"), CASES[:5], state=kept_blocks
    ),
    "threads": Section(
        f"decoded pixels to rows, 2 images on each of {CORES} cores", Contenders.on_all_cores, clock=time.perf_counter
    ),
}


def show(title: str, table: Table) -> None:
    """Medians in milliseconds, and how many times faster than Hugging Face."""
    grid = Grid(title=title)
    grid.add_column("ms")
    for case in table:
        grid.add_column(case, justify="right")
    for name in next(iter(table.values())):
        medians = [(times["Hugging Face"]["median"], times[name]["median"]) for times in table.values()]
        grid.add_row(name, *(f"{ours:.2f} ({peer / ours:.1f}x)" for peer, ours in medians))
    Console(width=160).print(grid)


def plot(tables: dict[str, Table]) -> None:
    pixels, jpeg = (tables[SECTIONS[name].title] for name in ("pixels", "jpeg"))
    fastest = f"ours, {_core.resize_levels()[-1]}"

    def times(table: Table, case: str, peer: str, ours: str) -> float:
        return float(table[case][peer]["median"] / table[case][ours]["median"])

    speedups = {
        case: {
            "Hugging Face": times(pixels, case, "Hugging Face", fastest),
            "Pillow resize alone": times(pixels, case, "Pillow resize", fastest),
            "Hugging Face, from JPEG bytes": times(jpeg, case, "Hugging Face", "ours"),
        }
        for case in pixels
    }
    plot_speedups(RESULTS / "preprocess.png", f"{fastest}: times faster than", speedups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="of each contender")
    parser.add_argument(
        "--tables", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="the others stay as the results have them"
    )
    parser.add_argument("--torchvision", type=Path, metavar="FOLDER", help="that holds it")
    options = parser.parse_args()
    if options.torchvision:
        Contenders.has_torchvision = bool(use_torchvision(options.torchvision))
        torch.set_num_threads(1)  # as all else has, but for the table of threads
    path = RESULTS / "preprocess.json"
    measured = json.loads(path.read_text())["tables"] if path.exists() else {}
    for name in options.tables:
        section = SECTIONS[name]
        measured[section.title] = section.measure(options.rounds)
        show(section.title, measured[section.title])
    tables = {section.title: measured[section.title] for section in SECTIONS.values() if section.title in measured}
    write_result(
        "preprocess",
        {
            "unit": "ms",
            "levels": _core.resize_levels(),
            "bytes": {str(case): case.nbytes for case in CASES},
            "tables": tables,
        },
    )
    plot(tables)


if __name__ == "__main__":
    main()
