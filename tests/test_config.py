"""Options: flags over environment over defaults, and one line that says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rtp_mm.config import Settings, load_settings, unknown_variables
from rtp_mm.errors import StartError


@pytest.fixture(autouse=True)
def _no_options_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_flags_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("START_PORT", "1000")
    monkeypatch.setenv("ACT_TYPE", "fp16")
    settings = load_settings(["--start_port", "2000"])
    assert (settings.start_port, settings.act_type) == (2000, "fp16")
    assert load_settings([]).start_port == 1000


def test_headers_are_a_json_object(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOWNLOAD_HEADERS", '{"X-Key": "a,b"}')
    assert load_settings().download_headers == {"X-Key": "a,b"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("START_PORT", "abc"),
        ("START_PORT", "65535"),
        ("START_PORT", "0"),
        ("ACT_TYPE", "int8"),
        ("VIT_SEPARATION", "3"),
        ("USE_LOCAL_PREPROCESS", "2"),
        ("MM_TIMEOUT_MS", "-1"),
        ("MM_LOCAL_MEDIA", "maybe"),
        ("DOWNLOAD_HEADERS", "{"),
        ("DOWNLOAD_HEADERS", '{"X": "a\\nb"}'),
        ("MM_ALLOWED_LOCAL_MEDIA_PATH", "/no/such/folder"),
        ("MM_MAX_PIXELS", "178956971"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_it(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartError) as caught:
        load_settings([])
    assert name.lower() in str(caught.value).lower()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("ACT_TYPE", "INT8", r"^ACT_TYPE='INT8': input should be 'bf16', 'fp16' or 'fp32'$"),
        ("USE_LOCAL_PREPROCESS", "maybe", r"^USE_LOCAL_PREPROCESS='maybe': must be 0 or 1, or true or false$"),
        ("USE_LOCAL_PREPROCESS", "2", r"^USE_LOCAL_PREPROCESS='2': must be 0 or 1, or true or false$"),
    ],
)
def test_a_wrong_choice_says_what_there_is(
    name: str, value: str, allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StartError, match=allowed):
        load_settings([])


@pytest.mark.parametrize(
    ("value", "act_type"),
    [
        *[(name, "bf16") for name in ("bf16", "BF16", "bfloat16", "BFloat16", "bp16")],
        *[(name, "fp16") for name in ("fp16", "FP16", "float16")],
        *[(name, "fp32") for name in ("fp32", "FP32", "float32", "FLOAT32")],
    ],
)
def test_a_dtype_has_the_names_that_rtp_llm_takes(value: str, act_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACT_TYPE", value)
    assert load_settings([]).act_type == act_type
    monkeypatch.delenv("ACT_TYPE")
    assert load_settings(["--act_type", value]).act_type == load_settings(act_type=value).act_type == act_type


@pytest.mark.parametrize(
    ("value", "is_local"), [("1", True), ("true", True), ("True", True), ("0", False), ("off", False)]
)
def test_preprocessing_is_local_as_rtp_llm_says_it(value: str, is_local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And as other options that are one of two."""
    for name in ("USE_LOCAL_PREPROCESS", "DISABLE_ACCESS_LOG"):
        monkeypatch.setenv(name, value)
        assert getattr(load_settings([]), name.lower()) is is_local
        monkeypatch.delenv(name)
        assert getattr(load_settings([f"--{name.lower()}", value]), name.lower()) is is_local
    assert load_settings(use_local_preprocess=int(is_local)).use_local_preprocess is is_local


def test_an_unknown_flag_is_named() -> None:
    with pytest.raises(StartError, match=r"--start_prot.*--help"):
        load_settings(["--start_prot", "1"])


def test_help_lists_every_option_with_its_meaning() -> None:
    run = subprocess.run(
        [sys.executable, "-m", "rtp_mm.start_server", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"COLUMNS": "300"},
    )
    for name, field in Settings.model_fields.items():
        assert f"--{name}" in run.stdout
        assert field.description
        assert field.description in run.stdout, name


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder would otherwise be the working directory, open to every caller."""
    for name in ("MM_ALLOWED_LOCAL_MEDIA_PATH", "CHECKPOINT_PATH", "MODEL_TYPE", "MM_MODEL_MODULE"):
        monkeypatch.setenv(name, "")
    settings = load_settings([])
    assert settings.mm_allowed_local_media_path is None
    assert settings.checkpoint_path is None
    assert load_settings(["--mm_allowed_local_media_path", ""]).mm_allowed_local_media_path is None


@pytest.mark.parametrize("name", ["MM_AUTH_TOKEN", "MM_AUTH_TOKEN_FILE"])
def test_an_empty_token_is_no_way_to_serve_everybody(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "")
    with pytest.raises(StartError, match=f"{name} is set and empty"):
        load_settings([])


def test_a_model_of_a_hub_is_not_downloaded() -> None:
    with pytest.raises(StartError, match=r"is no folder; .* hf download Qwen/Qwen2.5-VL-3B-Instruct"):
        load_settings(None, checkpoint_path="Qwen/Qwen2.5-VL-3B-Instruct").checkpoint_folder()
    with pytest.raises(StartError, match=r"is no folder$"):
        load_settings(None, checkpoint_path="/models/none").checkpoint_folder()


def test_a_wrong_header_does_not_print_the_right_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOWNLOAD_HEADERS", '{"Authorization": "sekrit", "X": ["a"]}')
    with pytest.raises(StartError, match="DOWNLOAD_HEADERS") as caught:
        load_settings([])
    assert "sekrit" not in str(caught.value)


def test_a_flag_may_have_hyphens() -> None:
    assert load_settings(["--start-port", "1", "--checkpoint-path=/a-b"]).start_port == 1
    assert load_settings(["--checkpoint-path=/a-b"]).checkpoint_path == Path("/a-b")


def test_a_misspelt_option_is_named_with_what_is_close() -> None:
    with pytest.raises(StartError, match=r"^checkpont_path is no option, checkpoint_path is; nonsense is no option$"):
        load_settings(None, checkpont_path="/a", nonsense=1)
    names = ["MM_TIMOUT_MS", "MM_TIMEOUT_MS", "mm_slab_mb", "MM_OF_ANOTHER_PROGRAM", "HOME", "CHECKPOINT_PTH", "LANG"]
    assert unknown_variables(names) == [
        "CHECKPOINT_PTH is no option, CHECKPOINT_PATH is",
        "MM_OF_ANOTHER_PROGRAM is no option",
        "MM_TIMOUT_MS is no option, MM_TIMEOUT_MS is",
    ]
