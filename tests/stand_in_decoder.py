"""A `DeviceDecoder` without a device: Pillow and PyAV, so that all but DALI itself is tested anywhere; and a table of
what it takes.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rtp_mm.config import load_settings
from rtp_mm.engine.process_engine import MMProcessEngine
from rtp_mm.media.decode_backend import DecoderRefusedError, DeviceDecoders, FrameLimits
from rtp_mm.media.image import decode
from rtp_mm.media.plain_pixels import plain_formats
from rtp_mm.models.device_preprocessor import DevicePreprocessor, MakeDecoder
from rtp_mm.models.registry import load_model
from rtp_mm.preprocess.media import MediaPreprocessor
from tests.clips import decode_all

LIMITS = FrameLimits(16, 16, 4096, 4096, 65536)
CPU = torch.device("cpu")


def decoders(*codecs: str) -> DeviceDecoders:
    return DeviceDecoders("stand-in 1", plain_formats(), tuple((codec, LIMITS) for codec in codecs or ("h264", "vp9")))


class StandInDecoder:
    """Checks that one thread uses it. `calls`: what it was asked for, "image" or the frames' indices."""

    def __init__(self, stream: object = None) -> None:
        assert stream is None
        self._thread = threading.get_ident()
        self.calls: list[Any] = []

    def image(self, data: bytes) -> Any:
        self._note("image")
        return np.array(decode(data, max_pixels=1 << 28, allow_truncated=False, exif_transpose=False))

    def frames(self, data: bytes, indices: Sequence[int]) -> Any:
        self._note([*indices])
        every = decode_all(data)
        return np.stack([every[index] for index in indices])

    def _note(self, call: Any) -> None:
        assert self._thread == threading.get_ident()
        self.calls.append(call)


class RefusingDecoder(StandInDecoder):
    def image(self, data: bytes) -> Any:
        raise DecoderRefusedError("not this one")

    def frames(self, data: bytes, indices: Sequence[int]) -> Any:
        raise DecoderRefusedError("not this one")


def on_device(
    media: MediaPreprocessor,
    setting: Any = "gpu",
    make_decoder: MakeDecoder = StandInDecoder,
    takes: DeviceDecoders | None = None,
) -> DevicePreprocessor:
    return DevicePreprocessor(media, CPU, setting, takes or decoders(), make_decoder)


def engine_with(
    folder: Path, setting: Any = "gpu", make_decoder: MakeDecoder = StandInDecoder, **options: Any
) -> MMProcessEngine:
    """An engine that takes the CPU for a device with decoders of its own."""
    settings = load_settings(checkpoint_path=folder, device="cpu", act_type="fp32", **options)
    model = load_model(settings)
    assert isinstance(model.mm_part.preprocessor, MediaPreprocessor)
    model.mm_part.device_preprocessor = on_device(model.mm_part.preprocessor, setting, make_decoder)
    return MMProcessEngine(model, settings)
