"""What a model is sent in a storm, for `chaos.py`: good media, each with a right answer, and media over a limit."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import animations
import clips
import numpy as np
import skimage.data
import sounds
from numpy.typing import NDArray
from PIL import Image

from rtp_mm.media.image import FORMATS
from rtp_mm.types import MMUrlType, MultimodalInput

# Limits of the server, low enough that what is over them is made and sent in no time.
LIMITS: dict[str, object] = {
    "mm_image_max_file_size_kb": 2048,
    "mm_video_max_file_size_kb": 512,
    "mm_max_pixels": 512 * 512,
    "mm_max_animation_pixels": 512 * 512,
    "mm_max_video_seconds": 60,
}
CLIPS = ("h264 mp4, B-frames", "hevc mkv, closed groups", "vp9 webm", "mpeg4 avi", "mjpeg mov")
SOUNDS = ("wav", "flac", "mp3", "opus", "m4a", "webm")


@dataclass(frozen=True, slots=True)
class Good:
    """A file, or an array: what a request calls a tensor."""

    name: str
    mm_type: MMUrlType
    content: bytes | NDArray[Any]

    @property
    def item(self) -> MultimodalInput:
        """With all of it in the request."""
        if isinstance(self.content, bytes):
            return inline(self.content, self.mm_type)
        return MultimodalInput("", self.mm_type, tensor=self.content)


@dataclass(frozen=True, slots=True)
class Supply:
    """The first of `good` is a file, of the kind that is asked for where nothing comes."""

    good: Sequence[Good]
    refused: Mapping[str, MultimodalInput]


def inline(data: bytes, mm_type: MMUrlType) -> MultimodalInput:
    return MultimodalInput("data:;base64," + base64.b64encode(data).decode(), mm_type)


def pictures() -> Supply:
    """Stills of every format, clips, animations as clips, and tensors, which all differ."""
    photo = skimage.data.astronaut()
    good = [
        Good(name, MMUrlType.IMAGE, still(photo[i * 9 : i * 9 + 60 + 14 * i, i * 7 : i * 7 + 200], name))
        for i, name in enumerate(FORMATS)
    ]
    frames = clips.moving(photo, 12, 96, 64)
    good += [Good(kind, MMUrlType.VIDEO, clips.encode(frames, *clips.KINDS[kind])) for kind in CLIPS]
    for kind in animations.RANDOM:
        data = animations.animate([frame[: 40 + len(kind)] for frame in frames[:6]], kind, 100)
        good.append(Good(f"animated {kind}", MMUrlType.VIDEO, data))
    good.append(Good("tensor of an image", MMUrlType.TENSOR, photo[200:300, 100:200].astype(np.int32)))
    good.append(Good("tensor of frames", MMUrlType.TENSOR, np.stack(frames[:5]).astype(np.int32)))

    large = np.zeros((520, 512, 3), np.uint8)
    many = animations.animate([photo[i : i + 64, :64] for i in range(80)], "GIF", 20)
    file = clips.encode(frames)
    refused = {
        "PNG bomb": inline(bomb(), MMUrlType.IMAGE),
        "large tensor": MultimodalInput("", MMUrlType.TENSOR, tensor=large.astype(np.int32)),
        "tensor of a strange shape": MultimodalInput("", MMUrlType.TENSOR, tensor=np.zeros((5, 5, 4), np.int32)),
        "clip of large frames": inline(clips.encode([large] * 2), MMUrlType.VIDEO),
        "long clip": inline(clips.encode(frames, rate=1, times=[i * 6 for i in range(12)]), MMUrlType.VIDEO),
        "large file of a clip": inline(file + bytes(513 << 10), MMUrlType.VIDEO),
        "animation of many frames": inline(many, MMUrlType.VIDEO),
        "sound as a clip": inline(clips.sound_only(), MMUrlType.VIDEO),
        "sound": inline(sounds.encode(sounds.sine(1), 16000), MMUrlType.AUDIO),
    }
    return Supply(good, refused)


def noises() -> Supply:
    """Sounds of several formats, that of a film, and a tensor, which all differ."""
    good = []
    for i, name in enumerate(SOUNDS):
        container, codec, rate, _ = sounds.FORMATS[name]
        sound = sounds.speech(4000 * (i + 2), i)
        good.append(Good(name, MMUrlType.AUDIO, sounds.encode(sound, rate, container, codec)))
    film = sounds.encode(sounds.speech(9000, 8), 44100, "matroska", "aac", video=True)
    good.append(Good("film", MMUrlType.AUDIO, film))
    good.append(Good("tensor of a sound", MMUrlType.TENSOR, sounds.speech(7000, 9)))
    whole = good[0].content
    assert isinstance(whole, bytes)
    rate = whole.index(b"fmt ") + 12
    refused = {
        "sound of a rate that is none": inline(whole[:rate] + b"\xff" * 4 + whole[rate + 4 :], MMUrlType.AUDIO),
        "sound of a few samples": inline(sounds.encode(sounds.sine(0.001), 16000), MMUrlType.AUDIO),
        "large file of a sound": inline(whole + bytes(513 << 10), MMUrlType.AUDIO),
        "silent film": inline(clips.encode([np.zeros((32, 32, 3), np.uint8)] * 3), MMUrlType.AUDIO),
        "image": inline(still(np.zeros((32, 32, 3), np.uint8), "PNG"), MMUrlType.IMAGE),
        "tensor of an image": MultimodalInput("", MMUrlType.TENSOR, tensor=np.zeros((5, 5, 3), np.int32)),
        "tensor without numbers": MultimodalInput("", MMUrlType.TENSOR, tensor=np.full(7000, np.nan, np.float32)),
    }
    return Supply(good, refused)


def still(pixels: NDArray[np.uint8], image_format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 65535 x 65535 pixels by its header, in a few bytes."""
    data = bytearray(still(np.zeros((96, 96, 3), np.uint8), "PNG"))
    data[16:24] = (65535).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)
