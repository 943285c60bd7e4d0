"""`rtp-mm look`: its pictures show what the tower sees."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clips import encode, moving
from numpy.typing import NDArray
from PIL import Image
from sounds import encode as encode_sound
from sounds import sine, speech

from rtp_mm.cli import main
from rtp_mm.cli.look import CAPTION, SCALE, draw, rebuild
from rtp_mm.cli.spectrogram import AXIS, BAND, CUT_MARK
from rtp_mm.models.qwen2_audio import PUBLISHED_RULE
from rtp_mm.preprocess.log_mel import mel_filters
from rtp_mm.types import Patches


def test_look_shows_the_resized_photograph(
    tiny_qwen2_5_vl: Path, photo: bytes, photo_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "look.png"
    assert main(["look", f"file:{photo_path}", "--checkpoint", str(tiny_qwen2_5_vl), "--out", str(out)]) == 0
    assert "448 x 308 pixels, 32 x 22 patches, 176 tokens" in capsys.readouterr().out
    seen = np.asarray(Image.open(out))[1::SCALE, 1::SCALE]  # beside the thin lines
    resized = np.asarray(Image.open(io.BytesIO(photo)).convert("RGB").resize((448, 308), Image.Resampling.BICUBIC))
    off_windows = np.ix_(np.arange(308) % 112 > 1, np.arange(448) % 112 > 1)
    assert np.array_equal(seen[off_windows], resized[off_windows])


def test_rebuild_undoes_the_patch_order(photos: dict[str, NDArray[np.uint8]]) -> None:
    """Rows in (block row, block column, row, column) order, columns in (channel, y, x); raster order would differ."""
    image = photos["coffee"][:112, :168]
    p, m = 14, 2
    cells = image.reshape(4, m, p, 6, m, p, 3)
    rows = np.ascontiguousarray(cells.transpose(0, 3, 1, 4, 6, 2, 5)).reshape(8 * 12, 3 * p * p)
    raster = np.ascontiguousarray(cells.transpose(0, 1, 3, 4, 6, 2, 5)).reshape(8 * 12, 3 * p * p)
    assert np.array_equal(rebuild(Patches(rows, (1, 8, 12)), p, m)[0], image)
    assert not np.array_equal(rebuild(Patches(raster, (1, 8, 12)), p, m)[0], image)


def test_look_shows_a_clips_frames_with_their_times(
    tiny_qwen2_5_vl: Path, photos: dict[str, NDArray[np.uint8]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, out = tmp_path / "clip.avi", tmp_path / "look.png"
    frames = moving(photos["coffee"])
    clip.write_bytes(encode(frames, "mjpeg", "avi", {}))
    assert main(["look", str(clip), "--checkpoint", str(tiny_qwen2_5_vl), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "frames of" in said
    sheet = np.asarray(Image.open(out).convert("L")).astype(int)
    count = int(said.split(": ")[1].split()[0])
    columns = math.isqrt(count - 1) + 1
    width, height = sheet.shape[1] // columns, sheet.shape[0] // -(-count // columns)
    first = sheet[: height - CAPTION, :width]
    expected = np.asarray(Image.fromarray(frames[0]).convert("L").resize((width, height - CAPTION))).astype(int)
    wrong = np.asarray(Image.fromarray(frames[-1]).convert("L").resize((width, height - CAPTION))).astype(int)
    assert np.abs(first - expected).mean() < 5 < np.abs(first - wrong).mean()
    assert sheet[height - CAPTION : height, :width].max() > 200, "a caption"


def test_look_shows_a_sounds_spectrogram(
    tiny_qwen2_audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tone of 440 Hz is a bright line in the band that holds it."""
    sound, out = tmp_path / "tone.wav", tmp_path / "look.png"
    sound.write_bytes(encode_sound(sine(2.0), 16000))
    assert main(["look", str(sound), "--checkpoint", str(tiny_qwen2_audio), "--out", str(out)]) == 0
    assert "2.00 s, 200 frames of 128 mel bands, 50 tokens" in capsys.readouterr().out
    seen = np.asarray(Image.open(out)).astype(int)
    assert seen.shape == (BAND * 128 + AXIS, 200, 3)
    loudest = 127 - seen[: BAND * 128, 100].sum(axis=-1).argmax() // BAND
    edges = mel_filters(PUBLISHED_RULE)[:, loudest].nonzero()[0][[0, -1]] * 40  # Hz of the FFT's bins
    assert edges[0] <= 440 <= edges[1]


def test_look_marks_where_a_sound_was_cut(tiny_qwen2_audio: Path, tmp_path: Path, capsys: Any) -> None:
    pictures = []
    for seconds in (30, 31):
        sound, out = tmp_path / "noise.wav", tmp_path / "look.png"
        sound.write_bytes(encode_sound(speech(16000 * seconds), 16000))
        assert main(["look", str(sound), "--checkpoint", str(tiny_qwen2_audio), "--out", str(out)]) == 0
        assert ("cut at 30 s" in capsys.readouterr().out) == (seconds > 30)
        pictures.append(np.asarray(Image.open(out)))
    whole, cut = pictures
    assert whole.shape == cut.shape
    assert tuple(cut[10, -1]) == CUT_MARK != tuple(whole[10, -1])


def test_draw_marks_windows_only_where_there_are_any() -> None:
    black = np.zeros((224, 224, 3), np.uint8)
    with_windows = np.asarray(draw(black, 14, 2, 112))
    without = np.asarray(draw(black, 14, 2, None))
    assert tuple(with_windows[5, 112 * SCALE]) == (255, 210, 0)
    assert tuple(without[5, 112 * SCALE]) != (255, 210, 0)
    assert without[5, 28 * SCALE].sum() > without[5, 14 * SCALE].sum() > without[5, 7 * SCALE].sum() == 0


def test_look_says_what_it_knows(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "my_model"}')
    assert main(["look", "x.png", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "look.png")]) == 1
    assert "look knows what qwen2_vl, qwen2_5_vl, qwen2_audio see, not my_model" in capsys.readouterr().err
