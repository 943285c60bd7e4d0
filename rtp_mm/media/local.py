"""Local files: who may read which, and reading nothing but regular files.

Access is decided in three steps. `check` says at once who may name files at all. `check_path`, with which `read`
begins, resolves the path, which takes as long as a disk or a network does: until then nothing tells whether the file is
there. `read` then looks at the object that the path led to, through a descriptor that opens nothing (O_PATH): no link
swapped in between, no `..` and no device or FIFO gets past it. The last two are the same for everybody who got past the
first, so that whoever asks for the same path may share one read.
"""

from __future__ import annotations

import errno
import os
import stat
from urllib.parse import unquote_to_bytes

from rtp_mm.config import Settings
from rtp_mm.errors import DownloadFailedError, DownloadRefusedError, MMError, NotSupportedError, WrongFormatError
from rtp_mm.media.limits import START_BYTES, SizeLimit
from rtp_mm.media.urls import scheme_of
from rtp_mm.types import Caller

PATH_MAX = 4096  # Linux's, in bytes with the NUL behind it
# Asking again gives the same answer; all else (too many open files, an I/O error) may pass.
_PERMANENT = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}


def local_path(url: str) -> str:
    """The path in a `file:` URL (percent-decoded, any bytes) or the plain path itself.

    Raises `NotSupportedError` for a `file:` URL that names another host, `WrongFormatError` for no path at all,
    `DownloadRefusedError` for one that is too long.
    """
    path = url
    if scheme_of(url) == "file":
        path = url[len("file:") :]
        if path.startswith("//"):
            host, slash, path = path[2:].partition("/")
            if host.lower() not in ("", "localhost"):
                raise NotSupportedError("file: URLs may name no host but localhost")
            path = slash + path
        path = os.fsdecode(unquote_to_bytes(path))
    if not path:
        raise WrongFormatError("an empty URL")
    if "\0" in path or not _is_encodable(path):
        raise WrongFormatError("not a path that a file can have")
    if len(os.fsencode(path)) >= PATH_MAX:  # what the system says, before every part of it is looked up
        raise _failure(OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG)))
    return path


def _is_encodable(path: str) -> bool:
    try:
        os.fsencode(path)
    except UnicodeEncodeError:
        return False
    return True


class LocalFiles:
    """The rule: `MM_LOCAL_MEDIA=0`: nobody. With `MM_ALLOWED_LOCAL_MEDIA_PATH`: everybody, but only inside that folder.
    Else: local callers, anywhere.
    """

    def __init__(self, settings: Settings) -> None:
        self._is_allowed = settings.mm_local_media
        folder = settings.mm_allowed_local_media_path
        self._inside = os.path.join(os.path.realpath(folder), "") if folder is not None else ""

    def check(self, url: str, caller: Caller) -> None:
        """Raises `NotSupportedError` if this caller may read no file at all, and as `local_path`."""
        local_path(url)
        if not self._is_allowed:
            raise NotSupportedError("local files are off (MM_LOCAL_MEDIA=0)")
        if not (self._inside or caller.is_local):
            raise NotSupportedError("local files are for callers on this machine only (MM_ALLOWED_LOCAL_MEDIA_PATH)")

    def check_path(self, path: str) -> None:
        """Blocks: for a thread. Raises `NotSupportedError` if nobody may read this path, whether or not it is there."""
        if self._inside:
            self._check_inside(os.path.realpath(path))

    def read(self, path: str, limit: SizeLimit) -> bytes:
        """The whole file. Blocks: for a thread. `check` comes first.

        Raises `NotSupportedError` for what is no regular file or lies elsewhere, `DownloadRefusedError` for what is
        not there or not readable, `WrongFormatError` over the limit, `DownloadFailedError` for the rest.
        """
        try:
            self.check_path(path)
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
            try:
                return self._read(handle, limit)
            finally:
                os.close(handle)
        except OSError as error:
            raise _failure(error) from None

    def _read(self, handle: int, limit: SizeLimit) -> bytes:
        name = f"/proc/self/fd/{handle}"
        self._check_inside(os.readlink(name))
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise NotSupportedError("not a regular file")
        limit.check(status.st_size)
        with open(name, "rb") as file:
            limit.told(file.peek(START_BYTES)[:START_BYTES]).check(status.st_size)
            data = file.read(status.st_size + 1)  # one more, to see a file that grows
        if len(data) != status.st_size:
            raise DownloadFailedError("the file changed while it was read")
        return data

    def _check_inside(self, real_path: str) -> None:
        if not real_path.startswith(self._inside):
            raise NotSupportedError("outside the folder of MM_ALLOWED_LOCAL_MEDIA_PATH")


def _failure(error: OSError) -> MMError:
    text = f"cannot read the file: {error.strerror}"
    return DownloadRefusedError(text) if error.errno in _PERMANENT else DownloadFailedError(text)
