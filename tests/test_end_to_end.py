"""A real server, a real photograph, clients that nobody here wrote: what the wire says equals Hugging Face."""

from __future__ import annotations

import concurrent.futures
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from huggingface import HuggingFace, relative_l2
from numpy.typing import NDArray
from PIL import Image
from running_server import RunningServer, running_server

from rtp_mm.errors import DownloadFailedError, DrainingError, MMError, RemoteCallError, WrongFormatError
from rtp_mm.server.client import RemoteEngine
from rtp_mm.types import MMPreprocessConfig

DEBUG_CLIENT = Path(__file__).parent / "data" / "debug_client.py"


@pytest.fixture(scope="module")
def server(tiny_checkpoint: Path) -> Iterator[RunningServer]:
    with running_server(tiny_checkpoint, act_type="fp32", device="cpu") as server:
        yield server


@pytest.fixture(scope="module")
def peer(tiny_checkpoint: Path) -> HuggingFace:
    return HuggingFace(tiny_checkpoint)


def read(photo_path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(photo_path).convert("RGB"))


def test_a_photograph_over_the_wire_equals_hugging_face(
    server: RunningServer, peer: HuggingFace, photo_path: Path
) -> None:
    engine = RemoteEngine(server.address)
    result = engine.submit([str(photo_path), f"file://{photo_path}"])
    assert relative_l2(result.embeddings[0], peer.embed(read(photo_path))) <= 1e-5
    assert torch.equal(result.embeddings[0], result.embeddings[1])
    _, grid = peer.pixels(read(photo_path))
    _, h, w = grid[0].tolist()
    assert result.position_ids is not None
    assert result.position_ids[0].tolist() == [[0, row, column] for row in range(h // 2) for column in range(w // 2)]
    engine.close()


def test_the_documented_debug_client_runs_word_for_word(
    server: RunningServer, peer: HuggingFace, photo_path: Path, tmp_path: Path
) -> None:
    source = DEBUG_CLIENT.read_text()
    assert "localhost:12346" in source
    assert "/mnt/nas1/hf/llava-v1.5-7b/1.jpg" in source
    client = tmp_path / "client.py"
    client.write_text(
        source.replace("localhost:12346", server.address).replace("/mnt/nas1/hf/llava-v1.5-7b/1.jpg", str(photo_path))
    )
    run = subprocess.run(
        [sys.executable, "-m", "rtp_mm.compat", str(client)], capture_output=True, text=True, timeout=120, check=False
    )
    assert run.returncode == 0, run.stderr
    first_number = float(re.search(r"tensor\(\[\[\s*([-+.\de]+)", run.stdout)[1])  # type: ignore[index]
    assert first_number == pytest.approx(float(peer.embed(read(photo_path))[0, 0]), abs=1e-3)  # printed to 4 digits


def test_a_client_built_from_reflection_alone_is_answered(
    server: RunningServer, peer: HuggingFace, photo_path: Path
) -> None:
    with grpc.insecure_channel(server.address) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        assert "MultimodalRpcService" in database.get_services()
        pool = DescriptorPool(database)
        method = pool.FindServiceByName("MultimodalRpcService").methods_by_name["RemoteMultimodalEmbedding"]
        request: Any = GetMessageClass(method.input_type)()
        request.multimodal_inputs.add(multimodal_url=str(photo_path), multimodal_type=1)
        call = channel.unary_unary(
            f"/{method.containing_service.full_name}/{method.name}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )
        embedding = call(request).multimodal_outputs[0].multimodal_embedding
    values = torch.frombuffer(bytearray(embedding.fp32_data), dtype=torch.float32).view(*embedding.shape)
    assert relative_l2(values, peer.embed(read(photo_path))) <= 1e-5


def test_one_bad_item_fails_its_call_and_the_server_goes_on(
    server: RunningServer, photo_path: Path, tmp_path: Path
) -> None:
    truncated = tmp_path / "truncated.jpg"
    truncated.write_bytes(photo_path.read_bytes()[:5000])
    engine = RemoteEngine(server.address)
    with pytest.raises(WrongFormatError, match=r"item 1 \(.*truncated\.jpg\)"):
        engine.submit([str(photo_path), str(truncated), str(photo_path)])
    assert len(engine.submit([str(photo_path)]).embeddings) == 1
    engine.close()


def test_options_reach_the_preprocessor(server: RunningServer, photo_path: Path) -> None:
    engine = RemoteEngine(server.address)
    sized = MMPreprocessConfig(width=112, height=84)
    cropped = MMPreprocessConfig(crop_positions=[0.0, 0.0, 0.5, 0.5])
    result = engine.submit([str(photo_path)] * 2, preprocess_configs=[sized, cropped])
    assert len(result.embeddings[0]) == 3 * 4
    assert len(result.embeddings[1]) == 5 * 8  # 226 x 150 pixels of the 451 x 300
    engine.close()


def test_figures_of_worker_and_cache_are_live(server: RunningServer, photo_path: Path) -> None:
    engine = RemoteEngine(server.address)
    engine.submit([str(photo_path)])
    worker, cache = engine.worker_status(), engine.cache_status(with_keys=True)
    assert worker.is_alive
    assert worker.iterations >= 1
    assert worker.precision == "fp32"
    assert len(cache.keys) >= 1
    assert 0 < cache.available_bytes < cache.total_bytes
    engine.close()


def test_health_is_said_in_both_protocols(server: RunningServer) -> None:
    assert server.health() == 200
    with grpc.insecure_channel(server.address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(service="MultimodalRpcService"))
    assert reply.status == health_pb2.HealthCheckResponse.SERVING


def test_sigterm_under_load_finishes_what_runs_and_refuses_what_comes(
    tiny_qwen2_5_vl: Path, photos: dict[str, NDArray[np.uint8]], tmp_path: Path
) -> None:
    """Every call is answered or told UNAVAILABLE; the process ends with 0."""
    paths = []
    for i in range(60):  # all different, so that none is cached
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(photos["rocket"][i:, :, :]).save(paths[-1], compress_level=1)
    with running_server(tiny_qwen2_5_vl, act_type="fp32", device="cpu") as server:
        engine = RemoteEngine(server.address)

        def call(path: Path) -> MMError | int:
            try:
                return len(engine.submit([str(path)]).embeddings[0])
            except MMError as error:
                return error

        with concurrent.futures.ThreadPoolExecutor(8) as callers:
            calls = [callers.submit(call, path) for path in paths]
            while sum(c.done() for c in calls) < 5:
                time.sleep(0.01)
            assert server.terminate() == 0
            outcomes = [c.result() for c in calls]
        engine.close()
    answered = [o for o in outcomes if isinstance(o, int)]
    refused = [o for o in outcomes if isinstance(o, MMError)]
    assert len(answered) >= 5
    assert refused
    assert all(isinstance(o, DrainingError | RemoteCallError | DownloadFailedError) for o in refused), refused


def test_a_forward_that_outlives_the_drain_does_not_hold_the_process(tmp_path: Path, photo_path: Path) -> None:
    """The device's thread is cut, its caller told, and the status is 0 all the same."""
    module = tmp_path / "sleeper.py"
    module.write_text(
        """
import time
import torch
from rtp_mm import ImageEmbeddingInterface, MultimodalMixin, register_model

class Sleeper(ImageEmbeddingInterface):
    def image_embedding(self, images):
        time.sleep(300)

class SleeperModel(MultimodalMixin):
    def _init_multimodal(self, config):
        self.mm_part = Sleeper(config)

register_model("sleeper", SleeperModel)
"""
    )
    (tmp_path / "config.json").write_text('{"model_type": "sleeper"}')
    options = {"mm_model_module": module, "mm_drain_timeout_ms": 200, "device": "cpu"}
    with running_server(tmp_path, **options) as server, concurrent.futures.ThreadPoolExecutor(1) as caller:
        engine = RemoteEngine(server.address)
        call = caller.submit(engine.submit, [str(photo_path)])
        while engine.worker_status().running == 0:
            time.sleep(0.01)
        assert server.terminate() == 0
        with pytest.raises(MMError):
            call.result(30)
        engine.close()
