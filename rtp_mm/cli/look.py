"""`rtp-mm look`: a picture of what the tower sees, rebuilt from the very bytes that it gets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console

from rtp_mm.cli.embed import absolute
from rtp_mm.config import Settings, load_settings
from rtp_mm.media.fetch import Fetcher
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.patches import ImagePreprocessor, ImageProcessorConfig
from rtp_mm.types import LIBRARY_CALLER, Blob, MMUrlType, MultimodalInput, Patches, PreprocessOptions

SCALE = 2  # of the picture, so that a line one pixel wide hides no pixel of the image
PATCH_LINE = (255, 255, 255, 70)
TOKEN_LINE = (255, 255, 255, 170)
WINDOW_LINE = (255, 210, 0, 255)


def run(url: str, checkpoint: Path, out: Path, min_pixels: int | None, max_pixels: int | None) -> None:
    """Raises `StartError` and `MMError`."""
    settings = load_settings(checkpoint_path=checkpoint)
    processor = ImageProcessorConfig.from_checkpoint(checkpoint, PUBLISHED_PROCESSOR)
    options = PreprocessOptions(min_pixels=min_pixels, max_pixels=max_pixels)
    patches = ImagePreprocessor.from_config(processor, settings)(fetch(url, settings), MMUrlType.IMAGE, options)
    vision = GptInitModelParameters.from_checkpoint(checkpoint).mm_related_params.config

    pixels = rebuild(patches, processor.patch_size, processor.merge_size)
    draw(pixels, processor.patch_size, processor.merge_size, vision.get("window_size")).save(out)
    _, rows, columns = patches.grid_thw
    tokens = len(patches.rows) // processor.merge_size**2
    Console().print(
        f"{out}: {pixels.shape[1]} x {pixels.shape[0]} pixels, {columns} x {rows} patches, {tokens} tokens",
        soft_wrap=True,
    )


def fetch(url: str, settings: Settings) -> Blob:
    """The bytes behind a URL, for a trusted caller. Raises `MMError`."""

    async def once() -> Blob:
        async with Fetcher(settings) as fetcher:
            return await fetcher.fetch(MultimodalInput(absolute(url), MMUrlType.IMAGE), LIBRARY_CALLER)

    return asyncio.run(once())


def rebuild(patches: Patches, patch_size: int, merge_size: int) -> NDArray[np.uint8]:
    """Patch rows back to [H, W, 3], the first frame of a clip."""
    t, h, w = patches.grid_thw
    p, m = patch_size, merge_size
    blocks = patches.rows.reshape(t, h // m, w // m, m, m, 3, -1, p, p)
    # (t, block row, block column, row, column, channel, frame, y, x) to (t, frame, y of the image, x, channel)
    frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return np.ascontiguousarray(frames[0, 0].reshape(h * p, w * p, 3))


def draw(pixels: NDArray[np.uint8], patch_size: int, merge_size: int, window: int | None) -> Image.Image:
    """[H, W, 3] as a picture with the borders of patches, of tokens and, where there are any, of attention windows."""
    height, width = (side * SCALE for side in pixels.shape[:2])
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST).convert("RGBA")
    lines = Image.new("RGBA", picture.size)
    pen = ImageDraw.Draw(lines)
    grids = [(patch_size, PATCH_LINE, 1), (patch_size * merge_size, TOKEN_LINE, 1)]
    if window:
        grids.append((window, WINDOW_LINE, 2))
    for step, colour, thickness in grids:
        for x in range(0, width, step * SCALE):
            pen.line([(x, 0), (x, height)], fill=colour, width=thickness)
        for y in range(0, height, step * SCALE):
            pen.line([(0, y), (width, y)], fill=colour, width=thickness)
    return Image.alpha_composite(picture, lines).convert("RGB")
