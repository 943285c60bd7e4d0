"""MM_VIDEO_RULE=hf follows what a checkpoint says of its videos: as `Qwen2VLVideoProcessor` of the same folder does."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hugging_face_video import VideoProcessor

from rtp_mm.config import load_settings
from rtp_mm.errors import StartError, WrongFormatError
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.preprocess.video_config import VIDEO_FILES
from rtp_mm.preprocess.video_rule import VideoRule
from rtp_mm.types import PreprocessOptions

FPS = {"fps": 2.0}  # which ours takes where a checkpoint does not say; Hugging Face's callers have to
RATES = (12.5, 23.976, 24, 25, 29.97, 30, 50, 60, 120)
ANY = PreprocessOptions()


def write(folder: Path, file: str = "video_preprocessor_config.json", key: str | None = None, **rules: Any) -> Path:
    (folder / file).write_text(json.dumps(rules if key is None else {key: rules}))
    return folder


def rule_of(folder: Path, **options: Any) -> VideoRule:
    settings = load_settings(None, mm_video_rule="hf", **options)
    return MediaPreprocessor.from_checkpoint(folder, PUBLISHED_PROCESSOR, settings).video.rule


@pytest.mark.parametrize(
    "rules",
    [
        FPS,
        {"fps": 1},
        {"fps": 0.7, "min_frames": 10},
        {"fps": 8, "max_frames": 33},
        {"fps": 3, "min_frames": 7, "max_frames": 5},
        {"num_frames": 32},
        {"num_frames": 7},  # 8, and 5 are 4
        {"num_frames": 5},
        FPS | {"do_sample_frames": True},
        FPS | {"size": {"shortest_edge": 3136, "longest_edge": 1003520}},
        FPS | {"min_pixels": 50_000, "max_pixels": 200_000, "cap_pixels_per_frame": False},
        FPS | {"cap_pixels_per_frame": True},
        FPS | {"fps": 6, "cap_pixels_per_frame": True, "max_video_tokens": 24_000},
    ],
    ids=str,
)
def test_frames_and_sizes_are_hugging_faces(rules: dict[str, Any], tmp_path: Path) -> None:
    folder = write(tmp_path, **rules)
    ours, theirs = rule_of(folder), VideoProcessor(folder)
    chance = random.Random(str(rules))
    for _ in range(300):
        total, fps = chance.randrange(32, 40_000), chance.choice(RATES)
        frames = ours.choose_frames(total, fps, ANY)
        assert frames == theirs.frames(total, fps), (total, fps)
        height, width = (round(2 ** chance.uniform(5, 12)) for _ in range(2))
        assert ours.frame_size(height, width, len(frames), ANY) == theirs.size(height, width, len(frames))


def test_a_requests_figures_win(tmp_path: Path) -> None:
    folder = write(tmp_path, fps=1, min_frames=10, max_frames=64)
    ours, theirs = rule_of(folder), VideoProcessor(folder)
    chance = random.Random(0)
    for _ in range(500):
        total, fps = chance.randrange(32, 40_000), chance.choice(RATES)
        asked = {"fps": chance.choice([3, 5]), "min_frames": 12, "max_frames": chance.choice([16, 31, 200])}
        given = {name: asked[name] for name in asked if chance.random() < 0.5}
        assert ours.choose_frames(total, fps, PreprocessOptions(**given)) == theirs.frames(total, fps, **given)


@pytest.mark.parametrize(("file", "key"), VIDEO_FILES)
def test_every_file_that_hugging_face_reads_is_read(file: str, key: str | None, tmp_path: Path) -> None:
    for other, other_key in reversed(VIDEO_FILES):
        write(tmp_path, other, other_key, fps=5)
        if (other, other_key) == (file, key):
            write(tmp_path, file, key, fps=1)
            break
    assert rule_of(tmp_path).fps == 1
    assert len(VideoProcessor(tmp_path).frames(300, 30)) == len(rule_of(tmp_path).choose_frames(300, 30, ANY)) == 10


def test_the_other_rule_reads_none_of_it(tmp_path: Path) -> None:
    settings = load_settings(None, mm_video_rule="qwen")
    rule = MediaPreprocessor.from_checkpoint(write(tmp_path, fps=1), PUBLISHED_PROCESSOR, settings).video.rule
    assert rule == VideoRule.published("qwen", 28, 2)


def test_a_checkpoints_figures_are_in_the_cache_key(tmp_path: Path) -> None:
    settings = load_settings(None, mm_video_rule="hf")
    keys = {
        MediaPreprocessor.from_checkpoint(write(tmp_path, **rules), PUBLISHED_PROCESSOR, settings).cache_key
        for rules in ({}, {"fps": 1}, {"num_frames": 8}, {"max_frames": 100}, {"cap_pixels_per_frame": True})
    }
    assert len(keys) == 5


def test_a_fixed_number_of_frames_is_all_that_is_taken(tmp_path: Path) -> None:
    """Hugging Face refuses a shorter clip and `fps` too; the other two it passes over, here they are not ignored."""
    folder = write(tmp_path, num_frames=16)
    rule = rule_of(folder)
    assert len(rule.choose_frames(16, 30, ANY)) == 16
    assert rule.choose_frames(1, 30, ANY) == [0]
    with pytest.raises(WrongFormatError, match="takes 16 frames of every clip, this one has 15"):
        rule.choose_frames(15, 30, ANY)
    with pytest.raises(ValueError, match="exceeds"):
        VideoProcessor(folder).frames(15, 30)
    for asked in ({"fps": 1}, {"min_frames": 8}, {"max_frames": 8}):
        with pytest.raises(WrongFormatError, match="no fps, min_frames or max_frames"):
            rule.choose_frames(300, 30, PreprocessOptions(**asked))
    with pytest.raises(ValueError, match="mutually exclusive"):
        VideoProcessor(folder).frames(300, 30, fps=1)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"fps": 0}, r"fps=0 must be a positive number"),
        ({"fps": "2"}, r"fps='2' must be a positive number"),
        ({"fps": True}, r"fps=True must be a positive number"),
        ({"fps": float("inf")}, r"fps=inf must be"),
        ({"fps": float("nan")}, r"fps=nan must be"),
        ({"min_frames": 2.5}, r"min_frames=2.5 must be a positive integer"),
        ({"max_frames": -4}, r"max_frames=-4 must be a positive integer"),
        ({"num_frames": 0}, r"num_frames=0 must be a positive integer"),
        ({"num_frames": 1}, r"num_frames=1 is 0 frames of every clip, not 1 to 768 \(MM_MAX_FRAMES\)"),
        ({"num_frames": 770}, r"num_frames=770 is 770 frames of every clip"),
        ({"num_frames": 8, "fps": 2}, "fps and num_frames exclude each other"),
        ({"do_sample_frames": True}, "do_sample_frames without fps or num_frames"),
        ({"cap_pixels_per_frame": 1}, "cap_pixels_per_frame=1 must be true or false"),
        ({"cap_pixels_per_frame": True, "max_video_tokens": 0}, "max_video_tokens=0 must be a positive integer"),
        ({"temporal_patch_size": 1}, "disagrees with itself"),
        ({"image_mean": [0.5, 0.5, 0.5]}, "image_mean and image_std must be those of the checkpoint's images"),
        ({"do_resize": False}, "do_resize=False is not supported"),
        ({"size": {"height": 28, "width": 28}}, "size=.* is not supported"),
    ],
    ids=str,
)
def test_what_cannot_be_followed_ends_the_start(rules: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=message):
        rule_of(write(tmp_path, **rules))
