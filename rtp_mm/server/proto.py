"""RTP-LLM's `MultimodalRpcService`: its messages, its stub and its registration, without generated code.

The schema has no protobuf package, so a process that also holds `rtp_llm` would see a second `TensorPB` in protobuf's
default pool, which is a TypeError. The descriptors are therefore built at import in a private pool. Field numbers are
RTP-LLM's (`model_rpc_service.proto`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any, Literal

import grpc
from google.protobuf import descriptor_pb2, message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError

from rtp_mm.errors import WrongFormatError
from rtp_mm.types import MMUrlType

WireForm = Literal["items", "concat"]

FILE_NAME = "model_rpc_service.proto"
SERVICE = "MultimodalRpcService"
MAX_MESSAGE_BYTES = 1 << 30  # each way, as RTP-LLM's clients and servers set it
MAX_ITEMS = 1024  # of one request; each costs the event loop 0.1 ms, and its 2 bytes on the wire are 60 once parsed
LARGEST_UNREAD = 1 << 20  # bytes of a request beside URLs and tensors; RTP-LLM's client sends an empty tensor with each
MESSAGE_SIZE_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

_DATA_TYPE = "TensorPB.DataType"
_DATA_TYPES = ("FP32", "INT32", "FP16", "BF16")  # numbered from 0

# MultimodalOutputPB is the whole reply in form `concat`, one item of it in form `items`: a superset serves both.
_MESSAGES = {
    "TensorPB": (
        "TensorPB.DataType data_type = 1",
        "repeated int64 shape = 2",
        "bytes fp32_data = 3",
        "bytes int32_data = 4",
        "bytes fp16_data = 5",
        "bytes bf16_data = 6",
    ),
    "MMPreprocessConfigPB": (
        "int32 width = 1",
        "int32 height = 2",
        "int32 min_pixels = 3",
        "int32 max_pixels = 4",
        "int32 fps = 5",
        "int32 min_frames = 6",
        "int32 max_frames = 7",
        "repeated float crop_positions = 8",
        "int32 mm_timeout_ms = 9",
    ),
    "MultimodalInputPB": (
        "string multimodal_url = 1",
        "int32 multimodal_type = 2",
        "TensorPB multimodal_tensor = 3",
        "MMPreprocessConfigPB mm_preprocess_config = 4",
    ),
    "MultimodalInputsPB": ("repeated MultimodalInputPB multimodal_inputs = 1",),
    "MultimodalOutputPB": (
        "TensorPB multimodal_embedding = 1",
        "TensorPB multimodal_pos_id = 2",
        "repeated TensorPB multimodal_extra_input = 3",
        "repeated int32 split_size = 4",
    ),
    "MultimodalOutputsPB": ("repeated MultimodalOutputPB multimodal_outputs = 1",),
    "StatusVersionPB": ("int64 latest_cache_version = 1", "int64 latest_finished_version = 2"),
    "WorkerStatusPB": (
        "string role = 1",
        "int32 available_concurrency = 2",
        "int32 waiting_query_len = 5",
        "int32 running_query_len = 6",
        "double step_latency_ms = 7",
        "int32 iterate_count = 8",
        "int32 dp_size = 9",
        "int32 tp_size = 10",
        "int64 status_version = 12",
        "bool alive = 13",
        "string precision = 14",
        "int64 available_kv_cache = 17",
        "int64 total_kv_cache = 18",
        "int64 max_batch_tokens_size = 22",
    ),
    "CacheVersionPB": ("int64 latest_cache_version = 1", "bool need_cache_keys = 2"),
    "CacheStatusPB": (
        "int64 available_kv_cache = 1",
        "int64 total_kv_cache = 2",
        "int64 block_size = 3",
        "int64 version = 4",
        "repeated CacheStatusPB.CacheKeysEntry cache_keys = 5",  # map<int64, bool>, as protobuf spells it out
    ),
}
_CACHE_KEYS_ENTRY = ("int64 key = 1", "bool value = 2")


_COMMENTS = (
    "// Tensors are row-major and little-endian, in the field of their data_type.",
    "// multimodal_type: 0 told from the bytes, 1 image, 2 video, 3 audio, 4 tensor.",
    "// MMPreprocessConfigPB: 0 or less is unset; width and height come together; crop_positions are x1, y1, x2, y2 in",
    "// fractions of the image.",
    "// MultimodalOutputPB: multimodal_embedding [tokens, hidden], multimodal_pos_id [tokens, 3] int32 (t, h, w).",
    "",
)


def _methods(form: WireForm) -> dict[str, tuple[str, str]]:
    """Method -> (request, reply). The two forms share one method path."""
    return {
        "RemoteMultimodalEmbedding": (
            "MultimodalInputsPB",
            "MultimodalOutputsPB" if form == "items" else "MultimodalOutputPB",
        ),
        "GetWorkerStatus": ("StatusVersionPB", "WorkerStatusPB"),
        "GetCacheStatus": ("CacheVersionPB", "CacheStatusPB"),
    }


def proto_source(form: WireForm = "items") -> str:
    """The same schema as the text of a `.proto` file."""
    lines = [*_COMMENTS, 'syntax = "proto3";', ""]
    for name, fields in _MESSAGES.items():
        lines.append(f"message {name} {{")
        if name == "TensorPB":
            values = " ".join(f"{value} = {number};" for number, value in enumerate(_DATA_TYPES))
            lines.append(f"  enum DataType {{ {values} }}")
        lines += [f"  {field};" for field in fields]
        lines += ["}", ""]
    methods = [f"  rpc {name}({request}) returns ({reply});" for name, (request, reply) in _methods(form).items()]
    text = "\n".join([*lines, f"service {SERVICE} {{", *methods, "}", ""])
    return text.replace("repeated CacheStatusPB.CacheKeysEntry", "map<int64, bool>")


def file_descriptor(form: WireForm = "items") -> descriptor_pb2.FileDescriptorProto:
    """The schema as protobuf describes it, with the reply of `RemoteMultimodalEmbedding` in the given form."""
    file = descriptor_pb2.FileDescriptorProto(name=FILE_NAME, syntax="proto3")
    for name, fields in _MESSAGES.items():
        _add_fields(file.message_type.add(name=name), fields)
    by_name = {message.name: message for message in file.message_type}
    data_type = by_name["TensorPB"].enum_type.add(name="DataType")
    for number, value in enumerate(_DATA_TYPES):
        data_type.value.add(name=value, number=number)
    entry = by_name["CacheStatusPB"].nested_type.add(name="CacheKeysEntry")
    entry.options.map_entry = True
    _add_fields(entry, _CACHE_KEYS_ENTRY)
    service = file.service.add(name=SERVICE)
    for method, (request, reply) in _methods(form).items():
        service.method.add(name=method, input_type=f".{request}", output_type=f".{reply}")
    return file


def _add_fields(message: descriptor_pb2.DescriptorProto, fields: tuple[str, ...]) -> None:
    """Adds fields given as proto3 text, `[repeated] type name = number`."""
    scalars = descriptor_pb2.FieldDescriptorProto.Type.keys()
    for text in fields:
        *labels, kind, name, _, number = text.split()
        field = message.field.add(name=name, number=int(number))
        field.label = field.LABEL_REPEATED if labels else field.LABEL_OPTIONAL
        if (scalar := f"TYPE_{kind.upper()}") in scalars:
            field.type = field.Type.Value(scalar)
        else:
            field.type = field.TYPE_ENUM if kind == _DATA_TYPE else field.TYPE_MESSAGE
            field.type_name = f".{kind}"


_POOL = DescriptorPool()
_POOL.Add(file_descriptor())


def _message(name: str) -> Any:
    return message_factory.GetMessageClass(_POOL.FindMessageTypeByName(name))


TensorPB = _message("TensorPB")
MMPreprocessConfigPB = _message("MMPreprocessConfigPB")
MultimodalInputPB = _message("MultimodalInputPB")
MultimodalInputsPB = _message("MultimodalInputsPB")
MultimodalOutputPB = _message("MultimodalOutputPB")
MultimodalOutputsPB = _message("MultimodalOutputsPB")
StatusVersionPB = _message("StatusVersionPB")
WorkerStatusPB = _message("WorkerStatusPB")
CacheVersionPB = _message("CacheVersionPB")
CacheStatusPB = _message("CacheStatusPB")


def method_path(method: str) -> str:
    return f"/{SERVICE}/{method}"


class MultimodalRpcServiceStub:
    """A client's side of the service over a sync or an asyncio channel; the reply is parsed as form `items`."""

    RemoteMultimodalEmbedding: Any
    GetWorkerStatus: Any
    GetCacheStatus: Any

    def __init__(self, channel: Any) -> None:
        for method, (request, reply) in _methods("items").items():
            call = channel.unary_unary(
                method_path(method),
                request_serializer=_message(request).SerializeToString,
                response_deserializer=_message(reply).FromString,
            )
            setattr(self, method, call)


class MultimodalRpcServiceServicer:
    """Base of a server's side: every method answers UNIMPLEMENTED."""

    def RemoteMultimodalEmbedding(self, request: Any, context: Any) -> Any:
        return self._unimplemented(context)

    def GetWorkerStatus(self, request: Any, context: Any) -> Any:
        return self._unimplemented(context)

    def GetCacheStatus(self, request: Any, context: Any) -> Any:
        return self._unimplemented(context)

    def _unimplemented(self, context: Any) -> None:
        context.set_code(grpc.StatusCode.UNIMPLEMENTED)
        context.set_details("Method not implemented!")
        raise NotImplementedError("Method not implemented!")


def add_MultimodalRpcServiceServicer_to_server(servicer: Any, server: Any) -> None:
    """Registers a servicer, whose methods answer with a message or with the bytes of one already serialized.

    A request that cannot be read comes as the error that says why.
    """
    handlers = {
        method: grpc.unary_unary_rpc_method_handler(
            getattr(servicer, method),
            request_deserializer=partial(_parsed, _message(request)),
            response_serializer=_serialized,
        )
        for method, (request, _) in _methods("items").items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _parsed(message: Any, data: bytes) -> Any:
    try:
        if sum(1 for _ in islice(tags(data), MAX_ITEMS + 1)) > MAX_ITEMS:
            return WrongFormatError(f"over the limit of {MAX_ITEMS} items: send them in several requests")
        if len(data) > LARGEST_UNREAD and (unread := sum(_unread(data))) > LARGEST_UNREAD:
            return WrongFormatError(f"{unread} bytes that nobody reads: a tensor is for items of type TENSOR")
        return message.FromString(data)
    except DecodeError:
        return WrongFormatError("the request does not parse")


def _unread(request: bytes) -> Iterator[int]:
    """Sizes of what a parsed request holds in memory and no budget counts, being neither a URL nor an item's tensor."""
    for tag, start, end in fields(request):
        if tag != 1 << 3 | 2:  # no item
            yield end - start
            continue
        parts = [*fields(request, start, end)]
        kinds = [read_varint(request, at)[0] for part, at, _ in parts if part == 2 << 3]
        read = (1, 3) if kinds[-1:] == [MMUrlType.TENSOR] else (1,)
        yield sum(end - start for part, start, end in parts if part >> 3 not in read)


def tags(data: bytes) -> Iterator[int]:
    """Those of a message's fields, in order, found without parsing what is in them; `DecodeError` for what is none."""
    return (tag for tag, _, _ in fields(data))


def fields(data: bytes, position: int = 0, end: int | None = None) -> Iterator[tuple[int, int, int]]:
    """(tag, where its value begins, where it ends) of a message's fields. Raises `DecodeError`."""
    end = len(data) if end is None else min(end, len(data))
    while position < end:
        tag, start = read_varint(data, position)
        match tag & 7:
            case 0:
                _, position = read_varint(data, start)
            case 1:
                position = start + 8
            case 2:
                length, start = read_varint(data, start)
                position = start + length
            case 5:
                position = start + 4
            case _:
                position = start
        yield tag, start, position


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    """The number there, and where it ends. Raises `DecodeError`."""
    value = shift = 0
    while position < len(data) and shift < 70:
        value |= (data[position] & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if data[position - 1] < 0x80:
            return value, position
    raise DecodeError("truncated varint")


def _serialized(reply: Any) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()
