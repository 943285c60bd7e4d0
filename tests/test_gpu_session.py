"""A GPU session's failures: each is a figure of its own, the next case still runs, and the exit status tells."""

from __future__ import annotations

import re
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_session
from benchmarks.gpu_checks import GPU_TESTS, ROOT, end_of
from benchmarks.gpu_common import UNFINISHED, attempt, failures, found
from benchmarks.gpu_operators import operators
from benchmarks.gpu_towers import judge

OPTIONS = Namespace(device="cpu", size="tiny", only=None, until=float("inf"))


def broken() -> None:
    raise ValueError("at 12:4:\nand a page of source")


def test_what_raises_is_a_figure_with_its_first_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert attempt(lambda: {"us": 3.0}) == {"us": 3.0}
    assert attempt(broken) == {"failed": "ValueError: at 12:4:"}
    assert "and a page of source" in capsys.readouterr().err


def test_a_step_goes_on_after_a_case_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def step(_: Namespace) -> Any:
        yield "bad", attempt(broken)
        yield "good", 1
        broken()

    monkeypatch.setitem(gpu_session.STEPS, "peaks", step)
    options = Namespace(**vars(OPTIONS) | {"out": tmp_path, "until": time.time() + 60})
    gpu_session.run_step("peaks", options)
    figures = gpu_session.read_figures("peaks", options)
    assert figures["good"] == 1
    assert [*failures(figures)] == ["bad: ValueError: at 12:4:", "and a page of source"]


def test_what_is_not_installed_is_told_before_a_minute_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_session.missing_packages() == []
    installed = gpu_session._is_installed
    monkeypatch.setattr(
        gpu_session, "_is_installed", lambda name: name not in ("deflate", "pytest") and installed(name)
    )
    monkeypatch.setattr(sys, "argv", ["gpu_session", "--only", "build"])
    with pytest.raises(SystemExit, match="not installed: deflate, pytest; with --anyway"):
        gpu_session.main()


def test_a_step_killed_amid_a_line_costs_no_other_its_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Namespace(**vars(OPTIONS) | {"out": tmp_path, "until": time.time() + 60})
    gpu_session.lines_of(options).write_text('["build", "seconds", 1.0]\n["build", "cu')
    monkeypatch.setitem(gpu_session.STEPS, "peaks", lambda _: iter([("copy_gb_s", 2.0)]))
    gpu_session.run_step("peaks", options)
    assert gpu_session.read_figures("peaks", options) == {"copy_gb_s": 2.0}
    assert gpu_session.read_figures("build", options) == {"seconds": 1.0}


def test_a_tower_that_answers_wrongly_is_a_failure_and_keeps_its_times() -> None:
    figures: dict[str, Any] = {
        "ours": {"error": 0.012, "ms": 3.0},
        "ours, no graphs": {"error": 0.010, "ms": 4.0},
        "ours, fp8": {"error": 0.04, "ms": 2.0},
        "Hugging Face": {"error": 0.010, "ms": 9.0},
        "Hugging Face, flash-attn": {"error": 0.012, "ms": 8.0},  # theirs to answer for
    }
    judge(figures)
    assert [*failures(figures)] == ["ours: an error of 1.2e-02, over 1.1e-02"]
    assert figures["ours"]["ms"] == 3.0


def test_every_operator_is_timed_beside_the_peaks() -> None:
    figures = dict(operators(OPTIONS))
    assert not [*failures(figures)]
    assert {name.split(",")[0] for name in figures} == {"resize_patchify", "patch_embed", "vision_positions"}
    for name, figure in figures.items():
        units = ["gb_s", "tflop_s"] if name.startswith("patch_embed") else ["gb_s"]
        assert [*figure] == ["us", *(part for unit in units for part in (unit, f"{unit}_of_peak"))]
        assert min(figure.values()) > 0


def test_a_command_that_is_stopped_by_the_steps_end_says_nothing() -> None:
    hanging = (sys.executable, "-c", "import time; time.sleep(60)")
    soon = Namespace(**vars(OPTIONS) | {"until": time.time() + 1})
    figures = {"tests/test_slab.py": end_of(soon, *hanging)}
    assert not [*failures(figures)]
    assert [*found(UNFINISHED, figures)] == ["tests/test_slab.py: no time left, not done after 1 s"]


def test_a_command_that_fails_is_told_from_its_output() -> None:
    assert end_of(OPTIONS, sys.executable, "-c", "print('FAILED: no')") == "FAILED: no"
    figure = end_of(OPTIONS, sys.executable, "-c", "print('first'); print('3 failed, 1 passed'); exit(1)")
    assert figure == {"failed": "status 1: 3 failed, 1 passed", "output": "first\n3 failed, 1 passed\n"}


def test_commands_find_this_checkout_its_tests_and_what_was_carried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/carried")
    show = "import os; print(os.environ['PYTHONPATH'])"
    assert end_of(OPTIONS, sys.executable, "-c", show) == f"{ROOT}:{ROOT / 'tests'}:/carried"


@pytest.mark.parametrize(
    ("figures", "status"),
    [
        ({"ours": {"us": 1.0}}, 0),
        ({"not here": "no DALI"}, 0),
        ({"unfinished": "no time left"}, 0),
        ({"failed": "Traceback"}, 1),
        ({"tests/test_packing.py": {"failed": "status 1: 1 failed", "output": ""}}, 1),
        ({"ours": {"tried": 9, "changed": 1, "failed": "1 of 9 images changed a bit"}}, 1),
        ({"16 x 1024 patches": {"ours, fp8": {"error": 0.1, "failed": "OutOfMemoryError"}}}, 1),
    ],
)
def test_any_failure_is_named_first_and_makes_the_status_1(
    figures: dict[str, Any], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    found = {"peaks": {"copy_gb_s": 1.0}, "tiles": figures}
    monkeypatch.setattr(gpu_session, "figures_of", lambda name, _: found[name])
    monkeypatch.setattr(gpu_session, "show", lambda *_: None)
    arguments = ["gpu_session", "--device", "cpu", "--only", "peaks,tiles", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_session.main() == status
    rows = re.findall(r"│ (peaks|tiles) .*│ (.*?) *│", capsys.readouterr().out)
    assert rows[0][1].startswith("FAILED") == bool(status)


def test_every_file_that_needs_a_gpu_is_run_on_one() -> None:
    need = {
        f"tests/{file.name}"
        for file in Path(__file__).parent.glob("test_*.py")
        if re.search(r'^ +require\("cuda"\)|^from towers import.* loader', file.read_text(), re.MULTILINE)
    }
    assert need == set(GPU_TESTS)
