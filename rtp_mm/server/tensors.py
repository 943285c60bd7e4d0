"""`TensorPB` to tensors and back: little-endian, row-major, its shape checked against its bytes.

torch is imported where a tensor is at hand: the server binds its ports before it spends two seconds on that import.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rtp_mm.errors import WrongFormatError
from rtp_mm.server.proto import TensorPB

if TYPE_CHECKING:
    from torch import Tensor

Buffers = list[bytes | memoryview]  # parts of one protobuf message, each a flat run of bytes

# DataType -> name in torch, bytes an element, data field; in the order of the enum.
_KINDS = (
    ("float32", 4, "fp32_data"),
    ("int32", 4, "int32_data"),
    ("float16", 2, "fp16_data"),
    ("bfloat16", 2, "bf16_data"),
)
_DATA_TYPE_OF = {f"torch.{name}": number for number, (name, _, _) in enumerate(_KINDS)}
_LENGTH_DELIMITED = 2  # protobuf's wire type
_MAX_DIMENSIONS = 8
_MAX_BYTES = 1 << 62  # torch and numpy count bytes in int64
_FEW_BYTES = 1 << 20  # copied in a tenth of a millisecond


def trans_tensor(tensor: Any) -> Tensor:
    """`TensorPB` -> a tensor of its dtype and shape that owns its memory; an absent `TensorPB` -> an empty tensor.

    Raises `WrongFormatError` where shape and bytes disagree.
    """
    import torch

    name, shape, data = _parts(tensor)
    dtype: torch.dtype = getattr(torch, name)
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def trans_from_tensor(tensor: Tensor) -> Any:
    """A float32, int32, float16 or bfloat16 tensor, on any device -> `TensorPB`. Raises `WrongFormatError`."""
    message = _header([tensor])
    setattr(message, _KINDS[message.data_type][2], bytes(_flat_bytes(tensor)))
    return message


def trans_from_array(array: NDArray[Any]) -> Any:
    """A uint8, int32 or float32 numpy array -> `TensorPB` INT32 or FP32. Raises `WrongFormatError`."""
    if array.dtype not in (np.uint8, np.int32, np.float32):
        raise WrongFormatError(f"an input tensor must be uint8, int32 or float32, got {array.dtype}")
    if array.dtype == np.float32:
        return TensorPB(data_type=TensorPB.FP32, shape=array.shape, fp32_data=array.tobytes())
    return TensorPB(data_type=TensorPB.INT32, shape=array.shape, int32_data=array.astype("<i4").tobytes())


def trans_array(tensor: Any) -> NDArray[Any]:
    """An INT32 or FP32 `TensorPB` -> a read-only numpy view of its bytes; no torch. Raises `WrongFormatError`."""
    name, shape, data = _parts(tensor)
    if name not in ("int32", "float32"):
        raise WrongFormatError(
            f"multimodal_tensor must be INT32 or FP32, got {TensorPB.DataType.Name(tensor.data_type)}"
        )
    if not data:
        raise WrongFormatError(f"multimodal_tensor is empty, its shape is {shape}")
    return np.frombuffer(data, dtype="<i4" if name == "int32" else "<f4").reshape(shape)


def tensor_message(tensors: Sequence[Tensor]) -> Buffers:
    """One `TensorPB`, serialized, of the tensors concatenated on dim 0. The data are views: nothing is copied here.

    Raises `WrongFormatError` where dtypes or trailing dimensions differ.
    """
    header = _header(tensors)
    _, _, field_name = _KINDS[header.data_type]
    number = TensorPB.DESCRIPTOR.fields_by_name[field_name].number
    data: Buffers = [flat for flat in map(_flat_bytes, tensors) if len(flat)]
    return [header.SerializeToString(), *(length_delimited(number, data) if data else [])]


def length_delimited(number: int, value: Buffers) -> Buffers:
    """Field `number`, of 1 to 15, of a message with bytes or a submessage as its value."""
    return [bytes([number << 3 | _LENGTH_DELIMITED]) + _varint(sum(map(len, value))), *value]


def joined(parts: Sequence[bytes | memoryview]) -> bytes:
    """The message in one piece. Other threads run while much is copied: `bytes.join` lets none, where a part is memory
    that may be written to, and what it takes anew costs several times the copy.
    """
    nbytes = sum(map(len, parts))
    if len(parts) == 1 or nbytes <= _FEW_BYTES:
        return b"".join(parts)
    message = bytes(nbytes)  # nobody else's until it is returned
    address = np.frombuffer(message, np.uint8).ctypes.data
    for part in filter(len, parts):
        ctypes.memmove(address, np.frombuffer(part, np.uint8).ctypes.data, len(part))
        address += len(part)
    return message


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _header(tensors: Sequence[Tensor]) -> Any:
    """The `TensorPB` of the tensors concatenated on dim 0, without the data."""
    first, *others = tensors
    kind = _DATA_TYPE_OF.get(str(first.dtype))
    if kind is None:
        raise WrongFormatError(f"a TensorPB holds float32, int32, float16 or bfloat16, got {first.dtype}")
    for other in others:
        if other.dtype != first.dtype or other.shape[1:] != first.shape[1:]:
            raise WrongFormatError(
                f"tensors of one TensorPB must agree, got {first.dtype} {[*first.shape]} and "
                f"{other.dtype} {[*other.shape]}"
            )
    shape = [sum(t.shape[0] for t in tensors), *first.shape[1:]] if others else first.shape
    return TensorPB(data_type=kind, shape=shape)


def _flat_bytes(tensor: Tensor) -> memoryview:
    """The tensor's bytes, row-major; a view where the tensor is contiguous on the host."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy(force=True).data


def _parts(tensor: Any) -> tuple[str, list[int], bytes]:
    """Dtype name, shape and bytes of a `TensorPB`, in agreement with each other."""
    if not 0 <= tensor.data_type < len(_KINDS):
        raise WrongFormatError(f"TensorPB data_type {tensor.data_type} is unknown")
    name, itemsize, field_name = _KINDS[tensor.data_type]
    if len(tensor.shape) > _MAX_DIMENSIONS:
        raise WrongFormatError(f"TensorPB has {len(tensor.shape)} dimensions, at most {_MAX_DIMENSIONS} are taken")
    shape, data = list(tensor.shape), getattr(tensor, field_name)
    if not shape and not data:
        return name, [0], b""  # absent on the wire
    if min(shape, default=0) < 0:
        raise WrongFormatError(f"TensorPB shape {shape} is negative")
    if itemsize * math.prod(max(side, 1) for side in shape) > _MAX_BYTES:
        raise WrongFormatError(f"TensorPB shape {shape} is too large")
    if itemsize * math.prod(shape) != len(data):
        raise WrongFormatError(
            f"TensorPB shape {shape} takes {itemsize * math.prod(shape)} bytes of {field_name}, got {len(data)}"
        )
    return name, shape, data
