"""`rtp-mm look`: a picture of what the tower sees, rebuilt from the very bytes that it gets; of a clip, all frames; of
a sound, its spectrogram (`spectrogram.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from rich.console import Console

from rtp_mm.cli.inputs import check_picture_options, family_of, fetch, takes_sounds
from rtp_mm.cli.outputs import check_output, writing
from rtp_mm.cli.spectrogram import describe, draw_spectrogram
from rtp_mm.config import load_settings
from rtp_mm.errors import StartError
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.models.qwen2_audio import PUBLISHED_RULE
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.models.registry import FAMILIES
from rtp_mm.preprocess.audio import AudioPreprocessor
from rtp_mm.preprocess.audio_config import mel_rule
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import MMUrlType, Patches, PreprocessOptions

SUFFIXES = (".png", ".jpg", ".jpeg")
SCALE = 2  # of the picture, so that a line one pixel wide hides no pixel of the image
PATCH_LINE = (255, 255, 255, 70)
TOKEN_LINE = (255, 255, 255, 170)
WINDOW_LINE = (255, 210, 0, 255)
THUMBNAIL = 320  # pixels, the longer side of a clip's frame
CAPTION = 16  # pixels, the line beneath it


def run(url: str, checkpoint: Path, out: Path, options: PreprocessOptions) -> None:
    """Raises `StartError` and `MMError`."""
    settings = load_settings(checkpoint_path=checkpoint)
    check_output("--out", out, SUFFIXES)
    if (family := family_of(checkpoint)) not in FAMILIES:
        raise StartError(f"look knows what {', '.join(FAMILIES)} see, not {family}")
    check_picture_options(options, partial(family_of, checkpoint))
    if takes_sounds(checkpoint):
        rule = mel_rule(checkpoint, PUBLISHED_RULE)
        sound = AudioPreprocessor(rule)(fetch(url, settings, MMUrlType.AUDIO), MMUrlType.AUDIO, options)
        with writing(out):
            draw_spectrogram(sound, rule).save(out)
        Console().print(f"{out}: {describe(sound, rule)}", soft_wrap=True)
        return
    processor = ImageProcessorConfig.from_checkpoint(checkpoint, PUBLISHED_PROCESSOR)
    preprocess = MediaPreprocessor.from_checkpoint(checkpoint, processor, settings)
    blob = fetch(url, settings, MMUrlType.DEFAULT)
    patches = preprocess(blob, MMUrlType.DEFAULT, options)
    frames = rebuild(patches, processor.patch_size, processor.merge_size)
    if patches.seconds_per_grid is None:
        vision = GptInitModelParameters.from_checkpoint(checkpoint).mm_related_params.config
        picture = draw(frames[0], processor.patch_size, processor.merge_size, vision.get("window_size"))
        count = ""
    else:
        times = preprocess.video.frame_times(bytes(blob.data), options)
        picture = contact_sheet(frames, times)
        count = f"{len(times)} frames of "
    with writing(out):
        picture.save(out)
    _, rows, columns = patches.grid_thw
    height, width = frames.shape[1:3]
    tokens = len(patches.rows) // processor.merge_size**2
    Console().print(
        f"{out}: {count}{width} x {height} pixels, {columns} x {rows} patches, {tokens} tokens", soft_wrap=True
    )


def rebuild(patches: Patches, patch_size: int, merge_size: int) -> NDArray[np.uint8]:
    """Patch rows back to frames [F, H, W, 3]; of a still image, one."""
    t, h, w = patches.grid_thw
    p, m = patch_size, merge_size
    blocks = patches.rows.reshape(t, h // m, w // m, m, m, 3, -1, p, p)
    # (t, block row, block column, row, column, channel, frame, y, x) to (t, frame, y of the image, x, channel)
    frames = blocks.transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return np.ascontiguousarray(frames.reshape(-1, h * p, w * p, 3))


def contact_sheet(frames: NDArray[np.uint8], times: Sequence[float]) -> Image.Image:
    """Frames [F, H, W, 3], small, in the order of a page's lines, each with its number and its seconds beneath it."""
    height, width = frames.shape[1:3]
    scale = min(1.0, THUMBNAIL / max(height, width))
    size = max(1, round(width * scale)), max(1, round(height * scale))
    columns = math.isqrt(len(times) - 1) + 1
    lines = -(-len(times) // columns)
    sheet = Image.new("RGB", (columns * size[0], lines * (size[1] + CAPTION)))
    pen = ImageDraw.Draw(sheet)
    for index, (frame, seconds) in enumerate(zip(frames, times, strict=False)):  # the last is repeated to fill a pair
        x, y = index % columns * size[0], index // columns * (size[1] + CAPTION)
        sheet.paste(Image.fromarray(frame).resize(size), (x, y))
        pen.text((x + 2, y + size[1] + 2), f"{index}  {seconds:.2f} s", fill="white")
    return sheet


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
