"""A preprocess worker: a process that turns files to patch rows for the engine, and knows no torch.

One conversation after another over a SOCK_SEQPACKET socket, where a message arrives whole or not at all:

    engine: bytes of Setup in inbox  worker: {"ready": true}
    engine: Task, bytes in the inbox worker: {"shape": [N, C]}        it wants memory for its rows
    engine: offset in the slab       worker: the facts of the rows    they are written; see `Patches.facts`
            None: nobody waits any more; nothing is answered

Where the task says where rows of just this shape may go, the middle turn falls away.

At any turn the worker may answer {"error": class of MMError, "text"}, {"out_of_memory": text} or {"bug": exception,
"stack"} instead, which ends the task. The engine pickles; the worker answers in JSON, so that nothing a worker says is
executed.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import math
import mmap
import os
import pickle
import resource
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rtp_mm.errors import MMError
from rtp_mm.media.decode_threads import DECODE_THREADS
from rtp_mm.media.image import keep_decode_buffers
from rtp_mm.types import Blob, MMUrlType, Prepared, PreprocessOptions

MAX_DATAGRAM_BYTES = 1 << 16
_MAX_TEXT = 8192  # characters of an error or a stack
_NICENESS = 5  # the device's thread and the event loop go first
_OOM_SCORE = 500  # of 1000: where the machine's memory is out, the kernel takes a worker and leaves the server
_PR_SET_PDEATHSIG, _PR_SET_NAME = 1, 15  # linux/prctl.h


class Setup(NamedTuple):
    """What to do with every task, and within how much memory. Of any size: it lies in the inbox."""

    preprocess: Callable[..., Prepared]
    memory_bytes: int  # private data of the process, the interpreter's own included


class Place(NamedTuple):
    """Memory for rows [N, C], from this offset in the slab on."""

    offset: int
    shape: tuple[int, int]


class Task(NamedTuple):
    """A blob whose bytes lie at the start of the inbox: of a file, or of an array of this dtype and shape."""

    mm_type: MMUrlType
    options: PreprocessOptions
    content_hash: bytes
    source: str
    nbytes: int
    dtype: str | None
    shape: tuple[int, ...]
    place: Place | None
    threads: int  # that may decode it


def main() -> None:
    """`SOCKET INBOX SLAB PARENT`: three descriptors and the id of the process that started this one."""
    socket_fd, inbox_fd, slab_fd, parent = map(int, sys.argv[1:])
    _settle_in(parent)
    keep_decode_buffers()
    Image.init()  # every reader now, rather than with the first image
    _Worker(socket.socket(fileno=socket_fd), _mapped(inbox_fd), _mapped(slab_fd)).run()


class _Worker:
    def __init__(self, channel: socket.socket, inbox: mmap.mmap, slab: mmap.mmap) -> None:
        self._channel = channel
        self._inbox = np.frombuffer(inbox, np.uint8)
        self._inbox.flags.writeable = False
        self._slab = np.frombuffer(slab, np.uint8)

    def run(self) -> None:
        """Until the engine closes its end."""
        try:
            setup: Setup = pickle.loads(self._inbox[: self._receive()].data)
            _limit_memory(setup.memory_bytes)
            os.nice(_NICENESS)  # not before: a worker that replaces another is waited for
            self._say({"ready": True})
            while True:
                self._serve(self._receive(), setup)
        except (EOFError, ConnectionError):
            pass

    def _serve(self, task: Task, setup: Setup) -> None:
        answer: dict[str, Any]
        DECODE_THREADS.grant(task.threads)
        try:
            allocate = partial(self._allocate, task.place)
            answer = setup.preprocess(self._blob(task), task.mm_type, task.options, allocate).facts
        except _NobodyWaitsError:
            return
        except MMError as error:
            answer = {"error": type(error).__name__, "text": str(error)[:_MAX_TEXT]}
        except MemoryError:
            text = f"needs more memory than a worker's {setup.memory_bytes >> 20} MiB (MM_WORKER_MEMORY_MB)"
            answer = {"out_of_memory": text}
        except Exception as error:  # noqa: BLE001  # the edge of a process, as the servicer is the server's
            answer = {"bug": type(error).__name__, "stack": traceback.format_exc()[-_MAX_TEXT:]}
        self._say(answer)

    def _blob(self, task: Task) -> Blob:
        content = self._inbox[: task.nbytes]
        data = content.tobytes() if task.dtype is None else content.view(task.dtype).reshape(task.shape)
        return Blob(data, task.content_hash, task.source)

    def _allocate(self, place: Place | None, shape: tuple[int, int]) -> NDArray[np.uint8]:
        offset: int | None
        if place is not None and place.shape == shape:
            offset = place.offset
        else:
            self._say({"shape": shape})
            offset = self._receive()
            if offset is None:
                raise _NobodyWaitsError
        return self._slab[offset : offset + math.prod(shape)].reshape(shape)

    def _say(self, answer: dict[str, Any]) -> None:
        self._channel.send(json.dumps(answer).encode())

    def _receive(self) -> Any:
        message = self._channel.recv(MAX_DATAGRAM_BYTES)
        if not message:
            raise EOFError
        return pickle.loads(message)


class _NobodyWaitsError(BaseException):
    """Not for a preprocessor to catch."""


def _settle_in(parent: int) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_NAME, b"rtp_mm-worker")
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be followed
        os._exit(1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whoever sends them to all: the engine drains first
        signal.signal(number, signal.SIG_IGN)
    faulthandler.enable()
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:  # some containers have it read-only
        score.write(str(_OOM_SCORE))


def _limit_memory(nbytes: int) -> None:
    """RLIMIT_DATA counts what is private and writeable: not the slab, not libraries."""
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, nbytes))


def _mapped(fd: int) -> mmap.mmap:
    mapped = mmap.mmap(fd, 0)
    os.close(fd)
    return mapped
