"""Relative L2 error against Hugging Face float32 on a real shape, image by image: ours and Hugging Face's in bf16,
and ours in float32.

    python -m benchmarks.bench_accuracy --family qwen2_5_vl --size 3b
"""

from __future__ import annotations

import argparse
import io
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean

import skimage.data
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.report import write_result
from rtp_mm.cli.hugging_face import HuggingFacePeer
from rtp_mm.config import load_settings
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.random_checkpoint import write_checkpoint
from rtp_mm.models.registry import load_model
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
# Height and width of what is cut from a photograph: one merged token to some 400, windows whole and cut, 1:5 and 5:1.
SIDES = (
    [(56, 56), (84, 84), (60, 300), (300, 60), (113, 227)],
    [(224, 224), (280, 196), (150, 400), (299, 301), (168, 336)],
    [(112, 112), (252, 364), (400, 90), (336, 336), (200, 260)],
    [(427, 427), (75, 75), (140, 560), (320, 240), (97, 389)],
)


@dataclass(frozen=True, slots=True)
class Row:
    """Relative L2 errors of one image's embedding against Hugging Face float32."""

    photo: str
    height: int
    width: int
    tokens: int
    ours_fp32: float
    ours_bf16: float
    hugging_face_bf16: float


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def images() -> list[tuple[str, int, int, bytes]]:
    """Real photographs as PNG files."""
    found = []
    for name, sides in zip(PHOTOS, SIDES, strict=True):
        photo = getattr(skimage.data, name)()
        for height, width in sides:
            file = io.BytesIO()
            Image.fromarray(photo[:height, :width]).save(file, "PNG")
            found.append((name, height, width, file.getvalue()))
    return found


def embed_ours(checkpoint: Path, act_type: str) -> list[Tensor]:
    part = load_model(load_settings(checkpoint_path=checkpoint, act_type=act_type)).mm_part
    embeddings = []
    for *_, data in track(images(), f"ours {act_type}"):
        patches = part.preprocessor(Blob(data, b"", ""), MMUrlType.IMAGE, PreprocessOptions())
        embeddings.append(part.mm_process(patches)[0].cpu())
    return embeddings


def embed_peer(checkpoint: Path, act_type: str) -> list[Tensor]:
    peer = HuggingFacePeer(
        checkpoint, ACT_DTYPES[act_type], torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    return [peer.forward(peer.preprocess(data)) for *_, data in track(images(), f"Hugging Face {act_type}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=("qwen2_vl", "qwen2_5_vl"))
    parser.add_argument("--size", default="3b", help="tiny, 2b, 3b or 7b")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint to use instead of random weights")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "checkpoint"
            write_checkpoint(checkpoint, options.family, options.size)
        reference = embed_peer(checkpoint, "fp32")
        by_column = {
            "ours_fp32": embed_ours(checkpoint, "fp32"),
            "ours_bf16": embed_ours(checkpoint, "bf16"),
            "hugging_face_bf16": embed_peer(checkpoint, "bf16"),
        }
    rows = [
        Row(name, height, width, len(exact), **{k: relative_l2(v[i], exact) for k, v in by_column.items()})
        for i, ((name, height, width, _), exact) in enumerate(zip(images(), reference, strict=True))
    ]
    summary = {
        "worst_ours_fp32": max(r.ours_fp32 for r in rows),
        "mean_ours_bf16": mean(r.ours_bf16 for r in rows),
        "mean_hugging_face_bf16": mean(r.hugging_face_bf16 for r in rows),
        "worst_ratio_bf16": max(r.ours_bf16 / r.hugging_face_bf16 for r in rows),
    }
    table = Table("photo", "size", "tokens", "ours fp32", "ours bf16", "Hugging Face bf16", title="relative L2 error")
    for r in rows:
        errors = (f"{e:.2e}" for e in (r.ours_fp32, r.ours_bf16, r.hugging_face_bf16))
        table.add_row(r.photo, f"{r.width}x{r.height}", str(r.tokens), *errors)
    Console().print(table)
    Console().print({key: f"{value:.3g}" for key, value in summary.items()})
    name = f"accuracy_{options.family}_{options.size}"
    write_result(name, {"summary": summary, "images": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
