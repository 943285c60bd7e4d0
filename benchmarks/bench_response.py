"""A cached answer: milliseconds from a request's items to the reply's bytes, and what decoding a data URL for the first
time, by ours and by Python's own decoder, and copying the reply take.

    python -m benchmarks.bench_response

The model answers at once and the cache always: what is measured is the way through the engine and onto the wire.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import tempfile
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from benchmarks.harness import interleave
from benchmarks.report import write_result as write_json
from rtp_mm.config import load_settings
from rtp_mm.engine.caches import Embedded
from rtp_mm.engine.forward import to_host
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.media.data_url import DataUrl
from rtp_mm.media.limits import SizeLimit
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.multimodal_common import Embedding, MultiModalEmbeddingInterface
from rtp_mm.models.multimodal_mixin import MultimodalMixin
from rtp_mm.server.wire import seal, write_result
from rtp_mm.types import Caller, MMEmbeddingRes, MultimodalInput

HIDDEN = 2048  # Qwen2.5-VL 3B
TOKENS = {"640x480": 391, "1024x768": 999, "1920x1080": 2691}  # of its images at their own size
CALLER = Caller("bench", is_local=True)
ROUNDS = 15
LIMIT = SizeLimit(1 << 30, "")


class Instant(MultiModalEmbeddingInterface):
    """Answers anything with the same tokens."""

    def __init__(self, tokens: int) -> None:
        self.answer = torch.ones(tokens, HIDDEN, dtype=torch.bfloat16), torch.ones(tokens, 3, dtype=torch.int32)

    def _mm_preprocess(self, data: Any, **kwargs: Any) -> None:
        return None

    def mm_process(self, mm_input: Any, **kwargs: Any) -> Embedding:
        return self.answer


def engine_of(part: Instant, loop: asyncio.AbstractEventLoop) -> MMProcessEngine:
    model = MultimodalMixin(GptInitModelParameters())
    model.mm_part = part
    return MMProcessEngine(model, load_settings(device="cpu"), loop, seal)


def photo(width: int, height: int) -> bytes:
    """A JPEG of about a photograph's size."""
    noise = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    file = BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def measure(name: str, tokens: int, loop: asyncio.AbstractEventLoop, folder: Path) -> dict[str, Any]:
    part = Instant(tokens)
    engine = engine_of(part, loop)
    width, height = map(int, name.split("x"))
    data = photo(width, height)
    path = folder / f"{name}.jpg"
    path.write_bytes(data)
    data_url = "data:image/jpeg;base64," + base64.b64encode(data).decode()

    def reply(url: str) -> bytes:
        result = loop.run_until_complete(engine.embed([MultimodalInput(url)], caller=CALLER))
        return write_result(result, "items")

    encoded = data_url.partition(",")[2]
    whole = reply(data_url)
    embedding, position_ids = part.answer
    result = MMEmbeddingRes([embedding], [position_ids])
    source = memoryview(whole)
    timings = interleave(
        {
            "cached, data URL": lambda: reply(data_url),
            "cached, local file": lambda: reply(str(path)),
            "data URL: decode": lambda: DataUrl.parse(data_url).decode(LIMIT),
            "data URL: binascii": lambda: binascii.a2b_base64(encoded, strict_mode=True),
            "first answer: seal": lambda: seal(Embedded(embedding, position_ids)),
            "unsealed: write_result": lambda: write_result(result, "items"),
            "one copy": lambda: bytes(source),
            "device to host, checked": lambda: to_host([part.answer], torch.bfloat16).collect(),
        },
        ROUNDS,
    )
    assert engine.stats().batches == 1
    loop.run_until_complete(engine.aclose())
    return {
        "image": name,
        "file_bytes": len(data),
        "reply_bytes": len(whole),
        "ms": {contender: asdict(timing) for contender, timing in timings.items()},
    }


def main() -> None:
    loop = asyncio.new_event_loop()
    with tempfile.TemporaryDirectory() as folder:
        rows = [measure(name, tokens, loop, Path(folder)) for name, tokens in TOKENS.items()]
    loop.close()
    table = Table("image", "reply, MB", *rows[0]["ms"])
    for row in rows:
        medians = (f"{timing['median']:.3f}" for timing in row["ms"].values())
        table.add_row(row["image"], f"{row['reply_bytes'] / 1e6:.2f}", *medians)
    Console().print(table)
    write_json("response", {"unit": "ms", "rows": rows})


if __name__ == "__main__":
    main()
