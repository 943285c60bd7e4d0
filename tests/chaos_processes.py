"""The processes of a server in a storm, for `chaos.py`: what they hold, and their sudden ends."""

from __future__ import annotations

import asyncio
import os
import random
import re
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

import psutil
from running_server import RunningServer

ANSWERS_PER_KILL = 20
WORKERS, SLAB_MB = 2, 32
# What may be held more than before. Of shared memory the slab keeps an eighth of its pages, and each worker's inbox
# those of the largest file.
SHARED_SLACK = (SLAB_MB << 20) // 8 + WORKERS * (2048 << 10)
THREAD_SLACK = 12  # pools that grow as they are used: workers, disks, names, and the event loop's own
PSS_SLACK = 96 << 20  # caches and pools that fill up
# What is 0 where nothing is done.
BUSY = re.compile(
    r"^(rtp_mm_requests_running|rtp_mm_queue_items|rtp_mm_queue_patches|rtp_mm_in_flight_bytes|rtp_mm_workers_busy) "
    r"(\S+)$",
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process tree holds. Shared memory: pieces that are mapped, and the bytes of their pages."""

    processes: int
    descriptors: int
    threads: int
    shared: int
    shared_bytes: int
    pss_bytes: int

    @classmethod
    def of(cls, pid: int) -> Holdings:
        """Raises `psutil.NoSuchProcess` or `OSError` where one ends meanwhile."""
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
        return cls(
            len(processes),
            sum(process.num_fds() for process in processes),
            sum(process.num_threads() for process in processes),
            len({piece for process in processes for piece in _mapped(process.pid)}),
            sum({inode: nbytes for process in processes for inode, nbytes in _pages(process.pid)}.values()),
            sum(process.memory_full_info().pss for process in processes),
        )

    def is_within(self, other: Holdings, pss_slack: int = PSS_SLACK) -> bool:
        """Whether there are as many processes, and nothing that they hold was left behind."""
        return (
            self.processes == other.processes
            and self.descriptors <= other.descriptors
            and self.threads <= other.threads + THREAD_SLACK
            and self.shared <= other.shared
            and self.shared_bytes <= other.shared_bytes + SHARED_SLACK
            and self.pss_bytes <= other.pss_bytes + pss_slack
        )


def _mapped(pid: int) -> Iterator[str]:
    """Inodes of the shared memory in a process's address space."""
    with open(f"/proc/{pid}/maps") as maps:
        for line in maps:
            if "/memfd:" in line or "/dev/shm/" in line:
                yield line.split()[4]


def _pages(pid: int) -> Iterator[tuple[int, int]]:
    """Inode and bytes of the shared memory that a process has a descriptor of."""
    for name in os.listdir(f"/proc/{pid}/fd"):
        path = f"/proc/{pid}/fd/{name}"
        with suppress(FileNotFoundError):
            if os.readlink(path).startswith(("/memfd:", "/dev/shm/")):
                status = os.stat(path)
                yield status.st_ino, 512 * status.st_blocks


def unfinished(server: RunningServer) -> dict[str, float]:
    """What its metrics say is still in progress."""
    with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as reply:
        figures = {name: float(value) for name, value in BUSY.findall(reply.read().decode())}
    assert len(figures) == BUSY.pattern.count("rtp_mm_")
    return {name: value for name, value in figures.items() if value}


async def kill_workers(pid: int, answered: Callable[[], int], killed: Callable[[], None], rng: random.Random) -> None:
    """Kills a child of the server every now and then, but not faster than answers come: the server must get on."""
    while True:
        enough = answered() + ANSWERS_PER_KILL
        while answered() < enough:
            await asyncio.sleep(rng.uniform(0.1, 0.5))
        workers = [p for p in psutil.Process(pid).children(recursive=True) if "resource_tracker" not in _command(p)]
        if workers:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers).pid, signal.SIGKILL)
                killed()


def _command(process: psutil.Process) -> str:
    with suppress(psutil.Error):
        return " ".join(process.cmdline())
    return ""
