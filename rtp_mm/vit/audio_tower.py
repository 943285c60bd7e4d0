"""The audio tower of Qwen2-Audio: Whisper's encoder (arXiv 2212.04356) with halved output, and the projector behind it.

Source: Qwen2-Audio (arXiv 2407.10759). Two convolutions, the second of stride 2, make a step of two frames; blocks
attend within a sound; two steps are averaged to a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rtp_mm.errors import ProcessError, StartError
from rtp_mm.types import LogMel
from rtp_mm.vit.attention import Batch, Segments
from rtp_mm.vit.layers import Block, LayerNorm, Mlp, SelfAttention
from rtp_mm.vit.linear import Gemm, Linear, choose_gemm
from rtp_mm.vit.packing import packed_rows, to_device
from rtp_mm.vit.rope import RotaryTable
from rtp_mm.vit.tower_base import Tower, TowerOptions

KERNEL = 3  # of both convolutions
NORM_EPS = 1e-5  # in the family's code, not in its config file


@dataclass(frozen=True, slots=True)
class AudioTowerConfig:
    """What tells one tower from another; names as in `audio_config`, and the language model's width."""

    num_mel_bins: int
    d_model: int
    encoder_layers: int
    encoder_attention_heads: int
    encoder_ffn_dim: int
    max_source_positions: int  # steps of the longest sound
    activation_function: str
    out_hidden_size: int

    POSITIVE: ClassVar = (
        *("num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads", "encoder_ffn_dim"),
        *("max_source_positions", "out_hidden_size"),
    )

    def __post_init__(self) -> None:
        """Raises `StartError` for what no tower can be."""
        for name in self.POSITIVE:
            if type(value := getattr(self, name)) is not int or value < 1:
                raise StartError(f"audio_config: {name} must be a positive integer, got {value!r}")
        heads = self.encoder_attention_heads
        if self.d_model % heads or self.d_model // heads % 2:
            raise StartError(f"audio_config: {self.d_model} channels cannot be {heads} heads of an even size")


class Convolution(Linear):
    """Windows [M, KERNEL * in], row after row, -> gelu [M, out]. Holds the published weight [out, in, KERNEL]."""

    def __init__(self, channels: int, out: int, dtype: torch.dtype, gemm: type[Gemm]) -> None:
        super().__init__(KERNEL * channels, out, dtype, gemm, activation="gelu")
        self.weight = nn.Parameter(self.weight.view(out, channels, KERNEL), requires_grad=False)

    def _published(self) -> Tensor:
        return super()._published().transpose(1, 2).flatten(1)


class QkvLinear(Linear):
    """q, k and v in one GEMM. k has no bias in the checkpoint: until `pack`, `bias` is q's and v's."""

    def __init__(self, dim: int, out: int, dtype: torch.dtype, gemm: type[Gemm]) -> None:
        super().__init__(dim, out, dtype, gemm)
        self.bias = nn.Parameter(self.bias.new_empty(2 * dim), requires_grad=False)

    def pack(self) -> None:
        q, v = self.bias.chunk(2)
        self.bias = nn.Parameter(torch.cat((q, torch.zeros_like(q), v)), requires_grad=False)
        super().pack()


class PackedSounds(NamedTuple):
    """Where a packed batch has what, on the device. P is all sounds' steps.

    windows:   [2 P] int64, where each window of the first convolution begins among the frames.
    firsts:    [sounds] int64, each sound's first step.
    positions: [P] int64, of each step in its sound.
    pairs:     [2 T] int64, the steps that become T tokens.
    cu:        [sounds + 1] int32, each sound's steps.
    """

    windows: Tensor
    firsts: Tensor
    positions: Tensor
    pairs: Tensor
    cu: Tensor

    @classmethod
    def of(cls, steps: Sequence[int], device: torch.device) -> PackedSounds:
        counts = np.array(steps)
        firsts = np.cumsum(counts) - counts
        rows = 2 * (firsts + np.arange(len(steps)))  # of each sound's first among the frames: two a step and two more
        windows = [row + np.arange(2 * count) for row, count in zip(rows, counts, strict=True)]
        pairs = [first + np.arange(count // 2 * 2) for first, count in zip(firsts, counts, strict=True)]

        def indices(parts: Sequence[np.ndarray]) -> Tensor:
            return to_device(torch.from_numpy(np.concatenate(parts)), device)

        return cls(
            indices(windows),
            to_device(torch.from_numpy(firsts), device),
            indices([np.arange(count) for count in counts]),
            indices(pairs),
            to_device(torch.from_numpy(np.append(0, np.cumsum(counts)).astype(np.int32)), device),
        )


class AudioTower(Tower):
    """Log-mel frames of many sounds in one packed forward, tokens as the language model takes them out.

    Hugging Face computes every sound as 30 s with masked silence behind it; here silence is never computed, and the
    answer is the same.
    """

    # A rename table, read by load_weights: where parameters are called something else in the checkpoint.
    PUBLISHED = {  # noqa: RUF012
        "attn.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "attn.qkv.bias": ("self_attn.q_proj.bias", "self_attn.v_proj.bias"),
        "attn.proj": ("self_attn.out_proj",),
        "norm1": ("self_attn_layer_norm",),
        "norm2": ("final_layer_norm",),
        "mlp.fc1": ("fc1",),
        "mlp.fc2": ("fc2",),
        "embed_positions": ("embed_positions.weight",),
    }

    def __init__(
        self, config: AudioTowerConfig, dtype: torch.dtype, device: torch.device, options: TowerOptions | None = None
    ) -> None:
        super().__init__(dtype, device, options)
        self.config = config
        gemm, delicate_gemm = self._choose_gemms()
        exact_gemm = choose_gemm(device, self.compute_dtype, is_invariant=self.options.is_batch_invariant)
        linear, delicate = (partial(Linear, dtype=dtype, gemm=g) for g in (gemm, delicate_gemm))
        qkv = partial(QkvLinear, dtype=dtype, gemm=gemm)
        convolution = partial(Convolution, dtype=dtype, gemm=exact_gemm)  # a hundredth of the work
        norm = partial(LayerNorm, dtype=self.compute_dtype, eps=NORM_EPS)
        dim = config.d_model
        with torch.device("meta"):
            self.conv1 = convolution(config.num_mel_bins, dim)
            self.conv2 = convolution(dim, dim)
            self.embed_positions = nn.Parameter(
                torch.empty(config.max_source_positions, dim, dtype=torch.float32), requires_grad=False
            )
            self.layers = nn.ModuleList(
                Block(
                    norm,
                    SelfAttention(linear, dim, config.encoder_attention_heads, self._attention, qkv),
                    Mlp(linear, delicate, dim, config.encoder_ffn_dim, config.activation_function),
                    dim,
                )
                for _ in range(config.encoder_layers)
            )
            self.layer_norm = norm(dim)
            self.projector = Linear(dim, config.out_hidden_size, dtype, exact_gemm)

    def finish_loading(self) -> None:
        """Packs the GEMMs' weights; once, after loading."""
        self._pack()

    @torch.inference_mode()
    def forward(self, items: Sequence[LogMel]) -> list[Tensor]:
        """An embedding [tokens, out_hidden_size] in the tower's dtype per item, in order, on the device."""
        steps = [self._steps(item) for item in items]
        layout = PackedSounds.of(steps, self.device)
        frames = packed_rows([item.rows for item in items], self.device)
        x = self._embed_frames(frames.to(self.compute_dtype), layout)
        unturned = x.new_ones(len(x), self.config.d_model // self.config.encoder_attention_heads // 2)
        segments = Segments.from_lengths(layout.cu, steps)
        x = self._run(Batch(x, RotaryTable(unturned, torch.zeros_like(unturned)), segments, segments))
        pooled = x.index_select(0, layout.pairs).view(-1, 2, self.config.d_model).mean(1)
        tokens = self.projector(self.layer_norm(pooled, None)).to(self.dtype)
        counts = [count // 2 for count in steps]
        return list(tokens.split(counts))

    def _steps(self, item: LogMel) -> int:
        """Checked: a position that is not there would be the end of a GPU's context."""
        count, bins = item.rows.shape
        longest = 2 * self.config.max_source_positions + 2
        if count % 2 or not 2 < count <= longest or bins != self.config.num_mel_bins:
            raise ProcessError(
                f"log-mel rows must be [4 to {longest}, even; {self.config.num_mel_bins}], got {[count, bins]}"
            )
        return item.steps

    def _embed_frames(self, frames: Tensor, layout: PackedSounds) -> Tensor:
        """Frames [N, bins] -> steps [P, d_model] float32 with their positions added.

        Window k of the first convolution is centred on frame k of a sound; window j of the second is on 2 j - 1 to
        2 j + 1 of these, of which -1 is the zeros beyond a sound's beginning.
        """
        dim = self.config.d_model
        windows = frames.unfold(0, KERNEL, 1).transpose(1, 2).index_select(0, layout.windows)
        first = self.conv1(windows.flatten(1))[:, :dim]
        pairs = F.pad(first, (0, 0, 1, 0)).unfold(0, KERNEL, 2).transpose(1, 2).contiguous()  # [P, KERNEL, dim]
        pairs[layout.firsts, 0] = 0
        steps: Tensor = self.conv2(pairs.flatten(1))[:, :dim].float()
        return steps + self.embed_positions.index_select(0, layout.positions)

    def _run_eagerly(self, batch: Batch) -> Tensor:
        """All blocks: [P, d_model] float32."""
        delta = None
        for block in self.layers:
            self.between_blocks()
            delta = block(batch.x, delta, batch.full, batch.rotary)
        return batch.x if delta is None else batch.x + delta

    def _sources(self, name: str) -> tuple[str, ...]:
        if name.startswith("projector."):
            return (f"multi_modal_projector.linear.{name.removeprefix('projector.')}",)
        for part, sources in self.PUBLISHED.items():
            if part in name:
                return tuple(f"audio_tower.{name.replace(part, source)}" for source in sources)
        return (f"audio_tower.{name}",)
