"""How many CPUs a process has to itself: what its affinity allows, or its container's quota where that is less."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CONTROL_GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIPS = Path("/proc/self/cgroup")  # a line per hierarchy: number:controllers:path
MOST_DECODE_THREADS = 4  # of one item, by default: FFmpeg holds a frame or two more for each


@dataclass(frozen=True, slots=True)
class CoreShare:
    """Cores that are divided among their users: whole ones, one at least and `most` at most."""

    cores: int
    most: int = MOST_DECODE_THREADS

    def among(self, users: int) -> int:
        return max(1, min(self.most, self.cores // users))


def available_cores() -> int:
    """At least 1. Of a quota's last part of a CPU a whole one is made: 2500m of Kubernetes are 3."""
    return max(1, min([affine_cores(), *map(math.ceil, _quotas())]))


def affine_cores() -> int:
    """CPUs that the process may run on, whatever its quota of their time."""
    return len(os.sched_getaffinity(0))


def _quotas() -> Iterator[float]:
    """In CPUs, of the process's control groups and those around them. Of version 1 and 2, side by side on some hosts.

    A container may be told its path on the host, where it sees no such folder: its own is the outermost that it sees.
    """
    for line in _text(MEMBERSHIPS).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            outermost, quota = CONTROL_GROUPS, _quota_of_version_2
        elif "cpu" in controllers.split(","):
            outermost, quota = CONTROL_GROUPS / "cpu", _quota_of_version_1
        else:
            continue
        inner = Path(path.lstrip("/"))
        for folder in (inner, *inner.parents):
            if (cpus := quota(outermost / folder)) is not None:
                yield cpus


def _quota_of_version_2(folder: Path) -> float | None:
    """`cpu.max` is `max 100000`, or microseconds of CPU time in a period of so many."""
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    return _cpus(quota, period)


def _quota_of_version_1(folder: Path) -> float | None:
    quota, period = (_text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
    return _cpus(quota, period)


def _cpus(quota: str, period: str) -> float | None:
    """`None` where no quota is set: `max`, -1, or what is no number."""
    try:
        cpus = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None
    return cpus if cpus > 0 else None


def _text(file: Path) -> str:
    """Nothing, where it cannot be read."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""
