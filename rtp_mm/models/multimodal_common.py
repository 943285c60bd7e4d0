"""`mm_part`: RTP-LLM's interface of the part of a model that turns a URL into an embedding.

    mm_embedding(url) = fetch, then _mm_preprocess (CPU-bound: bytes to prepared input),
                        then mm_process (device-bound: prepared input to embedding and position ids)

A third party's class overrides the last two, or, on the interfaces per modality, `image_embedding` and its kin. Ours
also set `preprocessor`, which runs in torch-free workers, and `mm_process_batch`, which packs many inputs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rtp_mm.config import Settings, load_settings
from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.audio import decode_channels
from rtp_mm.media.clip import ClipLimits
from rtp_mm.media.fetch import Fetcher
from rtp_mm.media.image import decode
from rtp_mm.media.limits import check_pixels
from rtp_mm.media.sniff import sniff
from rtp_mm.models.device_preprocessor import DevicePreprocessor
from rtp_mm.models.gpt_init_model_parameters import GptInitModelParameters
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.preprocess.video import chosen_frames
from rtp_mm.preprocess.video_rule import VideoRule
from rtp_mm.preprocess.whole import cropped, sized, sizes_asked
from rtp_mm.types import (
    LIBRARY_CALLER,
    Blob,
    DevicePatches,
    MMPreprocessConfig,
    MMUrlType,
    MultimodalInput,
    Patches,
    Prepared,
    PreprocessOptions,
    RowAllocator,
)

ACT_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Preprocessor(Protocol):
    """Bytes to patch rows. Torch-free, as are its module's imports, and picklable: it runs in worker processes."""

    def __call__(
        self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, allocate: RowAllocator = ...
    ) -> Prepared:
        """`allocate` is asked once, for the `rows` of the result."""


Embedding = tuple[Tensor, Tensor | None]  # [tokens, hidden]; [tokens, 3] int32 (t, h, w) for models with mrope


def as_embedding(result: Tensor | tuple[Tensor, Tensor | None]) -> Embedding:
    """What `mm_process` may return, a tensor or a pair, as a pair."""
    return result if isinstance(result, tuple) else (result, None)


class MultiModalEmbeddingInterface:
    """Base of every `mm_part`."""

    data_type = "bf16"
    settings: Settings | None = None  # the server's
    preprocessor: Preprocessor | None = None  # runs instead of `_mm_preprocess` where it is set
    device_preprocessor: DevicePreprocessor | None = None  # is asked first where it is set
    assigned_device: torch.device | None = None  # by `init_multimodal`

    def __init__(self, config: GptInitModelParameters | None = None) -> None:
        if config:
            self.data_type, self.settings = config.data_type, config.settings

    @property
    def _data_type(self) -> torch.dtype:
        return ACT_DTYPES[self.data_type]

    @property
    def _device(self) -> torch.device:
        return self.assigned_device or torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def is_reentrant(self) -> bool:
        """Whether several threads may be in `mm_process_batch`, each with any number of torch's threads, for the same
        bits."""
        return False

    @property
    def quantization(self) -> str:
        """Of the weights, as MM_QUANTIZATION names it."""
        return "none"

    @property
    def products(self) -> str:
        """What it multiplies in, for who compares servers; "" where it does not tell."""
        return ""

    @property
    def answer_key(self) -> tuple[object, ...]:
        """What decides answers beside prepared input and weights: a part of every embedding's cache key."""
        return ()

    def call_between_steps(self, callback: Callable[[], None]) -> None:
        """Has a reentrant part call `callback` now and then on the thread that is in `mm_process_batch`: there a
        forward's share of torch's threads changes.
        """

    def bound_clips(self, max_patches: int) -> None:
        """From now on a clip of more patches, which no forward takes, is refused before its frames are decoded."""
        if isinstance(self.preprocessor, MediaPreprocessor):
            self.preprocessor = self.preprocessor.bounded(max_patches)
        if self.device_preprocessor is not None:
            self.device_preprocessor.bound(max_patches)

    def mm_embedding(self, url: str, mm_type: MMUrlType = MMUrlType.DEFAULT, **kwargs: Any) -> Embedding:
        """One URL to (embedding, position ids), one step after the other; `configs` holds an `MMPreprocessConfig`.

        An engine runs the same steps spread over its stages. Raises `MMError`.
        """
        configs = kwargs.setdefault("configs", MMPreprocessConfig())
        mm_type = MMUrlType(mm_type)  # a plain number will do
        blob = _fetch(MultimodalInput(url, mm_type, configs, kwargs.pop("tensor", None)), self.settings)
        prepared = self.prepare(blob, mm_type, configs)
        return as_embedding(self.mm_process(prepared, mm_type=mm_type, **kwargs))

    def prepare(self, blob: Blob, mm_type: MMUrlType, configs: MMPreprocessConfig) -> Any:
        """The half before the tower, by the device's decoders where they take the item; else by `preprocessor` where
        there is one, or by `_mm_preprocess` with a stream of its own.
        """
        if (on_device := self.device_preprocessor) is not None and on_device.may_take(blob, mm_type):
            patches = on_device(blob, mm_type, configs.options())
            if patches is not None:
                return patches
        if self.preprocessor is not None:
            return self.preprocessor(blob, mm_type, configs.options())
        data = BytesIO(blob.data) if isinstance(blob.data, bytes) else torch.from_numpy(blob.data.copy())
        return self._mm_preprocess(data, mm_type=mm_type, configs=configs)

    def _mm_preprocess(self, data: Any, **kwargs: Any) -> Any:
        """CPU-bound: a fresh `BytesIO` of the file (a tensor for TENSOR items) to what `mm_process` takes.

        `mm_type` and `configs` (`MMPreprocessConfig`) come as keywords.
        """
        raise NotImplementedError(f"{type(self).__name__} must define _mm_preprocess")

    def mm_process(self, mm_input: Any, **kwargs: Any) -> Tensor | Embedding:
        """Device-bound: a prepared input to its embedding [tokens, hidden], alone or with position ids [tokens, 3]."""
        raise NotImplementedError(f"{type(self).__name__} must define mm_process")

    def mm_process_batch(
        self, mm_inputs: Sequence[Any], mm_types: Sequence[MMUrlType], configs: Sequence[MMPreprocessConfig]
    ) -> list[Tensor | Embedding]:
        """Several prepared inputs, of which the engine batches as many as `patches` allows; here one after another."""
        return [
            self.mm_process(mm_input, mm_type=mm_type, configs=config)
            for mm_input, mm_type, config in zip(mm_inputs, mm_types, configs, strict=True)
        ]

    def patches(self, mm_input: Any) -> int | None:
        """The cost of a prepared input in a batch; `None`: it goes alone."""
        return len(mm_input.rows) if isinstance(mm_input, Patches | DevicePatches) else None


class ImageEmbeddingInterface(MultiModalEmbeddingInterface):
    """For models of single images: define `image_embedding`."""

    def _mm_preprocess(self, data: Any, **kwargs: Any) -> Image.Image:
        """RGB, of a file or of a tensor of one frame, as `configs` asks for it: cut to `crop_positions`, resized to
        `width` and `height`, within `min_pixels` and `max_pixels`; of its own size where these are unset.

        Raises `WrongFormatError`, and `NotSupportedError` for what is no single image.
        """
        settings = self.settings or load_settings()
        if isinstance(data, Tensor):
            if data.ndim != 4 or len(data) != 1:
                kind = "a clip" if data.ndim == 4 else "sound"
                raise NotSupportedError(f"this model takes single images, the tensor is {kind} {list(data.shape)}")
            check_pixels(data.shape[2], data.shape[1], settings.mm_max_pixels)
            pixels = data[0].numpy()
        else:
            file = data.read()
            _expect(file, kwargs.get("mm_type"), MMUrlType.IMAGE)
            pixels = decode(
                file,
                max_pixels=settings.mm_max_pixels,
                allow_truncated=settings.mm_allow_truncated_images,
                exif_transpose=settings.mm_exif_transpose,
                extra_formats=settings.mm_extra_image_formats,
            )
        options = _options(kwargs)
        return sized(Image.fromarray(cropped(pixels, options)), options, settings.mm_max_pixels)

    def mm_process(self, mm_input: Any, **kwargs: Any) -> Tensor | Embedding:
        embedding: Tensor | Embedding = self.image_embedding([mm_input])[0]
        return embedding

    def image_embedding(self, images: list[Image.Image]) -> Any:
        """RGB images to their embeddings, in order: a tensor [images, tokens, hidden] or a list of [tokens, hidden]."""
        raise NotImplementedError(f"{type(self).__name__} must define image_embedding")


class VideoEmbeddingInterface(MultiModalEmbeddingInterface):
    """For models of videos: define `video_embedding`."""

    def _mm_preprocess(self, data: Any, **kwargs: Any) -> Any:
        """RGB frames, those that MM_VIDEO_RULE and `configs` choose, or all of a tensor [T, H, W, 3]; cut to
        `crop_positions`.

        Raises `WrongFormatError`, also where `configs` asks for a size: how large all frames of a clip may be together
        is in a family's own rule, of which there is none here. `NotSupportedError` for what is no video.
        """
        options = _options(kwargs)
        if asked := sizes_asked(options):
            raise WrongFormatError(f"this model sizes a video's frames itself: no {', '.join(asked)}")
        settings = self.settings or load_settings()
        rule = VideoRule.published(settings.mm_video_rule, factor=1, temporal_patch_size=2)
        rule = replace(rule, server_max_frames=settings.mm_max_frames)
        frames: Iterable[NDArray[np.uint8]]
        if isinstance(data, Tensor):
            if data.ndim != 4:
                raise NotSupportedError(f"this model takes videos, the tensor is sound {list(data.shape)}")
            rule.check_given(len(data))
            frames = data.numpy()
        else:
            file = data.read()
            _expect(file, kwargs.get("mm_type"), MMUrlType.VIDEO)
            frames = chosen_frames(file, ClipLimits.of(settings), rule, options)
        return [Image.fromarray(cropped(frame, options)) for frame in frames]

    def mm_process(self, mm_input: Any, **kwargs: Any) -> Tensor | Embedding:
        return self.video_embedding(mm_input)

    def video_embedding(self, video: Any) -> Tensor | Embedding:
        """A prepared video, by default a list of RGB images, to its embedding."""
        raise NotImplementedError(f"{type(self).__name__} must define video_embedding")


class AudioEmbeddingInterface(MultiModalEmbeddingInterface):
    """For models of audio: define `audio_embedding`."""

    def _mm_preprocess(self, data: Any, **kwargs: Any) -> Any:
        """Waveform [channels, S] float32 and its rate, as torchaudio loads them, of a video's file too; a tensor [S] as
        it is.

        Raises `WrongFormatError`, and `NotSupportedError` for images.
        """
        if isinstance(data, Tensor):
            if data.ndim != 1:
                raise NotSupportedError(f"this model takes sound, the tensor is pixels {list(data.shape)}")
            return data
        file = data.read()
        _expect(file, kwargs.get("mm_type"), MMUrlType.AUDIO, MMUrlType.VIDEO)
        settings = self.settings or load_settings()
        waveform, rate = decode_channels(file, max_seconds=settings.mm_max_audio_seconds)
        return torch.from_numpy(waveform), rate

    def mm_process(self, mm_input: Any, **kwargs: Any) -> Tensor | Embedding:
        return self.audio_embedding(mm_input)

    def audio_embedding(self, audio: Any) -> Tensor | Embedding:
        """A prepared sound, by default (waveform, rate), to its embedding."""
        raise NotImplementedError(f"{type(self).__name__} must define audio_embedding")


def _expect(file: bytes, mm_type: MMUrlType | None, first: MMUrlType, *others: MMUrlType) -> None:
    """Raises `NotSupportedError` for a file that is none of these, as the request says, or else its bytes tell."""
    kind = mm_type or sniff(file) or first  # DEFAULT is 0
    if kind not in (first, *others):
        raise NotSupportedError(f"this model takes items of type {first.name.lower()}, not {kind.name.lower()}")


def _options(kwargs: Mapping[str, Any]) -> PreprocessOptions:
    """Raises `WrongFormatError`."""
    configs: MMPreprocessConfig = kwargs.get("configs") or MMPreprocessConfig()
    return configs.options()


def _fetch(item: MultimodalInput, settings: Settings | None) -> Blob:
    """Blocks until it is there. On a thread of its own: `asyncio.run` is refused where a loop runs already."""

    async def fetch() -> Blob:
        async with Fetcher(settings or load_settings()) as fetcher:
            return await fetcher.fetch(item, LIBRARY_CALLER)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: asyncio.run(fetch())).result()
