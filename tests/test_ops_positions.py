"""`ops.vision_positions` against its slow twin and against transformers."""

from __future__ import annotations

from dataclasses import fields

import pytest
import reference
import torch
from conftest import require

from rtp_mm import ops
from rtp_mm.ops import VisionPositions
from rtp_mm.vit.rope import FIRST_POSITIONS, RotaryAngles

PATCH = 14
ANGLES = torch.randn(2, 64, 10, generator=torch.Generator().manual_seed(0))  # any values: they are only moved

# Images and clips: one cell, one window, edge windows right and below, exact multiples of a window, strips.
GRIDS = [
    (1, 2, 2),
    (1, 8, 8),
    (1, 10, 14),
    (1, 6, 22),
    (3, 8, 16),
    (2, 18, 10),
    (1, 2, 40),
    (1, 34, 2),
    (5, 4, 6),
]
BATCHES = [*([grid] for grid in GRIDS), GRIDS, GRIDS[::-1], [(1, 46, 34)] * 3]


def assert_equal(ours: VisionPositions, expected: VisionPositions) -> None:
    for field in fields(VisionPositions):
        a, b = getattr(ours, field.name), getattr(expected, field.name)
        if isinstance(b, torch.Tensor):
            assert a.dtype == b.dtype
            assert torch.equal(a.cpu(), b), field.name
        else:
            assert a == b, field.name


@pytest.mark.parametrize("grids", BATCHES, ids=str)
@pytest.mark.parametrize(("merge_size", "window"), [(2, 4), (2, 0), (2, 1), (2, 3), (1, 5), (2, 100)])
def test_equals_the_slow_twin(grids: list[tuple[int, int, int]], merge_size: int, window: int) -> None:
    ours = ops.vision_positions(grids, merge_size, window, ANGLES)
    assert_equal(ours, reference.vision_positions(grids, merge_size, window, ANGLES))


def test_merge_sizes_beyond_two() -> None:
    grids = [(2, 9, 15), (1, 3, 3)]
    assert_equal(ops.vision_positions(grids, 3, 2, ANGLES), reference.vision_positions(grids, 3, 2, ANGLES))


@pytest.mark.parametrize("grids", BATCHES, ids=str)
def test_equals_transformers(grids: list[tuple[int, int, int]]) -> None:
    from transformers import vision_utils

    merge_size, window = 2, 4
    grid_thw = torch.tensor(grids)
    ours = ops.vision_positions(grids, merge_size, window, ANGLES)
    order, cu_windows = vision_utils.get_vision_window_index(grid_thw, merge_size, window * merge_size * PATCH, PATCH)
    assert torch.equal(ours.window_order.long(), order)
    assert torch.equal(ours.cu_windows, cu_windows)
    assert torch.equal(ours.cu_frames, vision_utils.get_vision_cu_seqlens(grid_thw))
    assert torch.equal(ours.rope_hw.long(), vision_utils.get_vision_position_ids(grid_thw, merge_size))


@pytest.mark.parametrize("head_dim", [64, 72, 80])
def test_angles_are_those_of_transformers(head_dim: int) -> None:
    """To the bit, also past the first table's end."""
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionRotaryEmbedding

    grids = [(1, 6, 10), (1, 2, 2 * FIRST_POSITIONS)]
    angles = RotaryAngles(head_dim, torch.device("cpu"))
    assert angles.up_to(10) is angles.up_to(FIRST_POSITIONS)
    ours = ops.vision_positions(grids, 2, 0, angles.up_to(2 * FIRST_POSITIONS))
    rotary = Qwen2VLVisionRotaryEmbedding(Qwen2VLVisionConfig(embed_dim=head_dim, num_heads=1))
    cos, sin = rotary(torch.empty(0), ours.rope_hw)
    assert torch.equal(ours.cos, cos[..., : head_dim // 2].float())
    assert torch.equal(ours.sin, sin[..., : head_dim // 2].float())


def test_window_order_is_a_permutation_that_keeps_frames_together() -> None:
    ours = ops.vision_positions([(3, 10, 14), (1, 8, 8)], 2, 4, ANGLES)
    assert torch.equal(ours.window_order.sort().values, torch.arange(len(ours.pos_thw), dtype=torch.int32))
    assert torch.equal(ours.window_inverse.argsort().int(), ours.window_order)
    assert set(ours.cu_frames.tolist()) <= set(ours.cu_windows.tolist())
    assert not torch.equal(ours.window_order, ours.window_order.sort().values)  # raster order is another


def test_an_item_has_the_same_positions_alone_and_between_others() -> None:
    alone = ops.vision_positions([(2, 10, 14)], 2, 4, ANGLES)
    between = ops.vision_positions([(1, 6, 4), (2, 10, 14), (1, 8, 8)], 2, 4, ANGLES)
    before, cells = 1 * 3 * 2, len(alone.pos_thw)
    assert torch.equal(between.pos_thw[before : before + cells], alone.pos_thw)
    assert torch.equal(between.window_order[before : before + cells], alone.window_order + before)
    assert torch.equal(between.rope_hw[4 * before : 4 * (before + cells)], alone.rope_hw)
    assert torch.equal(between.cos[4 * before : 4 * (before + cells)], alone.cos)


def test_an_empty_batch_has_no_positions() -> None:
    ours = ops.vision_positions([], 2, 4, ANGLES)
    assert ours.rope_hw.shape == (0, 2)
    assert ours.cos.shape == ours.sin.shape == (0, 20)
    assert ours.cu_windows.tolist() == ours.cu_frames.tolist() == [0]


@pytest.mark.parametrize("grid", [(0, 2, 2), (1, 3, 2), (1, 2, 3), (1, -2, 2), (1, 0, 2)])
def test_a_bad_grid_is_named(grid: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="divisible by 2, got") as error:
        ops.vision_positions([(1, 2, 2), grid], 2, 4, ANGLES)
    assert str(grid) in str(error.value)


def test_more_patches_than_int32_holds_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 2147483647 patches, got 2147483648"):
        ops.vision_positions([(2**20, 32, 64)], 2, 0, ANGLES)


def test_a_grid_past_the_angles_is_refused() -> None:
    ops.vision_positions([(1, 2, 64)], 2, 4, ANGLES)
    with pytest.raises(ValueError, match=r"grid \(1, 2, 66\) is over the 64 positions with angles"):
        ops.vision_positions([(1, 2, 66)], 2, 4, ANGLES)


def call(grid_thw: torch.Tensor, *counts: int, angles: torch.Tensor = ANGLES) -> object:
    return torch.ops.rtp_mm.vision_positions.default(grid_thw, angles, *counts)


def test_the_operator_refuses_counts_that_are_not_the_grids() -> None:
    grid = torch.tensor([[1, 8, 10]], dtype=torch.int32)
    call(grid, 20, 2, 1, 2, 4)
    with pytest.raises(RuntimeError, match="the grids hold 20 cells, 2 windows and 1 frames, got 20, 3 and 1"):
        call(grid, 20, 3, 1, 2, 4)
    with pytest.raises(RuntimeError, match="the grids hold 20 cells"):
        call(grid, 24, 2, 1, 2, 4)


@pytest.mark.parametrize(
    ("grid_thw", "message"),
    [
        (torch.ones(1, 3), r"got \[1, 3\] float32"),
        (torch.ones(3, dtype=torch.int32), r"got \[3\] int32"),
        (torch.ones(3, 2, dtype=torch.int32).T, r"got \[2, 3\] int32 with strides \[1, 2\]"),
        (torch.tensor([[1, 2, 3]], dtype=torch.int32), r"grid 0 must be .* got \(1, 2, 3\)"),
        (torch.full((1, 3), 2**31 - 2, dtype=torch.int32), r"grid 0 must be .* fewer than 2\^31 patches"),
        (torch.tensor([[1, 2, 66]], dtype=torch.int32), r"grid 0 needs the angles of 66 positions, got 64"),
    ],
)
def test_the_operator_says_what_came(grid_thw: torch.Tensor, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call(grid_thw, 1, 1, 1, 2, 4)


@pytest.mark.parametrize(
    "angles", [ANGLES[0], ANGLES.double(), ANGLES.mT, ANGLES[:1]], ids=["rank", "float64", "strides", "cos alone"]
)
def test_the_operator_says_what_angles_came(angles: torch.Tensor) -> None:
    with pytest.raises(RuntimeError, match=r"angles must be contiguous \[2, positions, head_dim / 4\] float32 .*, got"):
        call(torch.tensor([[1, 2, 2]], dtype=torch.int32), 1, 1, 1, 2, 4, angles=angles)


@pytest.mark.parametrize("window", [0, 4])
def test_schema_and_fake_agree_with_the_kernel(window: int) -> None:
    grid = torch.tensor([[2, 8, 10], [1, 4, 4]], dtype=torch.int32)
    arguments = (grid, ANGLES, 44, 5 if window else 0, 3, 2, window)
    torch.library.opcheck(torch.ops.rtp_mm.vision_positions.default, arguments)


def test_cuda_equals_the_cpu() -> None:
    require("cuda")
    for grids in BATCHES:
        for window in (0, 3, 4):
            ours = ops.vision_positions(grids, 2, window, ANGLES.cuda())
            assert_equal(ours, reference.vision_positions(grids, 2, window, ANGLES))
