from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest
from google.protobuf import descriptor_pb2
from google.protobuf.message import DecodeError

from rtp_mm.errors import WrongFormatError
from rtp_mm.server import proto

RIVAL = """
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

rival = descriptor_pb2.FileDescriptorProto(name="model_rpc_service.proto", syntax="proto3")
rival.message_type.add(name="TensorPB").field.add(name="other", number=1, type=9, label=1)
descriptor_pool.Default().Add(rival)
other = message_factory.GetMessageClass(descriptor_pool.Default().FindMessageTypeByName("TensorPB"))(other="x")

from rtp_mm.server.proto import MultimodalOutputsPB, TensorPB

sent = MultimodalOutputsPB()
sent.multimodal_outputs.add().multimodal_embedding.CopyFrom(TensorPB(shape=[2], fp32_data=b"12345678"))
received = MultimodalOutputsPB.FromString(sent.SerializeToString())
assert received.multimodal_outputs[0].multimodal_embedding.fp32_data == b"12345678"
assert other.other == "x" and type(other) is not TensorPB
print("both live")
"""


@pytest.mark.parametrize("implementation", ["upb", "python"])
def test_a_rival_tensor_pb_in_the_default_pool_does_no_harm(implementation: str) -> None:
    code = f"import os; os.environ['PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION'] = {implementation!r}\n{RIVAL}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "both live\n"), done.stderr


def test_the_rival_would_break_the_default_pool() -> None:
    code = RIVAL.partition("from rtp_mm")[0] + (
        "from rtp_mm.server.proto import file_descriptor\ndescriptor_pool.Default().Add(file_descriptor())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "TypeError" in done.stderr


def test_importing_the_schema_imports_no_torch() -> None:
    code = "import sys, rtp_mm.server.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_enums_are_reached_as_in_generated_code() -> None:
    message = proto.TensorPB(data_type=proto.TensorPB.BF16)
    assert [proto.TensorPB.DataType.Value(name) for name in ("FP32", "INT32", "FP16", "BF16")] == [0, 1, 2, 3]
    assert proto.TensorPB.DataType.BF16 == proto.TensorPB.BF16 == message.data_type == 3
    assert proto.TensorPB.DataType.Name(1) == "INT32"


@pytest.mark.parametrize(
    ("message", "field", "number"),
    [
        ("TensorPB", "bf16_data", 6),
        ("MMPreprocessConfigPB", "mm_timeout_ms", 9),
        ("MMPreprocessConfigPB", "crop_positions", 8),
        ("MultimodalInputPB", "mm_preprocess_config", 4),
        ("MultimodalOutputPB", "split_size", 4),
        ("WorkerStatusPB", "waiting_query_len", 5),
        ("WorkerStatusPB", "max_batch_tokens_size", 22),
        ("CacheStatusPB", "cache_keys", 5),
    ],
)
def test_field_numbers_are_rtp_llms(message: str, field: str, number: int) -> None:
    assert getattr(proto, message).DESCRIPTOR.fields_by_name[field].number == number


def test_bytes_on_the_wire_are_what_protoc_would_give() -> None:
    assert proto.TensorPB(data_type=3, shape=[1, 300], bf16_data=b"ab").SerializeToString() == (
        b"\x08\x03\x12\x03\x01\xac\x02\x32\x02ab"  # enum; packed int64; bytes
    )
    cache = proto.CacheStatusPB(cache_keys={-1: True})
    assert cache.SerializeToString() == b"\x2a\x0d\x08" + b"\xff" * 9 + b"\x01\x10\x01"
    assert dict(proto.CacheStatusPB.FromString(cache.SerializeToString()).cache_keys) == {-1: True}


@pytest.mark.parametrize(("form", "reply"), [("items", ".MultimodalOutputsPB"), ("concat", ".MultimodalOutputPB")])
def test_the_description_names_the_reply_of_its_form(form: proto.WireForm, reply: str) -> None:
    (service,) = proto.file_descriptor(form).service
    assert {m.name: m.output_type for m in service.method}["RemoteMultimodalEmbedding"] == reply


@pytest.mark.parametrize("form", ["items", "concat"])
def test_the_source_names_every_field_as_the_description_does(form: proto.WireForm) -> None:
    """protoc makes the same description of it: compared once, by hand."""
    source = proto.proto_source(form)
    for message in proto.file_descriptor(form).message_type:
        body = re.search(rf"message {message.name} \{{(.*?)\n\}}", source, re.DOTALL)
        assert body is not None
        assert re.findall(r"(\w+) = (\d+);$", body[1], re.MULTILINE) == [(f.name, str(f.number)) for f in message.field]
    [service] = proto.file_descriptor(form).service
    methods = [(m.name, m.input_type[1:], m.output_type[1:]) for m in service.method]
    assert re.findall(r"rpc (\w+)\((\w+)\) returns \((\w+)\);", source) == methods


def test_the_description_leaves_no_type_to_guess() -> None:
    """Clients in other languages build from it what pure-Python protobuf would not resolve for them."""
    fields = [field for message in proto.file_descriptor().message_type for field in message.field]
    by_type = descriptor_pb2.FieldDescriptorProto
    assert all(field.type for field in fields)
    assert all(
        field.type_name.startswith(".") for field in fields if field.type in (by_type.TYPE_MESSAGE, by_type.TYPE_ENUM)
    )


@pytest.mark.parametrize(
    "item", [b"\x0a\0", b"\x0b\x0c", b"\x10\x01", b"\x11" + bytes(8), b"\x15" + bytes(4), b"\x7a\0"]
)
def test_fields_are_counted_whatever_they_are(item: bytes) -> None:
    count = 2 if item == b"\x0b\x0c" else 1  # a group's beginning and its end
    assert len([*proto.tags(item * 3)]) == 3 * count
    proto.MultimodalInputsPB.FromString(item * 3)  # which is a message to protobuf, too


@pytest.mark.parametrize(
    ("item", "is_taken"),
    [
        ({"multimodal_url": "u" * (2 << 20), "multimodal_type": 1}, True),
        ({"multimodal_type": 4, "multimodal_tensor": {"fp32_data": bytes(2 << 20)}}, True),
        ({"multimodal_type": 1, "multimodal_tensor": {"fp32_data": bytes(1000)}}, True),  # as RTP-LLM's client sends it
        ({"multimodal_type": 1, "multimodal_tensor": {"fp32_data": bytes(2 << 20)}}, False),
        ({"multimodal_tensor": {"fp32_data": bytes(2 << 20)}}, False),
        ({"mm_preprocess_config": {"crop_positions": [0.5] * (1 << 19)}}, False),
    ],
)
def test_what_nobody_reads_takes_little_memory(item: dict[str, Any], is_taken: bool) -> None:
    data = proto.MultimodalInputsPB(multimodal_inputs=[item]).SerializeToString()
    parsed = proto._parsed(proto.MultimodalInputsPB, data)
    assert isinstance(parsed, WrongFormatError) is not is_taken
    if not is_taken:
        assert "bytes that nobody reads" in str(parsed)
    assert isinstance(
        proto._parsed(proto.MultimodalInputsPB, data + b"\x7a\x80\x80\x80\x01" + bytes(1 << 21)), WrongFormatError
    )


@pytest.mark.parametrize("data", [b"\x0a", b"\x80", b"\xff" * 11])
def test_what_ends_amid_a_tag_or_a_length_has_no_fields(data: bytes) -> None:
    with pytest.raises(DecodeError):
        [*proto.tags(data)]
