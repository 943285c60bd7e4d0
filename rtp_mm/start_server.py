"""`python -m rtp_mm.start_server`: the service, configured by environment variables or flags of the same names."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib.util
import logging
import os
import resource
import signal
import sys
from typing import TYPE_CHECKING, NoReturn

from rtp_mm.config import Settings, load_settings, unknown_variables
from rtp_mm.cores import affine_cores, available_cores
from rtp_mm.errors import StartError
from rtp_mm.logs import log_event, setup_logs

if TYPE_CHECKING:
    from rtp_mm.server.app import LoadEngine

_log = logging.getLogger(__name__)
_SPINS = "2000"  # some 100 us, which is about what waking a thread takes
_MOST_FILES = 1 << 16
_M_ARENA_MAX = -8  # of glibc's malloc.h


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after a drain, 1 with one line on stderr where the server cannot start."""
    try:
        settings = load_settings(sys.argv[1:] if arguments is None else arguments)
        _check(settings)
        limit_openmp()
        share_heap()
        raise_file_limit()
        gc.disable()  # of all that is imported and loaded little is garbage; until `serve` has collected that
        from rtp_mm.library import load_engine

        return run(settings, load_engine)
    except StartError as error:
        return _failed(error)
    except KeyboardInterrupt:  # before the event loop listens for it
        return 128 + signal.SIGINT


def run(settings: Settings, load_engine: LoadEngine) -> NoReturn:
    """Serves until a signal, then ends the process."""
    from rtp_mm.server.app import serve

    setup_logs(settings.log_level)
    log_event(_log, "loading", checkpoint=settings.checkpoint_path, device=settings.device, dtype=settings.act_type)
    for warning in unknown_variables(os.environ):
        _log.warning(warning)
    try:
        asyncio.run(serve(settings, load_engine))
        status = 0
    except StartError as error:
        status = _failed(error)
    # The interpreter would wait for threads amid a forward, a load or a dead file system, or fall apart under them.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _check(settings: Settings) -> None:
    """What can be told before a port is bound or torch imported."""
    if settings.vit_separation == 0:
        raise StartError(
            "VIT_SEPARATION=0 serves no ports: call rtp_mm.create_engine(vit_separation=0, checkpoint_path=...)"
        )
    if settings.vit_separation == 2:
        raise StartError(
            "VIT_SEPARATION=2 serves no ports: call rtp_mm.create_engine(vit_separation=2, remote_vit_server_ip=...)"
        )
    if importlib.util.find_spec("torch") is None:
        raise StartError("torch is not installed")
    settings.checkpoint_folder()


def limit_openmp() -> None:
    """Before torch is imported, which counts the CPUs of its affinity, not of its container's quota: with more threads
    than the quota pays for the kernel stops all of them for the rest of each period. And libgomp's threads spin while
    they wait for each other, by default for milliseconds, on cores that preprocess workers want.
    """
    if (cores := available_cores()) < affine_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def raise_file_limit() -> None:
    """Connections are files: the soft limit, of 1024 by default, is for programs that use select."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def share_heap() -> None:
    """Before threads begin. By default glibc gives threads up to eight heaps per core, and what is free in one is of no
    use to the others: buffers of requests in flight are then held several times over. Each thread keeps its cache of
    small blocks even so. Other C libraries are left as they are.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _failed(error: StartError) -> int:
    print("rtp_mm.start_server:", " ".join(str(error).split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
