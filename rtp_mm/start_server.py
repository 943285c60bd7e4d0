"""`python -m rtp_mm.start_server`: the service, configured by environment variables or flags of the same names."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import importlib.util
import logging
import os
import sys
from typing import TYPE_CHECKING

from rtp_mm.config import Settings, load_settings, unknown_variables
from rtp_mm.cores import affine_cores, available_cores
from rtp_mm.errors import StartError
from rtp_mm.logs import setup_logs

if TYPE_CHECKING:
    from rtp_mm.server.app import LoadEngine

_log = logging.getLogger(__name__)
_SPINS = "2000"  # some 100 us, which is about what waking a thread takes
_M_ARENA_MAX = -8  # of glibc's malloc.h


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 after a drain, 1 with one line on stderr where the server cannot start."""
    try:
        settings = load_settings(sys.argv[1:] if arguments is None else arguments)
        _check(settings)
    except StartError as error:
        return _failed(error)
    share_cores()
    share_heap()
    gc.disable()  # of all that is imported and loaded little is garbage; until `serve` has collected that
    from rtp_mm.library import load_engine

    return run(settings, load_engine)


def run(settings: Settings, load_engine: LoadEngine) -> int:
    """Serves until a signal; returns the exit status."""
    from rtp_mm.server.app import serve

    setup_logs(settings.log_level)
    for warning in unknown_variables(os.environ):
        _log.warning(warning)
    try:
        is_drained = asyncio.run(serve(settings, load_engine))
    except StartError as error:
        return _failed(error)
    if not is_drained:  # a forward that outlives the drain would hold the interpreter's exit until it ends
        logging.shutdown()
        os._exit(0)
    return 0


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
    if settings.checkpoint_path is None:
        raise StartError("CHECKPOINT_PATH is not set: the folder of a model in Hugging Face format")
    if not settings.checkpoint_path.expanduser().is_dir():
        raise StartError(f"CHECKPOINT_PATH={settings.checkpoint_path} is no folder")


def share_cores() -> None:
    """Before torch is imported. It knows of no quota: were its threads more, all of them would stand still for the rest
    of each period. OpenMP's wait for each other without giving up their core, libgomp's by default for 300,000 rounds,
    milliseconds of a core that the preprocess workers want just then.
    """
    if (cores := available_cores()) < affine_cores():
        os.environ.setdefault("OMP_NUM_THREADS", str(cores))
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def share_heap() -> None:
    """Before threads begin. By default glibc gives up to eight heaps a core to threads, and none has the use of what is
    free in another: what requests in flight need is then kept several times over. Small blocks that it uses often each
    thread keeps for itself even so. No other C library is asked.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with contextlib.suppress(AttributeError, OSError):
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)


def _failed(error: StartError) -> int:
    print("rtp_mm.start_server:", " ".join(str(error).split()), file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
