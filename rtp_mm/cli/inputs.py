"""What a command is given: a URL and its bytes, a checkpoint's family, options that do not go together with them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

from pybase64 import b64encode

from rtp_mm.config import Settings
from rtp_mm.errors import StartError, WrongFormatError
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.local import local_path
from rtp_mm.media.urls import scheme_of
from rtp_mm.models.gpt_init_model_parameters import read_json
from rtp_mm.models.qwen2_audio import FAMILY
from rtp_mm.server.security import is_loopback
from rtp_mm.types import LIBRARY_CALLER, Blob, MMUrlType, MultimodalInput, PreprocessOptions


def absolute(url: str) -> str:
    """A path as seen from here, so that a server with another working directory finds the same file.

    Raises `MMError` for a `file:` URL that names none.
    """
    scheme = scheme_of(url)
    if scheme == "file":
        return Path(os.path.abspath(local_path(url))).as_uri()
    return url if scheme else os.path.abspath(url)


def enclosed(url: str) -> str:
    """For a server on another machine: a file that is here as a data URL, any other URL as `absolute` has it. Raises
    `MMError`.
    """
    if scheme_of(url) not in ("", "file"):
        return url
    path = Path(local_path(url) if scheme_of(url) else url)
    if not path.exists():
        return absolute(url)  # of a file system that only the server sees
    try:
        return "data:application/octet-stream;base64," + b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise WrongFormatError(f"{path}: {error.strerror}") from None


def is_here(server: str) -> bool:
    """Whether a server's `host[:port]` is this machine, by its name or address."""
    host = server.rpartition(":")[0] or server
    return host == "localhost" or is_loopback(host.strip("[]")) or is_loopback(server)


def fetch(url: str, settings: Settings, mm_type: MMUrlType) -> Blob:
    """The bytes behind a URL, for a trusted caller. Raises `MMError`."""

    async def once() -> Blob:
        async with Fetcher(settings) as fetcher:
            return await fetcher.fetch(MultimodalInput(absolute(url), mm_type), LIBRARY_CALLER)

    return asyncio.run(once())


def family_of(checkpoint: Path) -> str | None:
    """As `config.json` has it. Raises `StartError` where the folder holds no model."""
    family: str | None = read_json(checkpoint / "config.json").get("model_type")
    return family


def takes_sounds(checkpoint: Path) -> bool:
    """Raises `StartError` where the folder holds no model."""
    return family_of(checkpoint) == FAMILY


def check_picture_options(
    options: PreprocessOptions, family: Callable[[], str | None], mm_type: MMUrlType = MMUrlType.DEFAULT
) -> None:
    """Raises `StartError` for any options where a sound is asked for, or the model takes sounds. Its family is asked
    for only then.
    """
    if options == PreprocessOptions():
        return
    if mm_type is MMUrlType.AUDIO or family() == FAMILY:
        raise StartError(
            "--min-pixels and --max-pixels apply to images and to frames of videos, --fps, --min-frames and "
            "--max-frames to videos; none to sounds"
        )
