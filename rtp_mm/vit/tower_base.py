"""What every tower has: where and how it runs, its way from loaded weights to the first forward."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from rtp_mm import _core
from rtp_mm.config import Settings
from rtp_mm.vit.attention import TRACEABLE, VARLEN_ATTENTION, Attention, Batch, choose_attention
from rtp_mm.vit.graphs import CudaCapture, CudaGraphs, use_graphs
from rtp_mm.vit.layers import Block, PatchMerger
from rtp_mm.vit.linear import Gemm, Linear, choose_compute_dtype, choose_gemm


@dataclass(frozen=True, slots=True)
class TowerOptions:
    """How a tower runs; the settings `MM_ATTENTION`, `MM_BATCH_INVARIANT` and so on."""

    attention: str = "auto"
    is_batch_invariant: bool = True
    compute_type: str = "auto"
    quantization: str = "none"
    cuda_graphs: str = "auto"
    cuda_graphs_bytes: int = 1 << 30
    is_compiled: bool = False

    @classmethod
    def of(cls, settings: Settings) -> TowerOptions:
        return cls(
            attention=settings.mm_attention,
            is_batch_invariant=settings.mm_batch_invariant,
            compute_type=settings.mm_compute_type,
            quantization=settings.mm_quantization,
            cuda_graphs=settings.mm_cuda_graphs,
            cuda_graphs_bytes=settings.mm_cuda_graphs_mb << 20,
            is_compiled=settings.mm_torch_compile,
        )


def _nothing() -> None:
    pass


class Tower(nn.Module):
    """Packs many items into one forward. Built on the meta device; `rtp_mm.vit.weights.load_weights` gives it tensors,
    then `finish_loading` makes of them what its GEMMs read.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device, options: TowerOptions | None) -> None:
        super().__init__()
        self.options = options or TowerOptions()
        self.dtype = dtype
        self.device = device
        self.compute_dtype = choose_compute_dtype(dtype, device, self.options.compute_type)
        self.attention_backend = choose_attention(self.options.attention, self.compute_dtype, device)
        self.between_blocks: Callable[[], None] = _nothing
        self._run: Callable[[Batch], Tensor] = self._run_eagerly

    @property
    def products(self) -> str:
        """What it multiplies in: a dtype, or the instructions that a CPU has for it."""
        is_bf16 = self.device.type == "cpu" and self.compute_dtype == torch.bfloat16
        return (is_bf16 and _core.bf16_instructions()) or str(self.compute_dtype).removeprefix("torch.")

    @property
    def _attention(self) -> Attention:
        attention = VARLEN_ATTENTION[self.attention_backend]
        if self.options.is_compiled and self.attention_backend not in TRACEABLE:
            return torch.compiler.disable(attention)  # type: ignore[no-any-return]
        return attention

    def _choose_gemms(self) -> tuple[type[Gemm], type[Gemm]]:
        """For most layers and for delicate ones (see `choose_gemm`)."""
        choose = partial(
            choose_gemm,
            self.device,
            self.compute_dtype,
            is_invariant=self.options.is_batch_invariant,
            quantization=self.options.quantization,
        )
        self._gemms = choose(), choose(is_delicate=True)
        return self._gemms

    @property
    def is_reentrant(self) -> bool:
        """Whether several threads may run it at once, each with any number of torch's threads, for the same bits: where
        all its kernels are our own for CPUs. Not where they are compiled, which is for one number of threads.
        """
        is_ours = self.attention_backend == "packed" and all(gemm.is_reentrant for gemm in self._gemms)
        return is_ours and not self.options.is_compiled

    def _run_eagerly(self, batch: Batch) -> Tensor:
        """What a graph can hold: all that depends on a batch's rows and segments alone."""
        raise NotImplementedError

    def _pack(self) -> None:
        """Packs the GEMMs' weights, and has batches run by graphs where they can; once, after loading.

        What is to be compiled is so at its first calls: once for all blocks, and for few shapes that stand for all.
        """
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack()
            elif isinstance(module, Block | PatchMerger) and self.options.is_compiled:
                module.compile(dynamic=True)
        if use_graphs(self.options.cuda_graphs, self.device, self.attention_backend):
            self._run = CudaGraphs(self._run_eagerly, CudaCapture(), self.options.cuda_graphs_bytes)

    def checkpoint_names(self) -> dict[str, tuple[str, ...]]:
        """Each parameter's name to the checkpoint tensors it holds, one after another on dimension 0."""
        return {name: self._sources(name) for name, _ in self.named_parameters()}

    def _sources(self, name: str) -> tuple[str, ...]:
        raise NotImplementedError
