from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from fake_engine import FakeEngine

from rtp_mm.config import load_settings
from rtp_mm.errors import BadItemsError, ReplyTooLargeError, WrongFormatError
from rtp_mm.server import wire
from rtp_mm.server.proto import MultimodalInputPB, MultimodalInputsPB, MultimodalOutputPB, MultimodalOutputsPB, TensorPB
from rtp_mm.server.tensors import joined, trans_array, trans_from_tensor, trans_tensor
from rtp_mm.types import MMEmbeddingRes, MMPreprocessConfig, MMUrlType, MultimodalInput

DTYPES = [torch.float32, torch.int32, torch.float16, torch.bfloat16]


def request(*items: dict[str, Any]) -> Any:
    return MultimodalInputsPB(multimodal_inputs=[MultimodalInputPB(**item) for item in items])


def assert_same(a: MMEmbeddingRes, b: MMEmbeddingRes) -> None:
    for name in ("embeddings", "position_ids", "extra_inputs"):
        left, right = getattr(a, name), getattr(b, name)
        assert (left is None) == (right is None), name
        for x, y in zip(left or [], right or [], strict=True):
            assert x.dtype == y.dtype
            assert x.shape == y.shape
            assert torch.equal(x, y)


# --- tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (0, 5), (2, 0), (2, 3, 4)])
def test_a_tensor_survives_the_round_trip(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 100).to(dtype)
    received = trans_tensor(TensorPB.FromString(trans_from_tensor(tensor).SerializeToString()))
    assert received.dtype == dtype
    assert received.shape == tensor.shape
    assert torch.equal(received, tensor)


def test_a_received_tensor_owns_its_memory() -> None:
    message = trans_from_tensor(torch.zeros(3))
    trans_tensor(message).add_(1)
    assert torch.equal(trans_tensor(message), torch.zeros(3))


def test_strided_and_grad_tensors_are_sent_by_value() -> None:
    tensor = torch.arange(6.0, requires_grad=True).view(2, 3).T
    assert torch.equal(trans_tensor(trans_from_tensor(tensor)), tensor.detach())


def test_an_absent_tensor_is_empty() -> None:
    assert trans_tensor(MultimodalOutputPB().multimodal_pos_id).shape == (0,)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(WrongFormatError, match=r"got torch\.int64"):
        trans_from_tensor(torch.arange(3))


HOSTILE = {
    "mismatch": {"shape": [2, 3], "int32_data": b"1234"},
    "negative": {"shape": [-1, -1], "int32_data": b"1234"},
    "negative zero rows": {"shape": [-5, 0]},
    "overflow": {"shape": [1 << 62, 4]},
    "overflow to the right size": {"shape": [(1 << 63) - 1, 2, 1 << 62], "int32_data": b"1234"},
    "overflow beside zero": {"shape": [1 << 62, 1 << 62, 0]},
    "many dimensions": {"shape": [1] * 1000, "int32_data": b"1234"},
    "half an element": {"shape": [1], "int32_data": b"123"},
    "data in another field": {"shape": [1], "fp32_data": b"1234"},
    "unknown type": {"data_type": 77, "shape": [1], "int32_data": b"1234"},
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_shapes_are_refused_by_name(name: str) -> None:
    message = TensorPB(**{"data_type": TensorPB.INT32} | HOSTILE[name])
    with pytest.raises(WrongFormatError):
        trans_tensor(message)
    item = {"multimodal_url": "mine", "multimodal_type": 4, "multimodal_tensor": message}
    with pytest.raises(BadItemsError, match=r"^item 1 \(mine\): .*TensorPB") as caught:
        wire.read_inputs(request({"multimodal_url": "good"}, item))
    assert caught.value.status == "INVALID_ARGUMENT"


@pytest.mark.parametrize("nbytes", [0, 1, 1 << 20, (1 << 20) + 1, 5 << 20])
def test_parts_are_joined_in_order(nbytes: int) -> None:
    parts = [b"head", memoryview(np.random.default_rng(0).bytes(nbytes)), b"", memoryview(bytearray(b"tail"))]
    assert joined(parts) == b"".join(parts)
    assert joined(parts[:1]) is parts[0]


def test_others_run_while_a_large_message_is_joined() -> None:
    """As the event loop has to."""
    has_begun, is_over, turns = threading.Event(), threading.Event(), []

    def take_turns() -> None:
        while not is_over.wait(0.001):
            turns.append(None)
            has_begun.set()

    other = threading.Thread(target=take_turns)
    other.start()
    has_begun.wait()
    before = len(turns)
    joined([b"head", memoryview(bytearray(200 << 20))])
    meanwhile = len(turns) - before
    is_over.set()
    other.join()
    assert meanwhile > 2


# --- requests


def test_a_request_survives_the_round_trip() -> None:
    config = MMPreprocessConfig(width=28, height=56, crop_positions=[0.0, 0.25, 0.5, 1.0], mm_timeout_ms=900)
    pixels = np.arange(24, dtype=np.int32).reshape(2, 4, 3)
    sent = [
        MultimodalInput("http://a/b.jpg"),
        MultimodalInput("b", MMUrlType.VIDEO, config),
        MultimodalInput("c", MMUrlType.TENSOR, tensor=pixels),
        MultimodalInput("d", MMUrlType.TENSOR, tensor=torch.linspace(-1, 1, 7)),
        MultimodalInput("e", MMUrlType.TENSOR, tensor=pixels.astype(np.uint8)),
    ]
    received = wire.read_inputs(MultimodalInputsPB.FromString(wire.write_inputs(sent).SerializeToString()))
    assert [(i.url, i.mm_type, i.config) for i in received] == [(i.url, i.mm_type, i.config) for i in sent]
    assert [i.tensor is None for i in received] == [True, True, False, False, False]
    np.testing.assert_array_equal(received[2].tensor, pixels)
    np.testing.assert_array_equal(received[3].tensor, sent[3].tensor.numpy())
    np.testing.assert_array_equal(received[4].tensor, pixels)


def test_reading_a_tensor_copies_nothing_twice_and_cannot_be_written() -> None:
    array = trans_array(TensorPB(data_type=TensorPB.INT32, shape=[2], int32_data=b"12345678"))
    assert not array.flags.writeable


def test_tensors_of_other_types_are_ignored() -> None:
    garbage = TensorPB(data_type=3, shape=[-7], fp16_data=b"???")
    (item,) = wire.read_inputs(request({"multimodal_url": "a", "multimodal_type": 1, "multimodal_tensor": garbage}))
    assert item.tensor is None


@pytest.mark.parametrize("data_type", ["FP16", "BF16"])
def test_half_tensors_are_no_input(data_type: str) -> None:
    tensor = trans_from_tensor(torch.zeros(3, dtype=torch.float16 if data_type == "FP16" else torch.bfloat16))
    with pytest.raises(BadItemsError, match=f"got {data_type}"):
        wire.read_inputs(request({"multimodal_type": 4, "multimodal_tensor": tensor}))


def test_every_bad_item_is_named() -> None:
    items = [{"multimodal_url": f"http://h/{t}?token=secret", "multimodal_type": t} for t in (9, 1, -1)]
    with pytest.raises(BadItemsError) as caught:
        wire.read_inputs(request(*items))
    text = str(caught.value)
    assert "item 0" in text
    assert "item 2" in text
    assert "item 1" not in text
    assert "secret" not in text


def test_no_items_is_an_error() -> None:
    with pytest.raises(WrongFormatError, match="no items"):
        wire.read_inputs(request())


# --- replies


@pytest.mark.parametrize("form", ["items", "concat"])
@pytest.mark.parametrize("has_position_ids", [True, False])
@pytest.mark.parametrize("has_extra_inputs", [True, False])
@pytest.mark.parametrize("rows", [[3], [0], [2, 0, 5], [1] * 200])
def test_both_forms_carry_the_same_tensors(
    form: Any, has_position_ids: bool, has_extra_inputs: bool, rows: list[int]
) -> None:
    result = FakeEngine(has_position_ids=has_position_ids, has_extra_inputs=has_extra_inputs).answer(rows)
    assert_same(wire.read_result(wire.write_result(result, form)), result)


def test_items_are_what_protobuf_would_serialize() -> None:
    result = FakeEngine(has_extra_inputs=True).answer([3, 0, 300])
    expected = MultimodalOutputsPB()
    for embedding, ids, extra in zip(result.embeddings, result.position_ids, result.extra_inputs, strict=True):
        expected.multimodal_outputs.add(
            multimodal_embedding=trans_from_tensor(embedding),
            multimodal_pos_id=trans_from_tensor(ids),
            multimodal_extra_input=[trans_from_tensor(extra)],
        )
    assert wire.write_result(result, "items") == expected.SerializeToString(deterministic=True)


def test_concat_is_what_protobuf_would_serialize() -> None:
    result = FakeEngine(has_extra_inputs=True).answer([3, 0, 300])
    expected = MultimodalOutputPB(
        multimodal_embedding=trans_from_tensor(torch.cat(result.embeddings)),
        multimodal_pos_id=trans_from_tensor(torch.cat(result.position_ids)),
        multimodal_extra_input=[trans_from_tensor(extra) for extra in result.extra_inputs],
        split_size=[3, 0, 300],
    )
    assert wire.write_result(result, "concat") == expected.SerializeToString(deterministic=True)


def test_tensors_of_one_reply_must_agree() -> None:
    result = MMEmbeddingRes([torch.zeros(2, 3), torch.zeros(2, 4)])
    with pytest.raises(WrongFormatError, match="must agree"):
        wire.write_result(result, "concat")
    assert len(wire.read_result(wire.write_result(result, "items")).embeddings) == 2


def test_the_size_limit_is_exact_and_names_its_figure() -> None:
    result = FakeEngine().answer([4])
    size = len(wire.write_result(result, "items"))
    assert len(wire.write_result(result, "items", max_bytes=size)) == size
    with pytest.raises(ReplyTooLargeError, match=f"{size} bytes.*{size - 1}"):
        wire.write_result(result, "items", max_bytes=size - 1)


def test_a_reply_over_the_limit_is_refused_before_it_is_built() -> None:
    four_mib = torch.zeros(1, 1 << 20)
    result = MMEmbeddingRes([four_mib] * 257)
    with pytest.raises(ReplyTooLargeError):
        wire.write_result(result, "items")


@pytest.mark.parametrize(
    "reply",
    [
        b"\xff",
        b"\xff" * 20,
        b"\x0a\x7f",
        MultimodalOutputPB(split_size=[2]).SerializeToString(),
        MultimodalOutputPB(
            multimodal_embedding=trans_from_tensor(torch.zeros(2, 2)), split_size=[3, -1]
        ).SerializeToString(),
        MultimodalOutputsPB(
            multimodal_outputs=[
                MultimodalOutputPB(multimodal_pos_id=trans_from_tensor(torch.zeros(1))),
                MultimodalOutputPB(),
            ]
        ).SerializeToString(),
    ],
)
def test_bytes_that_are_no_reply_are_refused(reply: bytes) -> None:
    with pytest.raises(WrongFormatError):
        wire.read_result(reply)


# --- the choice of the form


@pytest.mark.parametrize(
    ("mm_wire", "timeouts_ms", "asked", "form"),
    [
        ("auto", [0, 0], None, "items"),
        ("auto", [0, -1], None, "concat"),
        ("auto", [500], None, "concat"),
        ("items", [-1], None, "items"),
        ("concat", [0], None, "concat"),
        ("auto", [-1], "items", "items"),
        ("items", [0], "concat", "concat"),
    ],
)
def test_the_caller_then_the_option_then_the_timeout_decide(
    mm_wire: str, timeouts_ms: list[int], asked: str | None, form: str
) -> None:
    items = [{"mm_preprocess_config": {"mm_timeout_ms": ms}} for ms in timeouts_ms]
    metadata = [("user-agent", "x")] + ([(wire.WIRE_METADATA, asked)] if asked else [])
    assert wire.choose_form(request(*items), metadata, load_settings(None, mm_wire=mm_wire)) == form


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(WrongFormatError, match="items or concat"):
        wire.choose_form(request({}), [(wire.WIRE_METADATA, "json")], load_settings())


def test_hostile_cases_would_pass_an_int64_product() -> None:
    """The wrong variant: a product that wraps around, as int64 does, finds nothing odd."""
    shape = HOSTILE["overflow"]["shape"]
    assert int(np.prod(np.array(shape, dtype=np.int64))) == 0 != math.prod(shape)
