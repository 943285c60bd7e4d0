"""Attention over packed sequences: rows attend within their segment, and a segment never sees its neighbours.

Backends are a table; `choose_attention` picks one per tower and dtype, and a setting can force it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rtp_mm import ops
from rtp_mm.errors import StartError
from rtp_mm.logs import log_event
from rtp_mm.vit.packing import to_device
from rtp_mm.vit.rope import RotaryTable

# qkv [N, 3, heads, head_dim], not rotated yet -> [N, heads, head_dim], which a linear layer reads; rows past the last
# segment are padding and give zeros. qkv may be overwritten.
Attention = Callable[[Tensor, RotaryTable, "Segments"], Tensor]
HALF = (torch.bfloat16, torch.float16)
# What a trial runs: four frames, then the same rows in windows, in Qwen2.5-VL's shape.
TRIAL_FRAMES, TRIAL_FRAME, TRIAL_WINDOW = 4, 512, 64
TRIAL_HEADS, TRIAL_HEAD_DIM = 16, 80
TRIAL_ROUNDS = 5

_log = logging.getLogger(__name__)


@dataclass(eq=False)  # and not frozen: torch 2.11 looks into frozen ones, and compiles a block anew for other lengths
class Segments:
    """Which rows attend to each other: segment i is rows cu[i] to cu[i + 1]. Nobody changes it.

    cu:         [S + 1] int32 on the device, ascending from 0. Segments may be empty.
    max_length: of the longest segment, or more.
    lengths:    what `cu` says, on the host: nothing is read back.
    """

    cu: Tensor
    max_length: int
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, cu: Tensor, lengths: Sequence[int]) -> Segments:
        return cls(cu, max(lengths), tuple(lengths))

    @cached_property
    def rows(self) -> int:
        """Those that belong to a segment, as far as the host knows."""
        return sum(self.lengths)

    @cached_property
    def groups(self) -> list[tuple[int, Tensor]]:
        """For backends that want rectangular batches: rows of all segments of one length, as (length, [B * length]
        int64 on the device)."""
        starts_by_length: dict[int, list[int]] = defaultdict(list)
        start = 0
        for length in self.lengths:
            starts_by_length[length].append(start)
            start += length
        return [
            (length, to_device((torch.tensor(starts)[:, None] + torch.arange(length)).view(-1), self.cu.device))
            for length, starts in starts_by_length.items()
        ]


@dataclass(frozen=True, slots=True)
class Batch:
    """What a tower's blocks eat: x [N, dim] float32, which they overwrite, and its rows' angles and segments."""

    x: Tensor
    rotary: RotaryTable
    full: Segments
    windows: Segments  # `full` itself where there are no windows


def _rotated(qkv: Tensor, rotary: RotaryTable) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = ops.rotate_qk_(qkv, rotary.cos, rotary.sin).unbind(1)
    return q, k, v


def sdpa(qkv: Tensor, rotary: RotaryTable, segments: Segments) -> Tensor:
    """torch's scaled_dot_product_attention, one call for all segments of one length. Any device, any dtype."""
    q, k, v = _rotated(qkv, rotary)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    for length, rows in segments.groups:
        # [N, heads, dim] -> [segments, heads, length, dim]
        q_, k_, v_ = (t.index_select(0, rows).unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))
        attended = _attend(q_, k_, v_)
        out.index_copy_(0, rows, attended.transpose(1, 2).flatten(0, 1))
    return out


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """On CUDA by the one kernel whose bits do not depend on how many segments there are: FlashAttention splits the keys
    of few, and cuDNN makes a plan for every number of them.
    """
    if not q.is_cuda or q.shape[-1] * q.element_size() % 16:  # it takes no other heads
        return F.scaled_dot_product_attention(q, k, v)
    attended: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, False)[0]
    return attended


def packed(qkv: Tensor, rotary: RotaryTable, segments: Segments) -> Tensor:
    """Our own: CPU, float32 or bfloat16."""
    for_linear = not ops.uses_triton(qkv.device)  # whose linear layers take contiguous rows alone
    return ops.packed_attention(qkv, rotary.cos, rotary.sin, segments.cu, for_linear=for_linear)


def torch_varlen(qkv: Tensor, rotary: RotaryTable, segments: Segments) -> Tensor:
    """torch.nn.attention.varlen (2.10+): CUDA, 16-bit."""
    q, k, v = _rotated(qkv, rotary)
    out: Tensor = _varlen_attn()(q, k, v, segments.cu, segments.cu, segments.max_length, segments.max_length)
    return _zero_padding(out, segments)


@cache
def _varlen_attn() -> Callable[..., Any]:
    """Where it can split the keys (after torch 2.11) it must not: by how much would depend on the rest of the batch."""
    from torch.nn.attention.varlen import varlen_attn

    can_split = "num_splits" in inspect.signature(varlen_attn).parameters
    return partial(varlen_attn, num_splits=1) if can_split else varlen_attn


def flash(qkv: Tensor, rotary: RotaryTable, segments: Segments) -> Tensor:
    """The flash-attn package: CUDA, 16-bit."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = _rotated(qkv, rotary)
    longest = segments.max_length
    out: Tensor = flash_attn_varlen_func(q, k, v, segments.cu, segments.cu, longest, longest)
    return _zero_padding(out, segments)


def _zero_padding(out: Tensor, segments: Segments) -> Tensor:
    """Zeroes rows past the last segment, which no kernel writes: padding must stay finite."""
    if segments.rows == out.shape[0]:
        return out
    is_padding = torch.arange(out.shape[0], device=out.device) >= segments.cu[-1]
    return out.masked_fill_(is_padding[:, None, None], 0)


# In order of preference.
VARLEN_ATTENTION: dict[str, Attention] = {"flash": flash, "torch": torch_varlen, "packed": packed, "sdpa": sdpa}
TRACEABLE = ("packed",)  # the others read lengths on the host, for each of which torch.compile would compile anew


def is_usable(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the backend takes this dtype on this device and is installed."""
    if name == "sdpa":
        return True
    if name == "packed":
        return device.type == "cpu" and dtype != torch.float16
    if device.type != "cuda" or dtype not in HALF:
        return False
    return name == "torch" or _has_flash()


@cache
def _has_flash() -> bool:
    """Whether flash-attn can be used: one that was built for another torch, or of another generation, is found too."""
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except (ImportError, OSError, AttributeError, RuntimeError, TypeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "flash_attn":
            return False
        log_event(_log, "flash-attn is left alone", logging.WARNING, reason=str(error).partition("\n")[0])
        return False
    return True


def time_attention(
    backends: Mapping[str, Attention], dtype: torch.dtype, device: torch.device, clock: Callable[[], float]
) -> dict[str, float]:
    """Seconds that each backend takes for some frames and many windows, the best of a few rounds after a warm-up."""
    generator = torch.Generator("cpu").manual_seed(0)
    rows = TRIAL_FRAMES * TRIAL_FRAME
    shape = (rows, 3, TRIAL_HEADS, TRIAL_HEAD_DIM)
    qkv = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device, dtype)
    turn = torch.ones(rows, TRIAL_HEAD_DIM // 2, dtype=torch.float32, device=device)
    rotary = RotaryTable(turn, torch.zeros_like(turn))
    segments = []
    for length in (TRIAL_FRAME, TRIAL_WINDOW):
        cu = torch.arange(0, rows + 1, length, dtype=torch.int32, device=device)
        segments.append(Segments.from_lengths(cu, [length] * (rows // length)))

    def run(backend: Attention) -> float:
        _synchronize(device)
        started = clock()
        for each in segments:
            backend(qkv, rotary, each)
        _synchronize(device)
        return clock() - started

    for backend in backends.values():
        run(backend)
    return {name: min(run(backend) for _ in range(TRIAL_ROUNDS)) for name, backend in backends.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def choose_attention(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    table: Mapping[str, Attention] = VARLEN_ATTENTION,
    clock: Callable[[], float] = time.perf_counter,
) -> str:
    """The backend called `name`; for "auto" the first usable one, for "fastest" the one that a trial shows.

    "auto" is no trial: two servers of one configuration must answer with the same bits. Raises `StartError` if the
    backend cannot be used.
    """
    if name == "auto":
        return next(n for n in table if is_usable(n, dtype, device))
    if name == "fastest":
        usable_ones = {n: backend for n, backend in table.items() if is_usable(n, dtype, device)}
        seconds = time_attention(usable_ones, dtype, device, clock)
        _log.info("attention: %s", ", ".join(f"{n} {1e3 * s:.3f} ms" for n, s in seconds.items()))
        return min(seconds, key=lambda n: seconds[n])
    if not is_usable(name, dtype, device):
        usable = ", ".join(n for n in table if is_usable(n, dtype, device))
        raise StartError(f"MM_ATTENTION={name} cannot run {dtype} on {device} here; usable: {usable}")
    return name
