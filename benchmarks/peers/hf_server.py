"""The service that people write today: Hugging Face's processor and tower behind the same gRPC interface, a pool of
threads for requests and one lock around the model.

    python -m benchmarks.peers.hf_server --checkpoint FOLDER --port 9001 [--dtype bf16] [--threads 16]

Prints `ready` once it serves. Speaks form `items`, for URLs of images (http, https, data, file, plain paths).
"""

from __future__ import annotations

import argparse
import base64
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import torch

from rtp_mm.cli.hugging_face import HuggingFacePeer
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.server.proto import (
    MESSAGE_SIZE_OPTIONS,
    MultimodalOutputsPB,
    MultimodalRpcServiceServicer,
    add_MultimodalRpcServiceServicer_to_server,
)
from rtp_mm.server.tensors import trans_from_tensor

FETCH_TIMEOUT_S = 30


def fetch(url: str) -> bytes:
    """The bytes behind a URL; a path is a file."""
    if url.startswith("data:"):
        return base64.b64decode(url.partition(",")[2])
    if "://" not in url:
        return Path(url).read_bytes()
    with urllib.request.urlopen(url, timeout=FETCH_TIMEOUT_S) as reply:
        data: bytes = reply.read()
        return data


class HuggingFaceServicer(MultimodalRpcServiceServicer):
    """One item after another; the lock is what a model that is not thread-safe gets."""

    def __init__(self, peer: HuggingFacePeer) -> None:
        self._peer = peer
        self._lock = threading.Lock()

    def RemoteMultimodalEmbedding(self, request: Any, context: Any) -> Any:
        reply = MultimodalOutputsPB()
        for item in request.multimodal_inputs:
            inputs = self._peer.preprocess(fetch(item.multimodal_url))
            with self._lock:
                embedding = self._peer.forward(inputs)
            output = reply.multimodal_outputs.add()
            output.multimodal_embedding.CopyFrom(trans_from_tensor(embedding))
            output.multimodal_pos_id.CopyFrom(trans_from_tensor(position_ids(inputs["image_grid_thw"][0], 2)))
        return reply


def position_ids(grid: torch.Tensor, merge: int) -> torch.Tensor:
    """[tokens, 3] int32 (t, h, w), row by row."""
    t, h, w = grid.tolist()
    axes = torch.meshgrid(torch.arange(t), torch.arange(h // merge), torch.arange(w // merge), indexing="ij")
    return torch.stack([axis.flatten() for axis in axes], dim=1).int()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="bf16", choices=ACT_DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=16, help="requests in progress at once")
    options = parser.parse_args()
    peer = HuggingFacePeer(options.checkpoint, ACT_DTYPES[options.dtype], torch.device(options.device))
    server = grpc.server(ThreadPoolExecutor(options.threads), options=MESSAGE_SIZE_OPTIONS)
    add_MultimodalRpcServiceServicer_to_server(HuggingFaceServicer(peer), server)
    server.add_insecure_port(f"127.0.0.1:{options.port}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
