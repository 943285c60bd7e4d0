"""What takes torchvision to compare: rows of clips with those of transformers' `Qwen2VLVideoProcessor`, which it
resizes, in bytes that differ; both rules for frames and their size with the publishers' own functions, in random clips
that agree (`benchmarks/video_rules.py`).

    pip install --no-deps --target FOLDER torchvision==VERSION_FOR_YOUR_TORCH qwen-vl-utils==0.0.14
    python -m benchmarks.bench_torchvision FOLDER

In a folder of its own, because transformers takes torchvision's processors for everything where it is installed. Two
operators that its wheel may have for another torch alone are declared here; nobody calls them.
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image

from benchmarks.report import write_result
from benchmarks.video_rules import agreement
from rtp_mm.config import load_settings
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.preprocess.video import VideoPreprocessor
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

FRAMES = 4
SCALES = (1, 3)  # frames that keep their size but for the patches' multiple, and frames that shrink
PHOTOS = ("astronaut", "chelsea", "coffee", "rocket")

_DECLARED = torch.library.Library("torchvision", "DEF")


def clip_of(photo: np.ndarray, scale: int) -> np.ndarray:
    """[T, H, W, 3] uint8: a window that moves over the photograph, `scale` times as large as it is."""
    size = photo.shape[1] * scale, photo.shape[0] * scale
    photo = np.asarray(Image.fromarray(photo).resize(size, Image.Resampling.BICUBIC))
    height, width = (side // 28 * 28 - 9 for side in photo.shape[:2])  # of no patch's multiple
    return np.stack([photo[2 * i : 2 * i + height, 2 * i : 2 * i + width] for i in range(FRAMES)])


def torchvision_rows(frames: np.ndarray) -> np.ndarray:
    """[N, 1176], of bytes resized and not normalised."""
    from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

    processor: Any = Qwen2VLVideoProcessor()
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    raw = {"do_sample_frames": False, "do_normalize": False, "do_rescale": False}
    values: torch.Tensor = processor(videos=[video], return_tensors="pt", **raw)["pixel_values_videos"]
    return values.numpy()


def use_torchvision(folder: Path) -> str:
    """From there, before transformers looks for it; returns its version."""
    sys.path.insert(0, str(folder))
    for name in ("nms", "qnms"):
        _DECLARED.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

    return str(torchvision.__version__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("torchvision", type=Path, help="the folder that holds it")
    version = use_torchvision(parser.parse_args().torchvision)
    settings = load_settings(mm_video_rule="hf")
    image = ImagePreprocessor.from_config(PUBLISHED_PROCESSOR, settings)
    ours = VideoPreprocessor.from_checkpoint(Path("/nowhere"), PUBLISHED_PROCESSOR, image, settings)
    clips = {}
    for name, scale in product(PHOTOS, SCALES):
        frames = clip_of(getattr(skimage.data, name)(), scale)
        rows = ours(Blob(frames, b"", ""), MMUrlType.TENSOR, PreprocessOptions()).rows.astype(np.float32)
        difference = np.abs(rows - torchvision_rows(frames))
        _, height, width, _ = frames.shape
        clips[f"{name} {width}x{height}"] = figures = {
            "bytes": rows.size,
            "differ_percent": round(100 * float((difference > 0).mean()), 3),
            "largest_difference": float(difference.max()),
        }
        print(name, figures)
    write_result("torchvision", {"torchvision": version, "clips": clips, "rules": agreement()})


if __name__ == "__main__":
    main()
