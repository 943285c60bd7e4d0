"""How many CPUs there are, from control groups as container engines make them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rtp_mm import cores
from rtp_mm.config import load_settings
from rtp_mm.cores import available_cores
from rtp_mm.start_server import limit_openmp

V1, V2 = "4:cpu,cpuacct:{}\n3:memory:/elsewhere\n", "0::{}\n"


@pytest.fixture(autouse=True)
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Those of a machine of sixteen cores, to be written."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(cores, "CONTROL_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "MEMBERSHIPS", tmp_path / "self")
    return tmp_path / "cgroup"


def write(groups: Path, memberships: str, files: dict[str, str]) -> None:
    cores.MEMBERSHIPS.write_text(memberships)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)


@pytest.mark.parametrize(
    ("memberships", "files", "expected"),
    [
        (V2.format("/"), {"cpu.max": "400000 100000\n"}, 4),  # a container with a namespace of its own
        (V2.format("/"), {"cpu.max": "max 100000\n"}, 16),
        (V2.format("/"), {"cpu.max": "250000 100000\n"}, 3),
        (V2.format("/"), {"cpu.max": "10000 100000\n"}, 1),
        (V2.format("/"), {"cpu.max": "9900000 100000\n"}, 16),
        (V2.format("/pod/app"), {"pod/app/cpu.max": "max 100000\n", "pod/cpu.max": "200000 100000\n"}, 2),
        (V2.format("/../../host"), {"cpu.max": "300000 100000\n"}, 3),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "400000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 4),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 16),
        (  # the host's path, and the container's own group mounted as the outermost
            V1.format("/docker/0123"),
            {"cpu/cpu.cfs_quota_us": "150000\n", "cpu/cpu.cfs_period_us": "50000\n"},
            3,
        ),
        (  # both versions, the quota in the first
            V1.format("/job") + V2.format("/"),
            {"cpu/job/cpu.cfs_quota_us": "200000", "cpu/job/cpu.cfs_period_us": "100000", "unified/cgroup.type": ""},
            2,
        ),
        ("", {}, 16),
        (V2.format("/"), {"cpu.max": "\xff what is this\n"}, 16),
        (V1.format("/"), {"cpu/cpu.cfs_quota_us": "400000\n"}, 16),  # no period
    ],
)
def test_a_quota_below_the_cores_counts(groups: Path, memberships: str, files: dict[str, str], expected: int) -> None:
    write(groups, memberships, files)
    assert available_cores() == expected


def test_without_control_groups_affinity_counts() -> None:
    assert available_cores() == 16


def test_workers_keep_to_the_quota(groups: Path) -> None:
    write(groups, V2.format("/"), {"cpu.max": "200000 100000\n"})
    assert load_settings().mm_preprocess_max_workers == 2


@pytest.mark.parametrize(
    ("limit", "before", "after"),
    [
        ("200000", {}, "2"),
        ("200000", {"OMP_NUM_THREADS": "5"}, "5"),
        ("max", {}, None),  # torch's own choice
    ],
)
def test_torch_keeps_to_the_quota(
    groups: Path, limit: str, before: dict[str, str], after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(groups, V2.format("/"), {"cpu.max": f"{limit} 100000\n"})
    monkeypatch.setattr(os, "environ", before)
    limit_openmp()
    assert before.get("OMP_NUM_THREADS") == after
