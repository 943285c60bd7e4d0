"""What a result says of where it comes from."""

from __future__ import annotations

import subprocess
from pathlib import Path

from benchmarks.report import measured_at


def git(root: Path, *arguments: str) -> str:
    author = ("-c", "user.name=name", "-c", "user.email=name@example.com")
    return subprocess.run(["git", "-C", root, *author, *arguments], check=True, capture_output=True, text=True).stdout


def test_a_result_names_its_commit_and_says_where_the_code_had_changed(tmp_path: Path) -> None:
    code, result, document = tmp_path / "code.py", tmp_path / "benchmarks/results/a.json", tmp_path / "README.md"
    result.parent.mkdir(parents=True)
    for file in (code, result, document):
        file.write_text("before")
    assert measured_at(tmp_path) == {}
    git(tmp_path, "init")
    assert measured_at(tmp_path) == {}  # no commit yet
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "all")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert measured_at(tmp_path) == {"commit": head}

    result.write_text("after")  # what a benchmark itself writes
    document.write_text("after")
    assert measured_at(tmp_path) == {"commit": head}
    code.write_text("after")
    assert measured_at(tmp_path) == {"commit": f"{head}-dirty"}


def test_a_folder_within_a_checkout_of_something_else_has_no_commit(tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "none")
    assert measured_at(tmp_path / "copy") == {}
