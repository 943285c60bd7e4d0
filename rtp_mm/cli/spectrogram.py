"""A sound as the audio tower sees it: log-mel frames over time, low bands at the bottom, tokens and seconds marked."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from rtp_mm.preprocess.log_mel import RANGE, MelRule
from rtp_mm.types import LogMel

FRAMES_A_TOKEN = 4
BAND = 3  # pixels of a mel band; a frame has one
AXIS = 28  # pixels, the lines of text beneath
TOKEN_MARK, SECOND_MARK, CUT_MARK = (110, 110, 110), (230, 230, 230), (255, 60, 60)
# From the quietest of `RANGE` decades to the loudest.
COLOURS = np.array([(0, 0, 12), (70, 18, 110), (190, 55, 85), (250, 150, 30), (252, 255, 165)])


def draw_spectrogram(sound: LogMel, rule: MelRule) -> Image.Image:
    """The rows as they are, and where a longer sound was cut."""
    frames = sound.rows[1:-1]  # without what the convolutions see before and behind
    loudness = (frames - frames.max()) * 4 / RANGE + 1  # whisper's scale has 4 decades in 1
    stops = np.linspace(0, 1, len(COLOURS))
    pixels = np.stack([np.interp(loudness, stops, channel) for channel in COLOURS.T], axis=-1).astype(np.uint8)
    height = BAND * rule.bins
    picture = Image.new("RGB", (len(frames), height + AXIS))
    picture.paste(Image.fromarray(pixels.transpose(1, 0, 2)[::-1].repeat(BAND, axis=0)), (0, 0))
    pen = ImageDraw.Draw(picture)
    for x in range(0, len(frames), FRAMES_A_TOKEN):
        pen.line([(x, height), (x, height + 3)], fill=TOKEN_MARK)
    for second in range(len(frames) * rule.hop // rule.rate + 1):
        x = second * rule.rate // rule.hop
        pen.line([(x, height), (x, height + 8)], fill=SECOND_MARK)
        pen.text((x + 3, height + 6), f"{second} s", fill=SECOND_MARK)
    if sound.cut_s is not None:
        pen.line([(len(frames) - 1, 0), (len(frames) - 1, height + AXIS)], fill=CUT_MARK, width=2)
        pen.text((len(frames) - 4, height + 14), f"cut at {sound.cut_s:g} s", fill=CUT_MARK, anchor="ra")
    return picture


def describe(sound: LogMel, rule: MelRule) -> str:
    """One line."""
    frames = 2 * sound.steps
    cut = "" if sound.cut_s is None else f", cut at {sound.cut_s:g} s"
    seconds = frames * rule.hop / rule.rate
    return f"{seconds:.2f} s{cut}, {frames} frames of {rule.bins} mel bands, {sound.steps // 2} tokens"
