"""Files of other schemes, read by fsspec: opt-in, within the same limits, with the same errors."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import fetching
import fsspec
import pytest
from blake3 import blake3
from fetching import REMOTE
from fsspec.implementations.memory import MemoryFileSystem

from rtp_mm.config import load_settings
from rtp_mm.errors import (
    DownloadFailedError,
    DownloadRefusedError,
    MMError,
    NotSupportedError,
    StartError,
    WrongFormatError,
)
from rtp_mm.media import filesystems
from rtp_mm.media.fetch import Fetcher
from rtp_mm.types import MMUrlType, MultimodalInput

BODY = bytes(range(256)) * 20_000  # 5 MB
fetch = partial(fetching.fetch, mm_allowed_schemes="memory")
refusal = partial(fetching.refusal, mm_allowed_schemes="memory")


@pytest.fixture(autouse=True)
def store() -> Iterator[Any]:
    """The memory file system, which is one for the whole process."""
    store = fsspec.filesystem("memory")
    store.pipe("/bucket/x.jpg", BODY)
    yield store
    store.rm("/", recursive=True)


async def test_a_file_comes_back_whole_with_its_hash() -> None:
    blob = await fetch("memory://bucket/x.jpg")
    assert blob.data == BODY
    assert blob.content_hash == blake3(BODY).digest()
    assert blob.source == "memory://bucket/x.jpg"
    assert (await fetch("Memory://bucket/x.jpg")).data == BODY


async def test_no_scheme_is_read_unless_it_is_allowed() -> None:
    for schemes, named in (((), ""), ("s3, GS", "s3, gs, ")):
        caught = await refusal("memory://bucket/x.jpg", mm_allowed_schemes=schemes)
        assert type(caught) is NotSupportedError
        allowed = f"http, https, file, data, {named}plain paths (MM_ALLOWED_SCHEMES)"
        assert str(caught) == f"scheme 'memory'; allowed are {allowed}"
    assert type(await refusal("ftp://h/x")) is NotSupportedError


@pytest.mark.parametrize(
    "url", ["memory://bucket/x.jpg::file:///etc/passwd", "memory://::file:///etc/passwd", "memory://a::b://c"]
)
async def test_a_chain_of_urls_cannot_lead_elsewhere(url: str) -> None:
    caught = await refusal(url)
    assert type(caught) is NotSupportedError
    assert "chain" in str(caught)


@pytest.mark.parametrize("schemes", ["file", "http,s3", "DATA", "local", "s3:", "s3 gs", ","])
def test_schemes_with_rules_of_their_own_stop_the_start(schemes: str) -> None:
    with pytest.raises(StartError, match="MM_ALLOWED_SCHEMES"):
        load_settings(mm_allowed_schemes=schemes)


async def test_the_size_limit_holds_before_and_while_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    limit = len(BODY) // 1024
    assert (await fetch("memory://bucket/x.jpg", mm_image_max_file_size_kb=limit)).data == BODY
    assert type(await refusal("memory://bucket/x.jpg", mm_image_max_file_size_kb=limit - 1)) is WrongFormatError

    read = 0

    class Endless:
        size = None

        def read(self, count: int) -> bytes:
            nonlocal read
            read += count
            return bytes(count)

        def close(self) -> None:
            closed.set()

    closed = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_, **__: Endless())
    caught = await refusal("memory://bucket/x.jpg", mm_image_max_file_size_kb=2048)
    assert "over the limit of 2097152 (MM_IMAGE_MAX_FILE_SIZE_KB)" in str(caught)
    assert read == 2097152 + filesystems.CHUNK_BYTES
    assert closed.wait(10)


async def test_the_pixel_limit_ends_the_reading(store: Any) -> None:
    header = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR" + (101).to_bytes(4, "big") * 2
    store.pipe("/bucket/large.png", header + bytes(5_000_000))
    caught = await refusal("memory://bucket/large.png", mm_max_pixels=10_000)
    assert "101x101 is 10201 pixels" in str(caught)
    assert (await fetch("memory://bucket/large.png", mm_max_pixels=10_201)).nbytes == 5_000_024


@pytest.mark.parametrize(
    ("raised", "error", "text"),
    [
        (FileNotFoundError("secret"), DownloadRefusedError, "cannot read the file (FileNotFoundError)"),
        (PermissionError("secret"), DownloadRefusedError, "cannot read the file (PermissionError)"),
        (IsADirectoryError("secret"), DownloadRefusedError, "cannot read the file (IsADirectoryError)"),
        (OSError(5, "secret"), DownloadFailedError, "cannot read the file for now (OSError)"),
        (TimeoutError("secret"), DownloadFailedError, "cannot read the file for now (TimeoutError)"),
        (type("ClientError", (Exception,), {})("secret"), DownloadFailedError,
         "cannot read the file for now (ClientError)"),
        (ImportError("Install s3fs"), NotSupportedError,
         "the server lacks a package for this scheme (fsspec, or the scheme's own)"),
    ],
    ids=repr,
)  # fmt: skip
async def test_what_a_store_raises_is_told_by_its_kind(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, error: type[MMError], text: str
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise raised

    monkeypatch.setattr(MemoryFileSystem, "open", fail)
    caught = await refusal("memory://bucket/x.jpg")
    assert type(caught) is error
    assert str(caught) == text


async def test_what_is_not_there_is_refused() -> None:
    assert type(await refusal("memory://bucket/none.jpg")) is DownloadRefusedError
    assert type(await refusal("s3://bucket/x", mm_allowed_schemes="s3")) is NotSupportedError  # no s3fs here
    caught = await refusal("nosuch://bucket/x", mm_allowed_schemes="nosuch")
    assert "cannot read the file for now (ValueError)" in str(caught)


async def test_a_store_that_hangs_costs_its_caller_the_timeout_and_nobody_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()
    monkeypatch.setattr(MemoryFileSystem, "open", lambda *_, **__: release.wait(60))
    try:
        caught = await refusal("memory://bucket/x.jpg", mm_fetch_timeout_ms=50)
    finally:
        release.set()
    assert type(caught) is DownloadFailedError
    assert str(caught) == "the source was silent for 0.05 s (MM_FETCH_TIMEOUT_MS)"


async def test_what_was_read_is_kept_for_the_ttl(store: Any) -> None:
    now = 0.0
    settings = load_settings(mm_allowed_schemes="memory", mm_bytes_cache_ttl_s=60)
    async with Fetcher(settings, clock=lambda: now) as fetcher:
        item = MultimodalInput("memory://bucket/x.jpg", MMUrlType.IMAGE)
        first = await fetcher.fetch(item, REMOTE)
        store.pipe("/bucket/x.jpg", b"changed")
        assert await fetcher.fetch(item, REMOTE) is first
        now = 60.0
        assert (await fetcher.fetch(item, REMOTE)).data == b"changed"


def test_fsspec_is_imported_only_when_a_scheme_needs_it() -> None:
    code = "import sys, rtp_mm.media.fetch as f; from rtp_mm.config import load_settings as s; "
    code += "f.Fetcher(s(mm_allowed_schemes='s3')); sys.exit('fsspec' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
