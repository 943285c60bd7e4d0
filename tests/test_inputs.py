"""What a library's caller may hand over, and what a command makes of it before a server is asked."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from rtp_mm.cli.inputs import enclosed, is_here
from rtp_mm.engine.interface import as_inputs
from rtp_mm.errors import WrongFormatError
from rtp_mm.types import MMPreprocessConfig


def test_paths_and_dictionaries_are_taken() -> None:
    [item] = as_inputs([Path("/tmp/a.png")], preprocess_configs=[{"max_pixels": 4000}])
    assert (item.url, item.config) == ("/tmp/a.png", MMPreprocessConfig(max_pixels=4000))


@pytest.mark.parametrize(
    ("urls", "reason"),
    [
        ("a.png", "got one text"),
        (Path("a.png"), "got one text or path"),
        ([b"\x89PNG"], "got bytes; bytes go as a data: URL"),
        ([None], "got NoneType"),
        ([object()], "got object"),
    ],
)
def test_what_is_no_url_is_named(urls: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        as_inputs(urls)


def test_a_file_for_a_server_elsewhere_goes_with_the_message(tmp_path: Path) -> None:
    file = tmp_path / "a b.png"
    file.write_bytes(b"pixels")
    data_url = "data:application/octet-stream;base64," + base64.b64encode(b"pixels").decode()
    assert enclosed(str(file)) == enclosed(file.as_uri()) == data_url
    assert enclosed("https://example.com/a.png") == "https://example.com/a.png"
    assert enclosed(f"{tmp_path}/../there.png") == str(tmp_path.parent / "there.png")  # that only the server sees
    with pytest.raises(WrongFormatError, match="Is a directory"):
        enclosed(str(tmp_path))


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        *((server, True) for server in ("localhost:1", "localhost", "127.0.0.1:1", "[::1]:1", "::1")),
        *((server, False) for server in ("10.0.0.7:1", "example.com", "[2001:db8::1]:1")),
    ],
)
def test_a_server_is_here_by_its_name_or_address(server: str, expected: bool) -> None:
    assert is_here(server) is expected
