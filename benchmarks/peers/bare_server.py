"""The least that a gRPC server can do: the same bytes to every call, or the same refusal. What a cached answer and a
full server are measured against.

python -m benchmarks.peers.bare_server --port 9002 --reply-bytes 720000
python -m benchmarks.peers.bare_server --port 9002 --refuse
"""

from __future__ import annotations

import argparse
import asyncio
import os
from typing import Any

import grpc

from rtp_mm.server.proto import MESSAGE_SIZE_OPTIONS, SERVICE


async def serve(port: int, reply: bytes | None) -> None:
    """`None` refuses."""

    async def answer(request: bytes, context: Any) -> Any:
        if reply is None:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", (("retry-after-ms", "100"),))
        return reply

    server = grpc.aio.server(options=MESSAGE_SIZE_OPTIONS)
    handlers = {"RemoteMultimodalEmbedding": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
    server.add_insecure_port(f"127.0.0.1:{port}")
    await server.start()
    await server.wait_for_termination()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    answer = parser.add_mutually_exclusive_group(required=True)
    answer.add_argument("--reply-bytes", type=int)
    answer.add_argument("--refuse", action="store_true")
    options = parser.parse_args()
    asyncio.run(serve(options.port, None if options.refuse else os.urandom(options.reply_bytes)))


if __name__ == "__main__":
    main()
