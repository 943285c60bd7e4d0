"""From a checkpoint's tensors to a module's parameters: names are data, loading is strict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from torch import Tensor, nn

from rtp_mm.errors import StartError
from rtp_mm.vit.checkpoint import Checkpoint
from rtp_mm.vit.linear import Linear

# Buffers that some versions saved; a tower computes them.
IGNORED_SUFFIXES = (".inv_freq", ".position_ids")
FLOATS = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
LISTED = 5  # names in an error; the rest are counted


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """What a model needs from a checkpoint.

    sources:    attribute path from the model -> names of the tensors that stand there, one after another on
                dimension 0, without prefix.
    prefix:     where these names stand in a checkpoint; where the plan owns parts, another that has all will do.
    owned:      parts below the prefix ("" is all of it) under which nothing else may stand.
    """

    sources: Mapping[str, tuple[str, ...]]
    prefix: str
    owned: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        return [name for sources in self.sources.values() for name in sources]


def find_prefix(names: frozenset[str], plan: WeightPlan) -> str:
    """The prefix under which `names` has all that the plan wants: the declared one, else, for a plan that owns
    parts, the shortest that is anywhere.

    Saves of one family differ in it: `visual.`, `model.visual.`, `thinker.visual.`. Raises `StartError`, naming what
    is missing under the prefix that has most.
    """
    wanted = plan.names
    candidates = {plan.prefix}
    if plan.owned:
        candidates |= {name.removesuffix(wanted[0]) for name in names if name.endswith(wanted[0])}
    missing = {prefix: [w for w in wanted if prefix + w not in names] for prefix in candidates}
    best = min(candidates, key=lambda prefix: (len(missing[prefix]), prefix != plan.prefix, len(prefix), prefix))
    if missing[best]:
        raise StartError(f"the checkpoint lacks {_listing(best + name for name in missing[best])}")
    return best


def load_weights(model: object, plan: WeightPlan, checkpoint: Checkpoint, device: torch.device) -> None:
    """Gives every parameter and buffer in `plan` its tensor, in its own dtype, on `device`, one at a time. Raises
    `StartError` that names missing, extra and misshapen tensors.
    """
    prefix = find_prefix(checkpoint.names, plan)
    _refuse_extra(checkpoint.names, prefix, plan)
    for path, sources in plan.sources.items():
        owner, leaf = _resolve(model, path)
        _fill(owner, leaf, {prefix + source: checkpoint.tensor(prefix + source) for source in sources}, device)


def weights_fingerprint(plan: WeightPlan, checkpoint: Checkpoint) -> str:
    """Hex, of the names and bytes that `plan` takes from the checkpoint. Raises `StartError` for what it lacks."""
    prefix = find_prefix(checkpoint.names, plan)
    fingerprint = blake3(max_threads=blake3.AUTO)
    for source in plan.names:
        fingerprint.update(source.encode())
        fingerprint.update(checkpoint.tensor(prefix + source).contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return str(fingerprint.hexdigest())


def _resolve(model: object, path: str) -> tuple[object, str]:
    """`a.b.0.weight` to the object that `a.b.0` is, and `weight`."""
    *owners, leaf = path.split(".")
    owner = model
    for name in owners:
        owner = owner[int(name)] if isinstance(owner, Sequence) else getattr(owner, name)
    return owner, leaf


def _fill(owner: object, leaf: str, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Writes the tensors, one after another, into what stands at `owner.leaf`, in its dtype and shape.

    In place, so that whatever shares the parameter sees it; one on the meta device is replaced by a real one. A linear
    layer reads its weight but once: where it can, it is lent the checkpoint's own, which nobody copies then.
    """
    target: Tensor = getattr(owner, leaf)
    _check(target, tensors)
    parts = list(tensors.values())
    is_ready = all(part.dtype == target.dtype and part.is_contiguous() for part in parts)
    if is_ready and target.is_meta and device.type == "cpu" and isinstance(owner, Linear) and leaf == "weight":
        owner.lend(parts)
        return
    # Not `empty_like`: of a meta tensor it takes torch's Python decompositions, and half a second to import them.
    value = torch.empty(target.shape, dtype=target.dtype, device=device) if target.is_meta else target.data
    rows = [part.shape[0] if part.ndim else 1 for part in parts]
    for part, place in zip(parts, value.split(rows) if value.ndim else [value], strict=True):
        place.copy_(part)
    if target.dtype == torch.float16 and not torch.isfinite(value).all():
        raise StartError(f"{', '.join(tensors)}: too large for fp16; use ACT_TYPE=bf16 or fp32")
    if target.is_meta:
        is_parameter = isinstance(target, nn.Parameter)
        setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def _check(target: Tensor, tensors: Mapping[str, Tensor]) -> None:
    """Raises `StartError` for tensors that have another shape together, or hold no plain floating-point numbers."""
    parts = list(tensors.values())
    rows = sum(part.shape[0] for part in parts if part.ndim)
    shape = parts[0].shape if len(parts) == 1 else torch.Size((rows, *parts[0].shape[1:]))
    if shape != target.shape or any(part.shape[1:] != parts[0].shape[1:] for part in parts):
        came = ", ".join(f"{name} {list(part.shape)}" for name, part in tensors.items())
        raise StartError(f"misshapen: {came}, but the configuration asks for {list(target.shape)}")
    for name, part in tensors.items():
        if target.is_floating_point() and part.dtype not in FLOATS:
            raise StartError(f"{name} is {part.dtype}: quantised checkpoints are not supported")


def _refuse_extra(names: frozenset[str], prefix: str, plan: WeightPlan) -> None:
    expected = {prefix + name for name in plan.names}
    owned = tuple(prefix + part for part in plan.owned)
    extra = [n for n in names if n.startswith(owned) and n not in expected and not n.endswith(IGNORED_SUFFIXES)]
    if extra:
        raise StartError(f"the checkpoint has tensors that this tower has no place for: {_listing(sorted(extra))}")


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
