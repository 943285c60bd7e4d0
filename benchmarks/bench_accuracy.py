"""Relative L2 error against Hugging Face float32 on a real shape, image by image: ours and Hugging Face's in bf16,
and ours in float32.

    python -m benchmarks.bench_accuracy --family qwen2_5_vl --size 3b [--compute-type bf16]

With `--compute-type bf16` as on a CPU with AMX or AVX-512 BF16; where there is neither, minutes an image.

Of clips, Hugging Face's tower gets our patch rows, which are Pillow's resize of each frame: its own video processor
resizes by torchvision (`benchmarks.bench_torchvision`).
"""

from __future__ import annotations

import argparse
import io
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.report import write_result
from rtp_mm._core import bf16_instructions
from rtp_mm.cli.hugging_face import HuggingFacePeer
from rtp_mm.config import load_settings
from rtp_mm.models.multimodal_common import ACT_DTYPES
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.models.registry import load_model
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.random_checkpoint import write_checkpoint
from rtp_mm.types import Blob, MMUrlType, Patches, PreprocessOptions

SMALLEST = {"qwen2_vl": "2b", "qwen2_5_vl": "3b"}  # of the published sizes
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")
# Height and width of what is cut from a photograph: one merged token to some 400, windows whole and cut, 1:5 and 5:1.
SIDES = (
    [(56, 56), (84, 84), (60, 300), (300, 60), (113, 227)],
    [(224, 224), (280, 196), (150, 400), (299, 301), (168, 336)],
    [(112, 112), (252, 364), (400, 90), (336, 336), (200, 260)],
    [(427, 427), (75, 75), (140, 560), (320, 240), (97, 389)],
)


# Frames, height and width of clips that move over a photograph; an odd last frame is doubled.
CLIPS = ((4, 84, 112), (6, 168, 84), (7, 113, 227), (16, 56, 56))


@dataclass(frozen=True, slots=True)
class Row:
    """Relative L2 errors of one image's or clip's embedding against Hugging Face float32."""

    photo: str
    frames: int
    height: int
    width: int
    tokens: int
    ours_fp32: float
    ours_bf16: float
    hugging_face_bf16: float


def relative_l2(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference.double()).norm() / reference.double().norm())


@dataclass(frozen=True, slots=True)
class Sight:
    """A real photograph as a PNG file, or frames [T, H, W, 3] that move over one."""

    photo: str
    frames: int
    height: int
    width: int
    data: bytes | NDArray[np.uint8]


def sights() -> list[Sight]:
    found = []
    for name, sides, clip in zip(PHOTOS, SIDES, CLIPS, strict=True):
        photo = getattr(skimage.data, name)()
        for height, width in sides:
            file = io.BytesIO()
            Image.fromarray(photo[:height, :width]).save(file, "PNG")
            found.append(Sight(name, 1, height, width, file.getvalue()))
        frames, height, width = clip
        moving = np.stack([photo[3 * t : 3 * t + height, 5 * t : 5 * t + width] for t in range(frames)])
        found.append(Sight(name, frames, height, width, moving))
    return found


def patches_of(preprocessor: Any, sight: Sight) -> Patches:
    mm_type = MMUrlType.IMAGE if isinstance(sight.data, bytes) else MMUrlType.TENSOR
    patches: Patches = preprocessor(Blob(sight.data, b"", ""), mm_type, PreprocessOptions())
    return patches


def embed_ours(checkpoint: Path, act_type: str, compute_type: str = "auto") -> list[Tensor]:
    settings = load_settings(checkpoint_path=checkpoint, act_type=act_type, mm_compute_type=compute_type)
    part: Any = load_model(settings).mm_part
    return [
        part.mm_process(patches_of(part.preprocessor, sight))[0].cpu() for sight in track(sights(), f"ours {act_type}")
    ]


def embed_peer(checkpoint: Path, act_type: str) -> list[Tensor]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    peer = HuggingFacePeer(checkpoint, ACT_DTYPES[act_type], device)
    settings = load_settings(checkpoint_path=checkpoint)
    config = ImageProcessorConfig.from_checkpoint(checkpoint, PUBLISHED_PROCESSOR)
    preprocessor = MediaPreprocessor.from_checkpoint(checkpoint, config, settings)

    def inputs(sight: Sight) -> Any:
        if isinstance(sight.data, bytes):
            return peer.preprocess(sight.data)
        patches = patches_of(preprocessor, sight)
        mean, std = (torch.tensor(values)[:, None] * 255 for values in (config.image_mean, config.image_std))
        pixels = torch.from_numpy(patches.rows.copy()).view(len(patches.rows), 3, -1)
        return {
            "pixel_values": ((pixels - mean) / std).flatten(1),
            "image_grid_thw": torch.tensor([patches.grid_thw]),
        }

    return [peer.forward(inputs(sight)) for sight in track(sights(), f"Hugging Face {act_type}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="qwen2_5_vl", choices=SMALLEST)
    parser.add_argument("--size", help="tiny, 2b, 3b or 7b; the family's smallest published one if left out")
    parser.add_argument("--checkpoint", type=Path, help="a checkpoint to use instead of random weights")
    parser.add_argument(
        "--compute-type", default="auto", choices=("auto", "fp32", "bf16"), help="MM_COMPUTE_TYPE of ours in bf16"
    )
    options = parser.parse_args()
    size = options.size or SMALLEST[options.family]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint
        if checkpoint is None:
            checkpoint = Path(folder) / "checkpoint"
            write_checkpoint(checkpoint, options.family, size)
        reference = embed_peer(checkpoint, "fp32")
        by_column = {
            "ours_fp32": embed_ours(checkpoint, "fp32"),
            "ours_bf16": embed_ours(checkpoint, "bf16", options.compute_type),
            "hugging_face_bf16": embed_peer(checkpoint, "bf16"),
        }
    rows = [
        Row(
            *(sight.photo, sight.frames, sight.height, sight.width),
            tokens=len(exact),
            **{column: relative_l2(embeddings[i], exact) for column, embeddings in by_column.items()},
        )
        for i, (sight, exact) in enumerate(zip(sights(), reference, strict=True))
    ]
    summary = {
        "worst_ours_fp32": max(r.ours_fp32 for r in rows),
        "mean_ours_bf16": mean(r.ours_bf16 for r in rows),
        "mean_hugging_face_bf16": mean(r.hugging_face_bf16 for r in rows),
        "worst_ratio_bf16": max(r.ours_bf16 / r.hugging_face_bf16 for r in rows),
    }
    table = Table(
        "photo", "frames", "size", "tokens", "ours fp32", "ours bf16", "Hugging Face bf16", title="relative L2 error"
    )
    for r in rows:
        errors = (f"{e:.2e}" for e in (r.ours_fp32, r.ours_bf16, r.hugging_face_bf16))
        table.add_row(r.photo, str(r.frames), f"{r.width}x{r.height}", str(r.tokens), *errors)
    Console().print(table)
    Console().print({key: f"{value:.3g}" for key, value in summary.items()})
    is_bf16 = options.compute_type == "bf16"
    name = f"{'bf16_products' if is_bf16 else 'accuracy'}_{options.family}_{size}"
    instructions = bf16_instructions()
    if is_bf16 and instructions:
        name += f"_{instructions}"
    write_result(name, {"summary": summary, "images": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
