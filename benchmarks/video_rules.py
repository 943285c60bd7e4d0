"""Our choice of frames and of their size beside that of the libraries that publish the rules, over random clips.

qwen-vl-utils' own `fetch_video` and transformers' own `Qwen2VLVideoProcessor` run; only what decodes and resizes pixels
is replaced, by what notes the indices and the size that it is asked for. Both need torchvision to be imported; see
`benchmarks/bench_torchvision.py`.
"""

from __future__ import annotations

import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch

from rtp_mm.errors import WrongFormatError
from rtp_mm.preprocess.video_rule import RuleName, VideoRule
from rtp_mm.types import PreprocessOptions

CASES = 20_000
RATES = (12.5, 15, 23.976, 24, 25, 29.97, 30, 50, 59.94, 60, 120)
MOST_EXAMPLES = 10


class Case(NamedTuple):
    """A clip and what a request says of it."""

    total: int
    rate: float
    height: int
    width: int
    asked: Mapping[str, int]


class Choice(NamedTuple):
    frames: list[int]
    size: tuple[int, int]  # height, width


Choose = Callable[[Case], Choice | None]  # None: refused


def cases(seed: int, askable: Mapping[str, tuple[int, int]]) -> Iterator[Case]:
    """Half of the requests say something; figures are drawn evenly on a logarithmic scale."""
    chance = random.Random(seed)

    def draw(least: float, most: float) -> int:
        return round(least * (most / least) ** chance.random())

    while True:
        height, width = draw(2, 4320), draw(2, 4320)
        if max(height, width) <= 200 * min(height, width):
            asked = {name: draw(*bounds) for name, bounds in askable.items() if chance.random() < 0.2}
            if ("height" in asked) != ("width" in asked):  # qwen-vl-utils takes both or none
                asked = {name: value for name, value in asked.items() if name not in ("height", "width")}
            yield Case(draw(2, 200_000), chance.choice(RATES), height, width, asked)


def ours(name: RuleName) -> Choose:
    rule = replace(VideoRule.published(name, 28, 2), server_max_frames=1 << 30)

    def choose(case: Case) -> Choice | None:
        options = PreprocessOptions(**case.asked)
        try:
            frames = rule.choose_frames(case.total, case.rate, options)
            return Choice(frames, rule.frame_size(case.height, case.width, len(frames), options))
        except WrongFormatError:
            return None

    return choose


# --- theirs


class _Reader:
    """In place of decord's, of a clip that is told as "total rate"."""

    def __init__(self, clip: str) -> None:
        total, self._rate = clip.split()
        self._total = int(total)

    def __len__(self) -> int:
        return self._total

    def get_avg_fps(self) -> float:
        return float(self._rate)

    def get_batch(self, indices: list[int]) -> Any:
        return SimpleNamespace(asnumpy=lambda: np.zeros((len(indices), 1, 1, 3), np.uint8))


def qwen_vl_utils() -> Choose:
    decord: Any = ModuleType("decord")
    decord.VideoReader = _Reader
    sys.modules["decord"] = decord
    os.environ["FORCE_QWENVL_VIDEO_READER"] = "decord"
    from qwen_vl_utils import vision_process

    read = vision_process.VIDEO_READER_BACKENDS["decord"]
    names = {"height": "resized_height", "width": "resized_width"}

    def choose(case: Case) -> Choice | None:
        asked = {names.get(name, name): value for name, value in case.asked.items()}
        sizes: list[list[int]] = []

        def read_larger(element: dict[str, Any]) -> tuple[torch.Tensor, Any, float]:
            video, metadata, rate = read(element)
            return video.expand(-1, -1, case.height, case.width), metadata, rate

        def resize(video: torch.Tensor, size: list[int], **_: Any) -> torch.Tensor:
            sizes.append(size)
            return torch.empty(0)

        backends = dict.fromkeys(("decord", "torchvision"), read_larger)
        with (
            patch.dict(vision_process.VIDEO_READER_BACKENDS, backends),
            patch.object(vision_process.transforms.functional, "resize", resize),
        ):
            element = {"video": f"{case.total} {case.rate}", **asked}
            try:
                _, metadata = vision_process.fetch_video(element, return_video_metadata=True)
            except (ValueError, AssertionError, ZeroDivisionError):
                return None
        return Choice(metadata["frames_indices"], (sizes[0][0], sizes[0][1])) if min(sizes[0]) > 0 else None

    return choose


def transformers() -> Choose:
    from tests.hugging_face_video import VideoProcessor

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps({"fps": 2.0}))
        processor = VideoProcessor(Path(folder))

    def choose(case: Case) -> Choice | None:
        try:
            frames = processor.frames(case.total, case.rate, **case.asked)
            return Choice(frames, processor.size(case.height, case.width, len(frames)))
        except (ValueError, RuntimeError, ZeroDivisionError):
            return None

    return choose


def compare(name: str, mine: Choose, theirs: Choose, drawn: Iterator[Case]) -> dict[str, Any]:
    """How many of `CASES` come out alike, and some that do not."""
    outcomes: Counter[str] = Counter()
    examples = []
    for _, case in zip(range(CASES), drawn, strict=False):
        choices = mine(case), theirs(case)
        match choices:
            case None, None:
                outcome = "both refuse"
            case None, _:
                outcome = "only ours refuses"
            case _, None:
                outcome = "only theirs refuses"
            case Choice() as own, Choice() as other:
                frames = "same frames" if own.frames == other.frames else "other frames"
                outcome = f"{frames}, {'same size' if own.size == other.size else 'other size'}"
        outcomes[outcome] += 1
        if "other" in outcome or "only" in outcome:
            told = [None if c is None else {"frames": len(c.frames), "size": c.size} for c in choices]
            examples.append({**case._asdict(), "outcome": outcome, "ours": told[0], "theirs": told[1]})
    print(name, dict(outcomes))
    return {"cases": CASES, "outcomes": dict(outcomes), "differ": examples[:MOST_EXAMPLES]}


def agreement() -> dict[str, Any]:
    """Of both libraries."""
    import logging

    logging.disable(logging.WARNING)  # qwen-vl-utils says of every clip what it cannot have
    counts = {"fps": (1, 60), "min_frames": (1, 200), "max_frames": (1, 2000)}
    pixels = {"min_pixels": (784, 400_000), "max_pixels": (3136, 4_000_000), "height": (2, 4000), "width": (2, 4000)}
    return {
        "qwen-vl-utils": compare("qwen", ours("qwen"), qwen_vl_utils(), cases(0, counts | pixels)),
        "transformers": compare("hf", ours("hf"), transformers(), cases(1, counts)),
    }
