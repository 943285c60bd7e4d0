"""Frame choice and frame sizes, against known values and transformers' own functions; what a checkpoint may say of
them is in `tests/test_video_config.py`. qwen-vl-utils cannot be imported without torchvision: its rule is written again
here, and a committed benchmark compares with the original.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import torch
from hugging_face_video import VideoProcessor

from rtp_mm.errors import WrongFormatError
from rtp_mm.preprocess.video_rule import RuleName, VideoRule, _spans, _spread
from rtp_mm.types import PreprocessOptions

QWEN = VideoRule.published("qwen", 28, 2)
HF = VideoRule.published("hf", 28, 2)
ANY = PreprocessOptions()
TOKEN = 28 * 28
RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "torchvision.json"


def totals_and_counts() -> list[tuple[int, int]]:
    chance = random.Random(0)
    totals = [*range(2, 800, 37), *(chance.randrange(800, 200_000) for _ in range(40))]
    return [(total, n) for total in totals for n in (2, 4, 6, 10, 14, 32, 64, 100, 250, 500, 766, 768) if n <= total]


def test_frames_are_where_torch_puts_them() -> None:
    for total, count in totals_and_counts():
        assert _spread(total, count) == torch.linspace(0, total - 1, count).round().long().tolist(), (total, count)
        assert _spans(total, count) == torch.arange(0, total, total / count).int().tolist(), (total, count)


def test_exact_arithmetic_would_choose_other_frames() -> None:
    """Why the rule counts in float32."""
    exact = [[round(i * (t - 1) / (n - 1)) for i in range(n)] == _spread(t, n) for t, n in totals_and_counts()]
    assert not all(exact)


@pytest.mark.parametrize(
    ("total", "fps", "options", "chosen"),
    [
        (300, 30, ANY, 20),  # 10 s at 2 a second
        (9000, 30, ANY, 600),
        (18000, 30, ANY, 768),  # 10 minutes: the most
        (30, 30, ANY, 4),  # 1 s: the least
        (3, 30, ANY, 2),  # as many as there are, evenly
        (1, 30, ANY, 1),
        (299, 29.97, ANY, 18),  # 19.95, and even
        (300, 30, PreprocessOptions(fps=1), 10),
        (300, 30, PreprocessOptions(fps=60), 300),  # never a frame twice
        (300, 30, PreprocessOptions(min_frames=31), 32),  # the limits are rounded to even, too
        (9000, 30, PreprocessOptions(max_frames=65), 64),
        (9000, 30, PreprocessOptions(max_frames=64, min_frames=100), 64),
    ],
)
def test_the_count_is_the_published_one(total: int, fps: float, options: PreprocessOptions, chosen: int) -> None:
    frames = QWEN.choose_frames(total, fps, options)
    assert len(frames) == chosen
    assert frames == sorted(set(frames))
    assert (frames[0], frames[-1]) == (0, total - 1)


def smart_nframes(total: int, fps: float, asked: float, least: int, most: int | None) -> int:
    """qwen-vl-utils' rule, written again."""
    low = 2 * -(-least // 2)
    high = 2 * ((min(768, total) if most is None else most) // 2)
    count = min(min(max(total / fps * asked, low), high), total)
    return 2 * math.floor(count / 2)


def test_counts_agree_with_the_rule_read_again() -> None:
    chance = random.Random(1)
    for _ in range(500):
        total, fps = chance.randrange(2, 20_000), chance.choice([23.976, 24, 25, 29.97, 30, 50, 60])
        options = PreprocessOptions(
            fps=chance.choice([None, 1, 3, 10]),
            min_frames=chance.choice([None, 2, 7, 40]),
            max_frames=chance.choice([None, 5, 64, 300]),
        )
        expected = smart_nframes(total, fps, options.fps or 2.0, options.min_frames or 4, options.max_frames)
        assert len(QWEN.choose_frames(total, fps, options)) == expected


def test_the_committed_comparison_with_the_originals_found_no_other_choice() -> None:
    """`python -m benchmarks.bench_torchvision`. Theirs refuses what shrinks to no patch at all."""
    libraries = json.loads(RESULT.read_text())["rules"]
    assert set(libraries) == {"qwen-vl-utils", "transformers"}
    for result in libraries.values():
        outcomes = result["outcomes"]
        assert outcomes.keys() <= {"same frames, same size", "both refuse", "only theirs refuses"}
        assert outcomes["same frames, same size"] > 0.8 * result["cases"] >= 16_000
        assert outcomes.get("only theirs refuses", 0) < 0.01 * result["cases"]


@pytest.fixture(scope="module")
def hugging_face(tmp_path_factory: pytest.TempPathFactory) -> VideoProcessor:
    folder = tmp_path_factory.mktemp("published")
    (folder / "preprocessor_config.json").write_text("{}")
    return VideoProcessor(folder)


@pytest.mark.parametrize(("total", "fps"), [(300, 30), (299, 29.97), (1000, 24), (77, 12.5), (9000, 30)])
def test_hugging_faces_frames_are_at_the_start_of_equal_spans(
    total: int, fps: float, hugging_face: VideoProcessor
) -> None:
    expected = hugging_face.frames(total, fps, fps=2.0)
    assert HF.choose_frames(total, fps, ANY) == expected != QWEN.choose_frames(total, fps, ANY)


def test_hugging_faces_frames_and_sizes_are_its_own(hugging_face: VideoProcessor) -> None:
    chance = random.Random(2)
    for _ in range(2000):
        total, rate = chance.randrange(12, 20_000), chance.choice([23.976, 24, 25, 29.97, 30, 50, 60])
        asked = {"fps": chance.choice([1, 2, 3, 10]), "min_frames": chance.choice([2, 7, 12]), "max_frames": 300}
        frames = HF.choose_frames(total, rate, PreprocessOptions(**asked))
        assert frames == hugging_face.frames(total, rate, **asked), (total, rate, asked)
        height, width = (round(math.exp(chance.uniform(math.log(20), math.log(4000)))) for _ in range(2))
        assert HF.frame_size(height, width, len(frames), ANY) == hugging_face.size(height, width, len(frames))


@pytest.mark.parametrize("name", ["qwen", "hf"])
@pytest.mark.parametrize("most", [0, 1])
def test_no_frames_is_refused(name: RuleName, most: int) -> None:
    rule = VideoRule.published(name, 28, 2)
    if most:
        with pytest.raises(WrongFormatError, match="at least 2 frames"):
            rule.choose_frames(100, 30, PreprocessOptions(max_frames=most))
    else:
        assert len(rule.choose_frames(100, 30, PreprocessOptions(max_frames=None))) == 6


def test_more_frames_than_the_server_grants_are_refused() -> None:
    rule = VideoRule("qwen", 28, 2, TOKEN, 10 * TOKEN, server_max_frames=100)
    assert len(rule.choose_frames(90, 1, ANY)) == 90
    with pytest.raises(WrongFormatError, match="MM_MAX_FRAMES"):
        rule.choose_frames(9000, 30, PreprocessOptions(max_frames=2000))


@pytest.mark.parametrize(
    ("height", "width", "frames", "options", "size"),
    [
        (1080, 1920, 20, ANY, (560, 1008)),  # 768 tokens at most: 720
        (1080, 1920, 768, ANY, (336, 644)),  # 115200 tokens over 384 pairs: 300 a frame at most
        (100, 100, 20, ANY, (336, 336)),  # 128 tokens at least
        (1080, 1920, 20, PreprocessOptions(max_pixels=200 * TOKEN), (280, 504)),
        (1080, 1920, 768, PreprocessOptions(max_pixels=768 * TOKEN), (336, 644)),  # asking for more does not help
        (1080, 1920, 20, PreprocessOptions(height=280, width=560), (280, 560)),
        (1080, 1920, 20, PreprocessOptions(height=1120, width=1120), (1120, 1120)),  # as large as an image
        (100, 100, 20, PreprocessOptions(min_pixels=16 * TOKEN), (112, 112)),
        (10, 1900, 20, PreprocessOptions(min_pixels=16 * TOKEN), (28, 1904)),  # a side of less than half a token is one
    ],
)
def test_frames_have_the_published_size(
    height: int, width: int, frames: int, options: PreprocessOptions, size: tuple[int, int]
) -> None:
    assert QWEN.frame_size(height, width, frames, options) == size


def test_hugging_face_takes_less_than_half_a_token_for_nothing() -> None:
    assert HF.frame_size(10, 1900, 20, PreprocessOptions(min_pixels=16 * TOKEN)) == (28, 1568)


def test_hugging_faces_frames_share_no_budget() -> None:
    assert HF.frame_size(1080, 1920, 768, ANY) == HF.frame_size(1080, 1920, 4, ANY) == (560, 1008)


def test_bad_limits_are_refused() -> None:
    with pytest.raises(WrongFormatError, match="min_pixels"):
        HF.frame_size(100, 100, 4, PreprocessOptions(min_pixels=1000, max_pixels=999))
