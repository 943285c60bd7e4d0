"""Files to patch rows on the tower's device, by its own decoders: no pixel is seen by the host."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from math import prod

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from rtp_mm import ops
from rtp_mm.config import Settings
from rtp_mm.errors import StartError
from rtp_mm.media import dali
from rtp_mm.media.decode_backend import (
    Choice,
    DecoderRefusedError,
    DeviceDecoder,
    DeviceDecoders,
    DevicePixels,
    Setting,
    choose_for_clip,
    choose_for_image,
)
from rtp_mm.media.nvdec import nvdec_codecs
from rtp_mm.media.probe import probe
from rtp_mm.media.sniff import sniff
from rtp_mm.media.video import open_video_header
from rtp_mm.preprocess.media import MediaPreprocessor, file_kind
from rtp_mm.preprocess.patches import ResizePlan
from rtp_mm.types import Blob, DevicePatches, MMUrlType, PreprocessOptions

_log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 28  # of decoded frames at once: 43 of 1080p

MakeDecoder = Callable[["torch.cuda.Stream | None"], DeviceDecoder]  # for the calling thread and this stream


class DevicePreprocessor:
    """What `MediaPreprocessor` does, on the device. For several threads, each of which gets a decoder and a stream."""

    def __init__(
        self,
        media: MediaPreprocessor,
        device: torch.device,
        setting: Setting,
        decoders: DeviceDecoders,
        make_decoder: MakeDecoder,
    ) -> None:
        self._media, self._device = media, device
        self._setting, self._decoders = setting, decoders
        self._make_decoder = make_decoder
        self._own = threading.local()
        self._counting = threading.Lock()
        self.decodes = 0  # items decoded here
        self.cpu_decodes: Counter[str] = Counter()  # items meant for the device, by why they went to the CPU

    @classmethod
    def for_device(
        cls, media: MediaPreprocessor, device: torch.device, settings: Settings
    ) -> DevicePreprocessor | None:
        """`None` where MM_DECODE_BACKEND leaves all to the CPU, or is auto and there is nothing else.

        Raises `StartError` where it asks for decoders that are not there.
        """
        setting = settings.mm_decode_backend
        is_there = device.type == "cuda" and dali.is_installed()
        if setting == "cpu" or (setting == "auto" and not is_there):
            return None
        if device.type != "cuda":
            raise StartError(f"MM_DECODE_BACKEND=gpu: the device is {device}")
        if not is_there:
            raise StartError("MM_DECODE_BACKEND=gpu needs DALI (pip install 'rtp_mm[dali]')")
        with torch.cuda.device(device):
            torch.cuda.synchronize()  # makes the device's context this thread's
            codecs = nvdec_codecs()
            index = torch.cuda.current_device()
        if setting == "auto" and not codecs:
            return None
        formats = dali.FORMATS if setting == "gpu" else frozenset()
        decoders = DeviceDecoders(dali.library(), formats, codecs)
        dali.DaliDecoder(index)  # a broken installation ends the start, not the first request
        _log.info("decoded on %s: %s", device, ", ".join([name for name, _ in codecs] + sorted(formats)))
        return cls(media, device, setting, decoders, lambda stream: dali.DaliDecoder(index, stream))

    def bound(self, max_patches: int) -> None:
        """From now on a clip of more patches is refused before its frames are decoded."""
        self._media = self._media.bounded(max_patches)

    @property
    def cache_key(self) -> tuple[object, ...]:
        """With a file's bytes it says where the file is decoded, and by what."""
        return (self._setting, self._decoders)

    def may_take(self, blob: Blob, mm_type: MMUrlType) -> bool:
        """Whether it is worth asking; quick, for the event loop."""
        return not isinstance(blob.data, np.ndarray) and (
            self._setting == "gpu" or file_kind(blob.data, mm_type) is MMUrlType.VIDEO
        )

    def __call__(self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions) -> DevicePatches | None:
        """Complete rows on the device, or `None` for what the CPU is to decode.

        Raises `WrongFormatError` for a limit that the item breaks, bad options and a container that cannot be read,
        `ProcessError` where the device fails.
        """
        assert isinstance(blob.data, bytes)
        is_clip = file_kind(blob.data, mm_type) is MMUrlType.VIDEO
        try:
            with torch.inference_mode(), torch.cuda.stream(self._stream):
                choice, patches = (self._clip if is_clip else self._image)(blob.data, options)
                self._settle()
        except DecoderRefusedError as error:
            _log.info("%s goes to the CPU: %s", blob.source, error)
            choice, patches = Choice(False, "refused"), None
        with self._counting:
            self.decodes += patches is not None
            if choice.reason is not None:
                self.cpu_decodes[choice.reason] += 1
        return patches

    def _image(self, data: bytes, options: PreprocessOptions) -> tuple[Choice, DevicePatches | None]:
        image = self._media.image
        header = probe(data)
        choice = choose_for_image(header, data, self._setting, self._decoders, exif_transpose=image.exif_transpose)
        if not choice.is_on_device or header is None:
            return choice, None
        plan = image.plan(header.height, header.width, options)
        rows = self._rows(self._decoder.image(data), (header.height, header.width, 3), plan, step=1)
        return choice, DevicePatches(rows, image.grid(plan))

    def _clip(self, data: bytes, options: PreprocessOptions) -> tuple[Choice, DevicePatches | None]:
        if sniff(data) not in (MMUrlType.VIDEO, None):  # an animation, a sound
            return choose_for_clip(None, self._setting, self._decoders), None
        video = self._media.video
        with open_video_header(data, video.limits) as (header, clip):
            choice = choose_for_clip(header, self._setting, self._decoders)
            if not choice.is_on_device or clip is None:
                return choice, None
            total, fps = clip.frames, float(clip.fps)
        chosen = video.rule.choose_frames(total, fps, options)
        plan = video.plan(header.height, header.width, len(chosen), options)
        grid = video.checked_grid(len(chosen), plan)
        step = video.rule.temporal_patch_size
        seconds = step / (len(chosen) / total * fps)
        chosen += chosen[-1:] * (-len(chosen) % step)
        size = (header.height, header.width, 3)
        most = max(1, CHUNK_BYTES // prod(size) // step) * step
        chunks = [chosen[start : start + most] for start in range(0, len(chosen), most)]
        rows = [self._rows(self._decoder.frames(data, c), (len(c), *size), plan, step) for c in chunks]
        return choice, DevicePatches(torch.cat(rows), grid, seconds)

    def _rows(self, pixels: DevicePixels, shape: tuple[int, ...], plan: ResizePlan, step: int) -> Tensor:
        """Complete: nothing reads the pixels any more. Raises `DecoderRefusedError` for pixels of another shape."""
        frames = from_dlpack(pixels)
        if frames.shape != shape or frames.dtype != torch.uint8:
            raise DecoderRefusedError(f"{frames.dtype} {[*frames.shape]} came of a file that promised {[*shape]}")
        image = self._media.image
        rows = ops.resize_patchify(
            plan.cut(frames if frames.ndim == 4 else frames[None]),
            plan.height,
            plan.width,
            image.patch_size,
            image.merge_size,
            order=plan.order,
            temporal_patch_size=step,
        )
        self._settle()
        return rows

    # --- of the calling thread

    def _settle(self) -> None:
        """Waits for what its stream has to do; the batcher's and other threads' go on."""
        if self._stream is not None:
            self._stream.synchronize()

    @property
    def _stream(self) -> torch.cuda.Stream | None:
        if self._device.type != "cuda":
            return None
        if not hasattr(self._own, "stream"):
            self._own.stream = torch.cuda.Stream(self._device)
        stream: torch.cuda.Stream = self._own.stream
        return stream

    @property
    def _decoder(self) -> DeviceDecoder:
        if not hasattr(self._own, "decoder"):
            self._own.decoder = self._make_decoder(self._stream)
        decoder: DeviceDecoder = self._own.decoder
        return decoder
