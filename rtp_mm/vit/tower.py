"""The vision tower of the Qwen2-VL line: one module, its variants described by `TowerConfig`.

Sources: Qwen2-VL (arXiv 2409.12191), Qwen2.5-VL (arXiv 2502.13923: windowed attention, gated MLP, RMSNorm).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rtp_mm import ops
from rtp_mm.errors import StartError
from rtp_mm.types import DevicePatches, Patches
from rtp_mm.vit.attention import Batch, Segments
from rtp_mm.vit.layers import Block, GatedMlp, LayerNorm, Mlp, PatchMerger, RMSNorm, SelfAttention
from rtp_mm.vit.linear import Linear
from rtp_mm.vit.patch_embed import PatchEmbed
from rtp_mm.vit.rope import RotaryAngles, RotaryTable
from rtp_mm.vit.tower_base import Tower, TowerOptions

Grid = tuple[int, int, int]  # (t, h, w) in patches


@dataclass(frozen=True, slots=True)
class TowerConfig:
    """What tells one family's tower from another's; names as in `vision_config`."""

    depth: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    out_hidden_size: int
    patch_size: int
    spatial_merge_size: int
    temporal_patch_size: int
    in_channels: int
    norm: Literal["layer", "rms"]
    activation: str
    is_gated: bool
    window: int = 0  # side of an attention window in merged cells; 0: none
    full_attention_blocks: frozenset[int] = frozenset()  # the blocks that attend per frame where there are windows

    POSITIVE: ClassVar = (
        *("depth", "hidden_size", "num_heads", "intermediate_size", "out_hidden_size"),
        *("patch_size", "spatial_merge_size", "temporal_patch_size", "in_channels"),
    )

    def __post_init__(self) -> None:
        """Raises `StartError` for what no tower can be."""
        for name in self.POSITIVE:
            if type(value := getattr(self, name)) is not int or value < 1:
                raise StartError(f"vision_config: {name} must be a positive integer, got {value!r}")
        if type(self.window) is not int or self.window < 0:
            raise StartError(f"vision_config: the attention window must not be negative, got {self.window!r}")
        if self.hidden_size % self.num_heads or self.head_dim % 4:
            raise StartError(
                f"vision_config: {self.hidden_size} channels cannot be {self.num_heads} heads of a multiple of 4"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


def full_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of each frame: the segments of full attention."""
    return [h * w for t, h, w in grids for _ in range(t)]


def window_lengths(grids: Sequence[Grid], merge: int, window: int) -> list[int]:
    """Patches of each attention window, in `window_order`; windows at the right and lower edges are smaller."""
    return [length for t, h, w in grids for length in t * _frame_window_lengths(h, w, merge, window)]


@lru_cache(4096)
def _frame_window_lengths(h: int, w: int, merge: int, window: int) -> tuple[int, ...]:
    """Of a frame; images of a size, and a clip's frames, have the same."""

    def sides(patches: int) -> list[int]:
        return [min(window, patches // merge - start) * merge for start in range(0, patches // merge, window)]

    return tuple(rows * columns for rows in sides(h) for columns in sides(w))


class VisionTower(Tower):
    """Patches of many images and clips in one packed forward, merged tokens out.

    Parameter names are the checkpoint's, but for the GEMMs in `FUSED`, which hold several checkpoint tensors one after
    another.
    """

    FUSED = {"gate_up_proj": ("gate_proj", "up_proj")}  # noqa: RUF012  # a rename table, read by load_weights

    def __init__(
        self, config: TowerConfig, dtype: torch.dtype, device: torch.device, options: TowerOptions | None = None
    ) -> None:
        super().__init__(dtype, device, options)
        self.config = config
        self._angles = RotaryAngles(config.head_dim, device)
        gemm, delicate_gemm = self._choose_gemms()
        linear, delicate = (partial(Linear, dtype=dtype, gemm=g) for g in (gemm, delicate_gemm))
        norm = partial(LayerNorm if config.norm == "layer" else RMSNorm, dtype=self.compute_dtype)
        mlp = GatedMlp if config.is_gated else Mlp
        dim = config.hidden_size
        with torch.device("meta"):
            self.patch_embed = PatchEmbed(dim, config.in_channels, config.temporal_patch_size, config.patch_size)
            self.blocks = nn.ModuleList(
                Block(
                    norm,
                    SelfAttention(linear, dim, config.num_heads, self._attention),
                    mlp(linear, delicate, dim, config.intermediate_size, config.activation),
                    dim,
                )
                for _ in range(config.depth)
            )
            self.merger = PatchMerger(delicate, norm, dim, config.spatial_merge_size, config.out_hidden_size)

    def finish_loading(self, image_mean: Sequence[float], image_std: Sequence[float]) -> None:
        """Folds the processor's normalisation into the patch embedding and packs the GEMMs' weights; once, after
        loading."""
        self.patch_embed.fold(image_mean, image_std, self.dtype)
        self._pack()

    @torch.inference_mode()
    def forward(self, items: Sequence[Patches | DevicePatches]) -> list[tuple[Tensor, Tensor]]:
        """A (embedding [tokens, out_hidden_size], position ids [tokens, 3] int32) per item, in order, on the device.

        Embeddings have the tower's dtype; position ids are (t, h, w) in merged-token units, from 0 in each item.
        """
        # Stills before clips, so that either is one call of the patch embedding.
        packing = sorted(range(len(items)), key=lambda i: items[i].rows.shape[1])
        packed = [items[i] for i in packing]
        grids = [item.grid_thw for item in packed]
        merge, window = self.config.spatial_merge_size, self.config.window
        angles = self._angles.up_to(max(max(h, w) for _, h, w in grids))
        positions = ops.vision_positions(grids, merge, window, angles)
        rotary = RotaryTable(positions.cos, positions.sin)

        x = self._embed_rows([item.rows for item in packed], positions.window_order if window else None)
        full = Segments.from_lengths(positions.cu_frames, full_lengths(grids))
        windows = Segments.from_lengths(positions.cu_windows, window_lengths(grids, merge, window)) if window else full
        tokens = self._run(Batch(x, rotary, full, windows)).to(self.dtype)
        if window:
            tokens = tokens.index_select(0, positions.window_inverse)
        counts = [t * h * w // merge**2 for t, h, w in grids]
        results = zip(tokens.split(counts), positions.pos_thw.split(counts), strict=True)
        by_item = dict(zip(packing, results, strict=True))
        return [by_item[i] for i in range(len(items))]

    def _run_eagerly(self, batch: Batch) -> Tensor:
        """Blocks and merger: [N / merge^2, out_hidden_size] in the compute dtype, in the tower's row order."""
        delta = None
        for index, block in enumerate(self.blocks):
            self.between_blocks()
            segments = batch.full if index in self.config.full_attention_blocks else batch.windows
            delta = block(batch.x, delta, segments, batch.rotary)
        tokens: Tensor = self.merger(batch.x, delta)
        return tokens

    def _embed_rows(self, rows: Sequence[NDArray[np.uint8] | Tensor], order: Tensor | None) -> Tensor:
        """Rows of stills, then of clips, to [N, hidden_size] float32 in the tower's row order."""
        embedded: list[Tensor] = []
        cell = self.config.spatial_merge_size**2
        start = 0  # of this group, in cells
        for columns in sorted({r.shape[1] for r in rows}):
            group = [r for r in rows if r.shape[1] == columns]
            cells = sum(map(len, group)) // cell
            group_order = order[start : start + cells] - start if order is not None else None
            embedded.append(self.patch_embed(group, group_order))
            start += cells
        return torch.cat(embedded) if len(embedded) > 1 else embedded[0]

    def _sources(self, name: str) -> tuple[str, ...]:
        for part in name.split("."):
            if part in self.FUSED:
                return tuple(name.replace(part, source) for source in self.FUSED[part])
        return (name,)
