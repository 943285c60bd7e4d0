"""A real server in a process of its own, as a user starts it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

START_LIMIT_S = 120


def free_port_pair() -> int:
    """A port that is free now, and the next one too."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
    raise RuntimeError("no two neighbouring ports are free")


class RunningServer:
    """`port` is HTTP, `port` + 1 gRPC."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self.process = process
        self.port = port
        self.address = f"127.0.0.1:{port + 1}"

    def health(self) -> int | None:
        """The status of /health; `None` where nobody listens."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=5) as reply:
                return int(reply.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return None

    def terminate(self) -> int:
        """SIGTERM; the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def running_server(
    checkpoint: Path, *, start_limit_s: float = START_LIMIT_S, **options: object
) -> Iterator[RunningServer]:
    """Started with environment variables, ready when it comes back, gone afterwards. Its log goes to a file: a full
    pipe would stop it.
    """
    port = free_port_pair()
    variables = {
        "START_PORT": port,
        "VIT_SEPARATION": 1,
        "MM_BIND_ADDRESS": "127.0.0.1",
        "CHECKPOINT_PATH": checkpoint,
        **{name.upper(): value for name, value in options.items()},
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rtp_mm.start_server"],
            env=os.environ | {name: str(value) for name, value in variables.items()},
            stderr=log,
            text=True,
        )
        server = RunningServer(process, port)
        try:
            give_up = time.monotonic() + start_limit_s
            while server.health() != 200:
                if process.poll() is not None or time.monotonic() > give_up:
                    log.seek(0)
                    raise RuntimeError(f"the server did not start: {log.read()}")
                time.sleep(0.05)
            yield server
        finally:
            process.kill()
            process.wait()
