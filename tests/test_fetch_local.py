"""Local files: who may read which, and that nothing but a regular file inside is ever read."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import threading
from pathlib import Path
from typing import Any

import pytest
from fetching import REMOTE

from rtp_mm.config import load_settings
from rtp_mm.errors import DownloadFailedError, DownloadRefusedError, MMError, NotSupportedError, WrongFormatError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.limits import SizeLimit
from rtp_mm.media.local import LocalFiles
from rtp_mm.types import LIBRARY_CALLER, Caller, MultimodalInput

LOCAL = Caller(peer="ipv4:127.0.0.1:4711", is_local=True)
CALLERS = [LOCAL, REMOTE, LIBRARY_CALLER]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The allowed folder, with a file inside, one outside and every trap in between."""
    folder = tmp_path / "allowed"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"inside")
    (tmp_path / "secret.jpg").write_bytes(b"outside")
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "secret.jpg").write_bytes(b"outside")
    (folder / "link.jpg").symlink_to(tmp_path / "secret.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "home.jpg").symlink_to(folder / "cat.jpg")
    (tmp_path / "way-in").symlink_to(folder)
    return folder


async def fetch(url: str | Path, caller: Caller = LOCAL, **options: Any) -> bytes:
    async with Fetcher(load_settings(**options)) as fetcher:
        data = (await fetcher.fetch(MultimodalInput(str(url)), caller)).data
    assert isinstance(data, bytes)
    return data


async def may(url: str | Path, caller: Caller, **options: Any) -> bool:
    """What is said before a file is opened, by `fetch` or by something else."""
    async with Fetcher(load_settings(**options)) as fetcher:
        try:
            fetcher.check_access(MultimodalInput(str(url)), caller)
            await fetcher.check_path(MultimodalInput(str(url)))
        except NotSupportedError:
            return False
    return True


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Paths that were resolved, and whether on the test's own thread, the event loop's."""
    seen: list[tuple[str, bool]] = []
    realpath = os.path.realpath

    def watched(path: str) -> str:
        seen.append((path, threading.current_thread() is threading.main_thread()))
        return realpath(path)

    monkeypatch.setattr("rtp_mm.media.local.os.path.realpath", watched)
    return seen


async def test_a_local_caller_reads_anywhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    odd = folder / "50% of #1?.jpg"
    odd.write_bytes(b"odd")
    for url in (folder / "cat.jpg", "cat.jpg", "../allowed/cat.jpg", f"file://{folder}/cat.jpg", "file:cat.jpg",
                f"FILE://localhost{folder}/c%61t.jpg", folder / "up" / "allowed" / "cat.jpg"):  # fmt: skip
        assert await fetch(url) == b"inside"
    assert await fetch(odd) == b"odd"  # a plain path is no URL
    assert await fetch(odd.as_uri()) == b"odd"
    assert await fetch(folder / "link.jpg", LIBRARY_CALLER) == b"outside"


async def test_a_remote_caller_reads_nowhere(folder: Path) -> None:
    for url in (folder / "cat.jpg", f"file://{folder}/cat.jpg", "no-such-file", "/"):
        assert not await may(url, REMOTE)
        with pytest.raises(NotSupportedError, match="callers on this machine only"):
            await fetch(url, REMOTE)


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.peer)
async def test_with_a_folder_everybody_reads_inside_it_and_nowhere_else(folder: Path, caller: Caller) -> None:
    options = {"mm_allowed_local_media_path": folder}
    for path in ("cat.jpg", "home.jpg", "up/allowed/cat.jpg", "../way-in/cat.jpg", "./../allowed/cat.jpg"):
        assert await may(folder / path, caller, **options)
        assert await fetch(f"{folder}/{path}", caller, **options) == b"inside"
    outside = ("link.jpg", "../secret.jpg", "up/secret.jpg", "../allowed-too/secret.jpg", "..", "../no-such-file")
    for path in outside:
        for url in (f"{folder}/{path}", f"file://{folder}/{path}", f"file://{folder}/{path.replace('.', '%2e')}"):
            assert not await may(url, caller, **options)
            with pytest.raises(NotSupportedError, match="outside the folder of MM_ALLOWED_LOCAL_MEDIA_PATH"):
                await fetch(url, caller, **options)


async def test_a_folder_given_by_a_link_is_the_folder_behind_it(folder: Path) -> None:
    options = {"mm_allowed_local_media_path": folder.parent / "way-in"}
    assert await fetch(folder / "cat.jpg", REMOTE, **options) == b"inside"
    assert not await may(folder.parent / "secret.jpg", REMOTE, **options)
    assert await may("/etc/hostname", REMOTE, mm_allowed_local_media_path=Path("/"))


def test_a_link_swapped_in_after_the_check_is_caught_on_the_open_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = LocalFiles(load_settings(mm_allowed_local_media_path=folder))
    limit = SizeLimit(1000, "LIMIT")
    path = folder / "cat.jpg"
    files.check(str(path), REMOTE)
    files.check_path(str(path))
    assert files.read(str(path), limit) == b"inside"
    opened = os.open

    def swapped(*args: Any) -> int:
        files.check_path(str(path))
        path.unlink()
        path.symlink_to(folder.parent / "secret.jpg")
        return opened(*args)

    monkeypatch.setattr("rtp_mm.media.local.os.open", swapped)
    with pytest.raises(NotSupportedError, match="outside"):
        files.read(str(path), limit)
    assert path.is_symlink()


@pytest.mark.parametrize("caller", CALLERS, ids=lambda caller: caller.peer)
async def test_local_media_off_is_off_for_all(folder: Path, caller: Caller) -> None:
    for options in ({}, {"mm_allowed_local_media_path": folder}):
        assert not await may(folder / "cat.jpg", caller, mm_local_media=False, **options)
        with pytest.raises(NotSupportedError, match="MM_LOCAL_MEDIA=0"):
            await fetch(folder / "cat.jpg", caller, mm_local_media=False, **options)


async def test_only_regular_files_are_read_and_nothing_else_is_opened(folder: Path) -> None:
    os.mkfifo(folder / "fifo")  # opening it would wait for a writer
    with socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(folder / "socket"))
    assert stat.S_ISCHR(os.stat("/dev/zero").st_mode)
    for path in (folder / "fifo", folder / "socket", folder, "/dev/zero", "/dev/stdin", "/proc/self/fd/0", "."):
        with pytest.raises(NotSupportedError, match="not a regular file"):
            await fetch(path)
    (folder / "zero").symlink_to("/dev/zero")
    with pytest.raises(NotSupportedError, match="outside"):
        await fetch(folder / "zero", mm_allowed_local_media_path=folder)


async def test_a_file_of_another_host_is_refused() -> None:
    for url in ("file://example.com/etc/hostname", "file://etc/hostname", "file://127.0.0.1/etc/hostname"):
        with pytest.raises(NotSupportedError, match="no host but localhost"):
            await fetch(url)


async def test_a_missing_file_is_a_refusal(folder: Path) -> None:
    for path in (folder / "none.jpg", folder / "cat.jpg" / "x", "x" * 5000):
        with pytest.raises(DownloadRefusedError, match="cannot read the file: "):
            await fetch(path)


async def test_a_path_that_is_too_long_is_not_looked_up(folder: Path, resolved: list[Any]) -> None:
    options = {"mm_allowed_local_media_path": folder}
    fetcher = Fetcher(load_settings(**options))
    resolved.clear()  # of the folder itself
    for caller in (LOCAL, REMOTE):
        with pytest.raises(DownloadRefusedError, match="cannot read the file: File name too long"):
            fetcher.check_access(MultimodalInput(f"{folder}/" + "a/" * 2048), caller)
    assert not resolved


async def test_no_path_is_resolved_on_the_event_loop(folder: Path, resolved: list[tuple[str, bool]]) -> None:
    """It takes 10 ms for 2000 folders, and for ever where a network's disk does not answer."""
    good, bad = str(folder / "cat.jpg"), f"{folder}/../secret.jpg"
    async with Fetcher(load_settings(mm_allowed_local_media_path=folder)) as fetcher:
        resolved.clear()
        for path in (good, bad):
            fetcher.check_access(MultimodalInput(path), REMOTE)
            assert fetcher.at_hand(MultimodalInput(path)) is None
        assert not resolved
        await fetcher.fetch(MultimodalInput(good), REMOTE)
        await fetcher.check_path(MultimodalInput(good))
        for refuses in (fetcher.fetch(MultimodalInput(bad), REMOTE), fetcher.check_path(MultimodalInput(bad))):
            with pytest.raises(NotSupportedError, match="outside the folder"):
                await refuses
    assert resolved == [(path, False) for path in (good, good, bad, bad)]


async def test_nothing_outside_is_opened_and_nothing_tells_whether_it_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("rtp_mm.media.local.os.open")
    said = set()
    for path in ("../secret.jpg", "../no-such-file", "link.jpg", "up/no-such/file", "../.."):
        with pytest.raises(MMError) as caught:
            await fetch(f"{folder}/{path}", REMOTE, mm_allowed_local_media_path=folder)
        said.add((caught.value.name, caught.value.status, str(caught.value)))
    assert len(said) == 1


async def test_a_shortage_of_ours_is_no_refusal(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_descriptors(*args: Any, **kwargs: Any) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr("rtp_mm.media.local.os.open", no_descriptors)
    with pytest.raises(DownloadFailedError, match="Too many open files"):
        await fetch(folder / "cat.jpg")


async def test_the_size_is_checked_before_reading(folder: Path) -> None:
    path = folder / "large"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole of a terabyte
    with pytest.raises(WrongFormatError, match=r"1099511627776 bytes or more, over the limit of 1073741824 \(MM_VIDEO"):
        await fetch(path, mm_image_max_file_size_kb=1)
    os.truncate(path, 1024)
    assert len(await fetch(path, mm_image_max_file_size_kb=1)) == 1024


@pytest.mark.parametrize("url", ["", "file:", "file://", "a\0b", "file:///a%00b", "\ud800"])
async def test_what_is_no_path_is_refused(url: str) -> None:
    with pytest.raises(WrongFormatError):
        await fetch(url)


async def test_an_empty_file_is_an_error(folder: Path) -> None:
    (folder / "empty").touch()
    with pytest.raises(WrongFormatError, match="the source is empty"):
        await fetch(folder / "empty")


async def test_a_file_that_changes_while_it_is_read_is_an_error() -> None:
    with pytest.raises(DownloadFailedError, match="changed while it was read"):
        await fetch("/proc/self/environ")  # says that it has no bytes, and has some


def test_no_descriptor_is_left_open(folder: Path) -> None:
    files = LocalFiles(load_settings())
    before = len(os.listdir("/proc/self/fd"))
    assert files.read(str(folder / "cat.jpg"), SizeLimit(100, "LIMIT")) == b"inside"
    for path, limit in ((folder, 100), (folder / "cat.jpg", 1), (folder / "none", 100)):
        with pytest.raises(MMError):
            files.read(str(path), SizeLimit(limit, "LIMIT"))
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_mount_that_hangs_holds_up_nobody_who_reads_no_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More reads than any pool has threads; a large data URL takes one, too."""
    may_read = threading.Event()
    monkeypatch.setattr(LocalFiles, "read", lambda *args: may_read.wait(60) and b"late")
    data_url = "data:;base64," + "AAAA" * (1 << 18)
    async with Fetcher(load_settings()) as fetcher:
        hanging = [asyncio.create_task(fetcher.fetch(MultimodalInput(str(tmp_path / "x")), LOCAL)) for _ in range(64)]
        await asyncio.sleep(0)
        blob = await asyncio.wait_for(fetcher.fetch(MultimodalInput(data_url), LOCAL), 30)
        assert blob.nbytes == 3 << 18
        assert not any(task.done() for task in hanging)
        may_read.set()
        assert {(await task).data for task in hanging} == {b"late"}
