"""Slow, obvious twins of every fast thing: what a test compares the native code with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rtp_mm.ops import VisionPositions


def vision_positions(
    grids: Sequence[tuple[int, int, int]], merge_size: int, window: int, angles: Tensor
) -> VisionPositions:
    """Loops over items, frames, windows and cells, appending."""
    m = merge_size
    rope_hw: list[tuple[int, int]] = []
    pos_thw: list[tuple[int, int, int]] = []
    window_order: list[int] = []
    window_lengths: list[int] = []
    frame_lengths: list[int] = []
    for t, h, w in grids:
        down, across = h // m, w // m
        for frame in range(t):
            first_cell = len(pos_thw)
            for row in range(down):
                for column in range(across):
                    pos_thw.append((frame, row, column))
                    rope_hw += [(row * m + y, column * m + x) for y in range(m) for x in range(m)]
            frame_lengths.append(h * w)
            for top in range(0, down, window) if window else ():
                for left in range(0, across, window):
                    cells = [
                        first_cell + row * across + column
                        for row in range(top, min(top + window, down))
                        for column in range(left, min(left + window, across))
                    ]
                    window_order += cells
                    window_lengths.append(len(cells) * m * m)

    in_order = window_order if window else range(len(pos_thw))
    turned = [rope_hw[cell * m * m + patch] for cell in in_order for patch in range(m * m)]

    def table(angles: Tensor) -> Tensor:
        """[N, head_dim / 2]"""
        rows = [torch.cat((angles[row], angles[column])) for row, column in turned]
        return torch.stack(rows) if rows else angles.new_empty(0, 2 * angles.shape[1])

    def tensor(values: Sequence[object], *shape: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).reshape(shape)

    def cumulative(lengths: list[int]) -> Tensor:
        return tensor([sum(lengths[:i]) for i in range(len(lengths) + 1)], -1)

    return VisionPositions(
        rope_hw=tensor(rope_hw, -1, 2),
        pos_thw=tensor(pos_thw, -1, 3),
        window_order=tensor(window_order, -1),
        window_inverse=tensor([window_order.index(cell) for cell in range(len(window_order))], -1),
        cu_windows=cumulative(window_lengths) if window else tensor([], 0),
        cu_frames=cumulative(frame_lengths),
        cos=table(angles[0]),
        sin=table(angles[1]),
    )


def patch_embed(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: float = 1.0,
    order: Tensor | None = None,
    pos: Tensor | None = None,
) -> Tensor:
    """[N, D] float64, not rounded."""
    if order is not None and len(order):
        rows = rows.unflatten(0, (len(order), -1))[order.long()].flatten(0, 1)
    out = scale * ((rows.double() - 128) @ weight.double().sum(0).T) + bias.double()
    return out if pos is None else out + pos.double()


def patchify(
    frames: NDArray[np.uint8], patch_size: int, merge_size: int, temporal_patch_size: int
) -> NDArray[np.uint8]:
    """One reshape and one transpose, as Hugging Face's processors write it."""
    f, height, width, channels = frames.shape
    p, m, t = patch_size, merge_size, temporal_patch_size
    blocks = frames.reshape(f // t, t, height // (p * m), m, p, width // (p * m), m, p, channels)
    #                         0     1          2           3  4         5          6  7     8
    return blocks.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(-1, channels * t * p * p)


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    """[M, N], or [M, N / 2] for a gate, in float64."""
    return activated(x.double() @ weight.double().T + bias.double(), activation)


def activated(x: Tensor, activation: str) -> Tensor:
    """[M, N], or [M, N / 2] for a gate, in float64."""
    x = x.double()
    if activation == "silu_gate":
        gate, up = x.chunk(2, dim=1)
        return gate / (1 + (-gate).exp()) * up
    if activation == "gelu":
        return x * 0.5 * torch.special.erfc(-x / 2**0.5)
    return x / (1 + (-1.702 * x).exp()) if activation == "quick_gelu" else x


def int8_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """[M, N] float32: rows of x and weight rounded to 127 steps of their largest magnitude, and added in integers."""
    x_scale, w_scale = (rows.abs().amax(1).clamp(min=1e-30) / 127 for rows in (x, weight))
    x_steps = (x * (127 / x.abs().amax(1, keepdim=True).clamp(min=1e-30))).round()
    w_steps = (weight / w_scale[:, None]).round()
    sums = x_steps.double() @ w_steps.double().T  # integers, exact
    return sums.float() * (w_scale * x_scale[:, None]) + bias


def packed_attention(qkv: Tensor, cos: Tensor, sin: Tensor, lengths: Sequence[int]) -> Tensor:
    """[N, heads, dim] float64: segment by segment and head by head, the whole score matrix at once."""
    q, k, v = rotated_qk(qkv, cos, sin).unbind(1)
    out = torch.zeros_like(v)
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        for head in range(v.shape[1]):
            scores = q[rows, head] @ k[rows, head].T / q.shape[-1] ** 0.5
            out[rows, head] = scores.softmax(-1) @ v[rows, head]
        start += length
    return out


def rotated_qk(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[N, 3, heads, dim] float64: q and k turned, v as it is."""
    qk, v = qkv.double().split((2, 1), dim=1)
    x, y = qk.chunk(2, dim=-1)
    cos, sin = cos.double()[:, None, None], sin.double()[:, None, None]
    return torch.cat((torch.cat((x * cos - y * sin, y * cos + x * sin), -1), v), 1)


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, or with a bias LayerNorm: [N, D] float64."""
    x = x.double()
    if bias is not None:
        x = x - x.mean(1, keepdim=True)
    out = x / (x.square().mean(1, keepdim=True) + eps).sqrt() * weight.double()
    return out if bias is None else out + bias.double()
