"""Of a checkpoint the tower's bytes are asked for, all of them and no others; and nothing is said of a broken one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rtp_mm.vit.read_ahead import STEP, read_ahead

TOWER = {
    "model.visual.blocks.0.weight": torch.full((STEP + 3,), 7, dtype=torch.uint8),
    "model.visual.merger.weight": torch.full((5,), 7, dtype=torch.uint8),
}
REST = {
    "lm_head.weight": torch.zeros(100, dtype=torch.uint8),
    "model.layers.0.weight": torch.zeros(3 * STEP, dtype=torch.uint8),
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What is asked for, read from its file."""
    pieces: list[bytes] = []

    def fadvise(fd: int, offset: int, nbytes: int, advice: int) -> None:
        assert (advice, nbytes <= STEP) == (os.POSIX_FADV_WILLNEED, True)
        pieces.append(os.pread(fd, nbytes, offset))

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return pieces


def test_a_towers_bytes_are_asked_for_and_no_others(asked: list[bytes], tmp_path: Path) -> None:
    save_file(TOWER | REST, tmp_path / "model.safetensors")
    read_ahead(tmp_path)
    assert b"".join(asked) == bytes([7]) * (STEP + 3 + 5)


def test_shards_without_a_tower_are_not_opened(asked: list[bytes], tmp_path: Path) -> None:
    save_file(TOWER, tmp_path / "b.safetensors")
    (tmp_path / "a.safetensors").mkdir()  # to open it would fail
    files = dict.fromkeys(TOWER, "b.safetensors") | dict.fromkeys(REST, "a.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    read_ahead(tmp_path)
    assert len(b"".join(asked)) == STEP + 8


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        (2).to_bytes(8, "little") + b"{",
        (4).to_bytes(8, "little") + b"[[1]",
        (200_000).to_bytes(8, "little") + b"[" * 200_000,
        *(
            len(header).to_bytes(8, "little") + header
            for header in (b"[]", b'{"visual.": 1}', b'{"visual.": {"data_offsets": ["a", "b"]}}', b'{"visual.": {}}')
        ),
        *(
            len(header).to_bytes(8, "little") + header
            for most in (1 << 62, 1 << 70)
            if (header := b'{"visual.": {"data_offsets": [0, %d]}}' % most)
        ),
        (41).to_bytes(8, "little") + b'{"visual.": {"data_offsets": [0, 1e400]}}',
    ],
)
def test_what_is_no_checkpoint_is_left_to_loading(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    read_ahead(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_bytes(content)
    read_ahead(tmp_path)
    read_ahead(tmp_path / "absent")
