"""The command line as a whole: its help, its errors, and the commands that are a few lines."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rtp_mm.cli import app, main
from rtp_mm.cli.options import markdown_table
from rtp_mm.cli.outputs import writing
from rtp_mm.errors import StartError


def test_what_ends_a_write_is_one_line() -> None:
    with pytest.raises(StartError, match=r"a\.png cannot be written: .*No space"), writing(Path("a.png")):
        raise OSError(28, "No space left on device")


@pytest.mark.parametrize("arguments", [["options"], ["options", "--markdown"]])
def test_a_full_disk_behind_stdout_is_one_line(arguments: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "rtp_mm.cli", *arguments]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "the output cannot be written: No space left on device\n")


@pytest.mark.parametrize("arguments", [["embed", "x.jpg", "--checkpoint"], ["serve", "--checkpoint_path"]])
def test_without_torch_it_says_so(arguments: list[str], tmp_path: Path) -> None:
    script = "import sys; sys.modules['torch'] = None; from rtp_mm.cli import main; sys.exit(main(sys.argv[1:]))"
    run = [sys.executable, "-c", script, *arguments, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split(": ")[-1]) == (1, "torch is not installed\n")


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command in app.registered_commands:
        name = (command.name or command.callback.__name__).replace("_", "-")
        assert name in shown
        assert main([name, "--help"]) == 0


def test_errors_with_a_reason_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "file"
    file.touch()
    for arguments, reason in [
        (["init-checkpoint", str(tmp_path), "--size", "2b"], "there is no qwen2_5_vl 2b"),
        (["embed", "x.jpg", "--checkpoint", str(tmp_path), "--save", "x.txt"], "--save must end in"),
        (["embed", "x.jpg", "--checkpoint", str(tmp_path), "--save", str(tmp_path / "none" / "x.npz")], "be written"),
        (["look", "x.jpg", "--checkpoint", str(tmp_path), "--out", "look.txt"], "--out must end in .png or .jpg"),
        (["look", "x.jpg", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "none" / "x.png")], "be written"),
        (["init-checkpoint", str(file)], "cannot be written: [Errno 17] File exists"),
        (["embed", "x.jpg"], "name a model"),
        (["embed", "x.jpg", "--checkpoint", str(tmp_path), "--server", "localhost:1"], "leave one out"),
        (["embed", "x.jpg", "--checkpoint", str(tmp_path / "none")], "is no folder"),
        (["look", "x.jpg", "--checkpoint", str(tmp_path)], ""),
    ]:
        assert main(arguments) == 1
        message = capsys.readouterr().err
        assert reason in message
        assert message.strip().count("\n") == 0


def test_init_checkpoint_writes_one(tmp_path: Path) -> None:
    arguments = ["init-checkpoint", str(tmp_path), "--family", "qwen2_vl", "--seed", "3", "--sparse-llm"]
    assert main(arguments) == 0
    assert {file.name for file in tmp_path.iterdir()} == {
        "config.json",
        "preprocessor_config.json",
        "model.safetensors",
    }
    assert main(arguments) == 1


def test_serve_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("rtp_mm.start_server.main", lambda arguments: seen.append(arguments) or 7)
    assert main(["serve", "--start_port", "12345", "--help"]) == 7
    assert seen == [["--start_port", "12345", "--help"]]


def test_options_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["options"]) == 0
    assert "START_PORT" in capsys.readouterr().out
    assert main(["options", "--markdown"]) == 0
    assert capsys.readouterr().out == markdown_table()
