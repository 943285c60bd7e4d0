"""One preprocess worker, seen from the engine: its process, the socket it is talked to on, the inbox it reads."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtp_mm.engine.slab import SharedBytes, whole_pages
from rtp_mm.errors import StartError, WrongFormatError
from rtp_mm.preprocess.worker import MAX_DATAGRAM_BYTES

_START_LIMIT_S = 60.0
_KEPT_INBOX_BYTES = 4 << 20  # a larger file's pages are given back after it
_LAST_WORDS_S = 1.0  # for one whose socket is closed to end by itself, so that its status tells why
_COMMAND = ("-P", "-c", "from rtp_mm.preprocess.worker import main; main()")  # not -m: pickles name the module
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


class WorkerDiedError(Exception):
    """The worker's end of the socket is closed, or it says what makes no sense."""


class WorkerProcess:
    """Started by spawn, never fork; its conversation is described in `rtp_mm/preprocess/worker.py`."""

    def __init__(self, slab_fd: int, inbox_bytes: int) -> None:
        """Starts it. For a thread that outlives it: the kernel kills it where the thread that started it ends.

        Raises `StartError`.
        """
        self._loop: asyncio.AbstractEventLoop | None = None
        self._answer: asyncio.Future[dict[str, Any]] | None = None
        self._is_over = False  # nothing that it says counts any more
        self.on_idle_death: Callable[[], object] = lambda: None  # called where it dies, or talks, unasked
        with ExitStack() as opened:
            try:
                self._inbox = SharedBytes("rtp_mm-inbox", inbox_bytes)
                opened.callback(self._inbox.close)
                self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                opened.callback(self._socket.close)
                with theirs:
                    self._process = _spawn(theirs.fileno(), self._inbox.fd, slab_fd)
            except OSError as error:
                raise StartError(f"a preprocess worker cannot be started: {error}") from None
            opened.pop_all()

    def greet(self, setup: bytes) -> None:
        """Blocks until the worker is ready. Raises `StartError` for one that is not, which has ended then."""
        self._socket.settimeout(_START_LIMIT_S)
        self.fill(np.frombuffer(setup, np.uint8))
        try:
            self.tell(len(setup))
            is_ready = self._socket.recv(MAX_DATAGRAM_BYTES) == b'{"ready": true}'
        except (OSError, WorkerDiedError):
            is_ready = False
        if not is_ready:
            raise StartError(f"a preprocess worker did not start: it {self.end()}, what it said stands above")
        self._socket.setblocking(False)
        self.clear(len(setup))

    @property
    def pid(self) -> int:
        return self._process.pid

    def watch(self, loop: asyncio.AbstractEventLoop) -> None:
        """From here on the worker is talked to on `loop`."""
        self._loop = loop
        loop.add_reader(self._socket, self._read)

    def unwatch(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._socket)

    def fill(self, content: NDArray[np.uint8]) -> None:
        """Lays [n] bytes before the worker; releases the GIL. Raises `WrongFormatError` for more than there is room."""
        if content.size > self._inbox.nbytes:
            raise WrongFormatError(f"{content.size} bytes, over a preprocess worker's limit of {self._inbox.nbytes}")
        self._inbox.bytes[: content.size] = content

    def clear(self, nbytes: int) -> None:
        """Gives back the memory of a large content."""
        self._inbox.give_back(_KEPT_INBOX_BYTES, min(whole_pages(nbytes), self._inbox.nbytes))

    def tell(self, message: Any) -> None:
        """Raises `WorkerDiedError`."""
        try:
            self._socket.send(pickle.dumps(message))
        except ConnectionError:
            raise WorkerDiedError from None

    async def answer(self) -> dict[str, Any]:
        """To what it was told just now. Raises `WorkerDiedError`."""
        assert self._loop is not None
        if self._is_over:
            raise WorkerDiedError
        self._answer = self._loop.create_future()
        return await self._answer

    def _read(self) -> None:
        answer, self._answer = self._answer, None
        try:
            said = json.loads(self._socket.recv(MAX_DATAGRAM_BYTES))  # nothing, from a closed end, is no JSON either
        except (OSError, ValueError, RecursionError):
            said = None
        if answer is not None and isinstance(said, dict):
            answer.set_result(said)
            return
        self._is_over = True
        self.unwatch()
        if answer is None:
            self.on_idle_death()
        else:
            answer.set_exception(WorkerDiedError())

    def kill(self) -> None:
        """A pending `answer` then raises `WorkerDiedError`."""
        self._process.kill()

    def end(self) -> str:
        """Reaps the process: after this it writes nowhere. Says how it ended; blocks for milliseconds."""
        try:
            status = self._process.wait(_LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            status = self._process.wait()
        self._socket.close()
        self._inbox.close()
        return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"


def _spawn(*fds: int) -> subprocess.Popen[bytes]:
    """A fresh interpreter that inherits these descriptors alone, with this one's search path."""
    return subprocess.Popen(
        [sys.executable, *_COMMAND, *map(str, fds), str(os.getpid())],
        stdin=subprocess.DEVNULL,
        process_group=0,  # a terminal's Ctrl-C is for the engine, which drains
        pass_fds=fds,
        env=os.environ | _ONE_THREAD | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
    )
