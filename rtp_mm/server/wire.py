"""Messages to values and back: TensorPB and the two forms of the reply end here, -1 in `MMPreprocessConfig.options`.

form `items`:  one MultimodalOutputPB per input, in order.
form `concat`: one MultimodalOutputPB for all: tensors concatenated on dim 0, rows per input in `split_size`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError

from rtp_mm.engine.caches import Embedded
from rtp_mm.errors import BadItemsError, ItemFailure, ReplyTooLargeError, WrongFormatError
from rtp_mm.media.redact import redact
from rtp_mm.server.proto import (
    MAX_MESSAGE_BYTES,
    MMPreprocessConfigPB,
    MultimodalInputPB,
    MultimodalInputsPB,
    MultimodalOutputPB,
    MultimodalOutputsPB,
    WireForm,
    read_varint,
    tags,
)
from rtp_mm.server.tensors import (
    Buffers,
    joined,
    length_delimited,
    tensor_message,
    trans_array,
    trans_from_array,
    trans_tensor,
)
from rtp_mm.types import MMEmbeddingRes, MMPreprocessConfig, MMUrlType, MultimodalInput

if TYPE_CHECKING:
    from torch import Tensor

    from rtp_mm.config import Settings

WIRE_METADATA = "rtp-mm-wire"
RETRY_AFTER_METADATA = "retry-after-ms"
SECONDS_METADATA = "rtp-mm-second-per-grid"
CUT_METADATA = "rtp-mm-audio-cut-s"
MODEL_METADATA = "rtp-mm-model"  # a status' initial metadata
_CONFIG_FIELDS = tuple(MMPreprocessConfigPB.DESCRIPTOR.fields_by_name)  # MMPreprocessConfig has the same names


def read_inputs(request: Any) -> list[MultimodalInput]:
    """`MultimodalInputsPB` -> inputs, in order. Raises `WrongFormatError` or `BadItemsError`, each bad item named."""
    if not request.multimodal_inputs:
        raise WrongFormatError("no items: multimodal_inputs is empty")
    inputs, failures = [], []
    for index, item in enumerate(request.multimodal_inputs):
        try:
            inputs.append(_read_input(item))
        except WrongFormatError as error:
            failures.append(ItemFailure(index, redact(item.multimodal_url), error))
    if failures:
        raise BadItemsError(failures)
    return inputs


def _read_input(item: Any) -> MultimodalInput:
    try:
        mm_type = MMUrlType(item.multimodal_type)
    except ValueError:
        known = ", ".join(f"{t.value} {t.name.lower()}" for t in MMUrlType)
        raise WrongFormatError(f"multimodal_type {item.multimodal_type} is none of {known}") from None
    sent = item.mm_preprocess_config
    config = {name: getattr(sent, name) for name in _CONFIG_FIELDS}
    # RTP-LLM's C++ client sends an uninitialised tensor with every request: only type TENSOR means it.
    tensor = trans_array(item.multimodal_tensor) if mm_type is MMUrlType.TENSOR else None
    return MultimodalInput(item.multimodal_url, mm_type, MMPreprocessConfig(**config), tensor)


def write_inputs(inputs: Sequence[MultimodalInput]) -> Any:
    """Inputs -> `MultimodalInputsPB`, the client's side. Raises `BadItemsError` for what the wire cannot carry."""
    messages, failures = [], []
    for index, item in enumerate(inputs):
        try:
            messages.append(_write_input(item))
        except WrongFormatError as error:
            failures.append(ItemFailure(index, redact(item.url), error))
    if failures:
        raise BadItemsError(failures)
    return MultimodalInputsPB(multimodal_inputs=messages)


def _write_input(item: MultimodalInput) -> Any:
    try:
        message = MultimodalInputPB(
            multimodal_url=item.url,
            multimodal_type=item.mm_type,
            mm_preprocess_config=MMPreprocessConfigPB(**{name: getattr(item.config, name) for name in _CONFIG_FIELDS}),
        )
        tensor = np.asarray(item.tensor) if item.mm_type is MMUrlType.TENSOR else None
    except (ValueError, TypeError, RuntimeError) as error:  # no UTF-8, over 32 bits, no integer; bfloat16, on a device
        raise WrongFormatError(f"cannot be sent: {error}") from None
    if tensor is not None:
        message.multimodal_tensor.CopyFrom(trans_from_array(tensor))
    return message


def choose_form(request: Any, metadata: Iterable[tuple[str, Any]], settings: Settings) -> WireForm:
    """The form of the reply: the call's metadata decides, then `MM_WIRE`, then what kind of client it is.

    RTP-LLM added `mm_timeout_ms` together with form `concat`, and its client always sets it (-1 by default).
    """
    asked = next((value for key, value in metadata if key == WIRE_METADATA), None)
    if asked in ("items", "concat"):
        return "items" if asked == "items" else "concat"
    if asked is not None:
        raise WrongFormatError(f"metadata {WIRE_METADATA} must be items or concat, got {str(asked)[:32]!r}")
    if settings.mm_wire != "auto":
        return settings.mm_wire
    sets_timeout = any(item.mm_preprocess_config.mm_timeout_ms for item in request.multimodal_inputs)
    return "concat" if sets_timeout else "items"


def write_result(result: MMEmbeddingRes, form: WireForm, max_bytes: int = MAX_MESSAGE_BYTES) -> bytes:
    """The reply, serialized, on any thread. The join is the one copy that a tensor's bytes see; there is none of a
    sealed item alone, in form `items`.

    Raises `ReplyTooLargeError` over `max_bytes`.
    """
    message = _concat(result) if form == "concat" else result.messages or _items(result)
    size = sum(map(len, message))
    if size > max_bytes:
        raise ReplyTooLargeError(
            f"the reply takes {size} bytes, one message at most {max_bytes}: send fewer or smaller items"
        )
    return joined(message)


def copied_bytes(result: MMEmbeddingRes, form: WireForm) -> int:
    """What `write_result` will copy, about."""
    is_whole = form == "items" and len(result.messages or ()) == 1
    return 0 if is_whole else sum(embedding.nbytes for embedding in result.embeddings)


def _concat(result: MMEmbeddingRes) -> Buffers:
    rows = [embedding.shape[0] for embedding in result.embeddings]
    if result.messages and len(rows) == 1:  # the same MultimodalOutputPB, without the tag and length before it
        whole = result.messages[0]
        _, start = read_varint(whole, 1)
        output: Buffers = [memoryview(whole)[start:]]
    else:
        output = _output(result.embeddings, result.position_ids, result.extra_inputs)
    return [*output, MultimodalOutputPB(split_size=rows).SerializeToString()]


def _items(result: MMEmbeddingRes) -> Buffers:
    message: Buffers = []
    for index, embedding in enumerate(result.embeddings):
        position_ids = result.position_ids[index : index + 1] if result.position_ids else None
        extra_inputs = result.extra_inputs[index : index + 1] if result.extra_inputs else None
        message += length_delimited(1, _output([embedding], position_ids, extra_inputs))
    return message


def seal(item: Embedded) -> Embedded:
    """The item as its own message in form `items`: kept so, it is answered with again and never copied."""
    if not item.embedding.numel():
        return item
    tensors = [item.embedding] if item.position_ids is None else [item.embedding, item.position_ids]
    parts = length_delimited(1, _output(tensors[:1], tensors[1:], None))
    message = joined(parts)
    ends = accumulate(map(len, parts))
    starts = [end - len(part) for end, part in zip(ends, parts, strict=True) if isinstance(part, memoryview)]
    frombuffer = _frombuffer()
    views = [
        frombuffer(message, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)
        for tensor, start in zip(tensors, starts, strict=True)
    ]
    return item._replace(embedding=views[0], position_ids=views[1] if views[1:] else None, message=message)


@cache
def _frombuffer() -> Callable[..., Tensor]:
    """`torch.frombuffer`. It warns once a process of bytes that cannot be written to: here, where nobody hears it."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        torch.frombuffer(bytes(1), dtype=torch.uint8)
    return torch.frombuffer


def _output(
    embeddings: Sequence[Tensor], position_ids: Sequence[Tensor] | None, extra_inputs: Sequence[Tensor] | None
) -> Buffers:
    """Fields 1 to 3 of a `MultimodalOutputPB`."""
    message = length_delimited(1, tensor_message(embeddings))
    if position_ids:
        message += length_delimited(2, tensor_message(position_ids))
    for extra in extra_inputs or ():
        message += length_delimited(3, tensor_message([extra]))
    return message


def read_result(reply: bytes) -> MMEmbeddingRes:
    """A reply in either form -> tensors per item. Raises `WrongFormatError` for bytes that are none."""
    try:
        if _is_concat(reply):
            return _read_concat(MultimodalOutputPB.FromString(reply))
        return _read_items(MultimodalOutputsPB.FromString(reply).multimodal_outputs)
    except DecodeError:
        raise WrongFormatError(f"{len(reply)} bytes are no reply of {WIRE_METADATA} items or concat") from None


def _is_concat(reply: bytes) -> bool:
    """Whether a field other than 1 stands at the top level: `items` has none, `concat` always its `split_size`."""
    return any(tag != 1 << 3 | 2 for tag in tags(reply))


def _read_items(outputs: Sequence[Any]) -> MMEmbeddingRes:
    with_ids = [output.HasField("multimodal_pos_id") for output in outputs]
    if any(with_ids) and not all(with_ids):
        raise WrongFormatError("position ids came for some items only")
    extra_inputs = [trans_tensor(extra) for output in outputs for extra in output.multimodal_extra_input]
    return MMEmbeddingRes(
        embeddings=[trans_tensor(output.multimodal_embedding) for output in outputs],
        position_ids=[trans_tensor(output.multimodal_pos_id) for output in outputs] if any(with_ids) else None,
        extra_inputs=extra_inputs or None,
    )


def _read_concat(output: Any) -> MMEmbeddingRes:
    rows = [*output.split_size]
    return MMEmbeddingRes(
        embeddings=_split(output.multimodal_embedding, rows),
        position_ids=_split(output.multimodal_pos_id, rows) if output.HasField("multimodal_pos_id") else None,
        extra_inputs=[trans_tensor(extra) for extra in output.multimodal_extra_input] or None,
    )


def _split(message: Any, rows: list[int]) -> list[Tensor]:
    tensor = trans_tensor(message)
    if min(rows, default=0) < 0 or sum(rows) != tensor.shape[0]:
        raise WrongFormatError(f"split_size {rows} does not cover {tensor.shape[0]} rows")
    return list(tensor.split(rows))
