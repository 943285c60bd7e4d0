"""Sounds at the command line: limits of pixels are refused, whoever would be asked."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from fake_engine import serving

from rtp_mm.cli import main


def test_options_of_pictures_are_refused_for_sounds(
    tiny_qwen2_audio: Path, tiny_qwen2_5_vl: Path, sound_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound, out = [str(sound_path)], ["--out", str(tmp_path / "look.png")]
    heard = ["--checkpoint", str(tiny_qwen2_audio)]
    for option in ("--min-pixels", "--max-pixels", "--fps", "--min-frames", "--max-frames"):
        for command in (
            ["compare", *sound, *heard],
            ["embed", *sound, *heard],
            ["embed", *sound, "--type", "audio", "--server", "1.2.3.4:5"],
            ["embed", *sound, "--type", "audio", "--checkpoint", str(tiny_qwen2_5_vl)],
            ["look", *sound, *heard, *out],
        ):
            assert main([*command, option, "50000"]) == 1
            assert option in (error := capsys.readouterr().err)
            assert "to videos; none to sounds" in error
    assert main(["look", *sound, *heard, *out]) == 0
    assert main(["look", *sound, *heard, *out, "--max-pixels", "0"]) == 2, "no area"


@pytest.mark.parametrize("option", ["--min-pixels", "--max-pixels", "--max-frames"])
async def test_a_server_of_sounds_is_sent_no_limits_of_pixels(
    option: str, sound_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a sound is, it tells from the bytes; what it takes, its client asks first."""
    for model, status, asked in (("qwen2_audio", 1, 0), ("qwen2_vl", 0, 1), ("模型", 0, 1)):
        async with serving(model=model) as server:
            command = ["embed", str(sound_path), "--server", server.grpc_address, option, "50000"]
            assert await asyncio.to_thread(main, command) == status, capsys.readouterr().err
            assert len(server.engine.asked) == asked
    assert "--min-pixels and --max-pixels apply to images and to frames of videos" in capsys.readouterr().err
