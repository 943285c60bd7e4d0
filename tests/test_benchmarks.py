"""What benchmarks measure, and what a result says of where it comes from."""

from __future__ import annotations

import json
import subprocess
from argparse import ArgumentTypeError
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import readme
from benchmarks.bench_memory import target_bytes
from benchmarks.bench_service import MIXED, SCENARIOS
from benchmarks.bench_tower import Batch
from benchmarks.load import Outcome, pooled
from benchmarks.report import measured_at
from rtp_mm.config import load_settings


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


def test_of_mixed_images_every_size_comes_as_often_by_http_as_in_the_request() -> None:
    scenario = SCENARIOS["mixed"]
    first, period = 12345, len(scenario.sizes)
    urls = [scenario.url("http://photos", number) for number in range(first, first + 2 * period)]
    fetched = Counter(url.split("/")[3] for url in urls if url.startswith("http://photos/"))
    assert fetched == MIXED
    assert sum(url.startswith("data:image/jpeg;base64,") for url in urls) == period
    assert len(set(urls)) == len(urls)


def test_runs_as_one_keep_all_answers_and_errors_and_the_highest_memory() -> None:
    runs = [
        Outcome(1.0, [0.1], Counter(UNAVAILABLE=1), [0.2], 3.0, 70),
        Outcome(2.0, [0.3], Counter(UNAVAILABLE=2), [], 4.0, 60),
    ]
    assert pooled(runs) == Outcome(3.0, [0.1, 0.3], Counter(UNAVAILABLE=3), [0.2], 7.0, 70)
    assert {"cpu_s": 7.0, "peak_pss_bytes": 70}.items() <= pooled(runs).summary().items()
    assert "cpu_s" not in Outcome(1.0, [0.1]).summary()


def test_batches_are_read_as_they_are_written_and_stand_behind_one_image() -> None:
    texts = ["64", "256", "4x256", "16x256", "1024"]
    assert [str(batch) for batch in sorted(map(Batch.parse, reversed(texts)))] == texts
    for wrong in ("65", "x64", "0x64", "4x", "many"):
        with pytest.raises(ArgumentTypeError, match=wrong):
            Batch.parse(wrong)


def test_the_table_of_towers_counts_the_images_of_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {"ours bf16": 500.0, "Hugging Face bf16": 1000.0, "Hugging Face fp32": 750.0}
    row = {
        "peak_gflops": 200.0,
        "gflops": {"ours bf16": 120.0},
        "milliseconds": {name: {"median": median} for name, median in sides.items()},
    }
    batches = {"256": row, "4x256": row | {"peak_of": "amx"}}
    (tmp_path / "tower_a_amx.json").write_text(json.dumps({"patches": batches}))
    monkeypatch.setattr(readme, "RESULTS", tmp_path)
    _, _, one, four = readme.tower().splitlines()
    assert one == "| `a` | float32 | 256 | 500 | 2 | 60% | 2.0x | 1.5x |"
    assert four == "| `a` | AMX | 4x256 | 500 | 8 | 60% | 2.0x | 1.5x |"


def test_memory_may_be_the_towers_weights_all_that_is_kept_and_a_part_for_each_worker(tmp_path: Path) -> None:
    tower = {"visual.a": torch.zeros(10, dtype=torch.bfloat16), "visual.b": torch.zeros(3)}
    save_file(tower | {"lm_head": torch.zeros(1000)}, tmp_path / "model.safetensors")
    kept = {"mm_bytes_cache_mb": 1, "mm_patch_cache_mb": 2, "mm_embedding_cache_mb": 3, "mm_slab_mb": 4}
    settings = load_settings(checkpoint_path=tmp_path, mm_preprocess_max_workers=2, **kept)
    assert target_bytes(settings, tmp_path) == 32 + (10 << 20) + 420_000_000
