"""DALI's decoders: files to pixels in a GPU's memory, or, where a test asks for that, in the host's.

The only file that imports DALI, and only when a decoder is made: `ndd` imports torch where that is installed, so none
of this runs in preprocess workers.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from rtp_mm.errors import ProcessError, StartError
from rtp_mm.media.decode_backend import DecoderRefusedError
from rtp_mm.media.plain_pixels import plain_formats

if TYPE_CHECKING:
    from collections.abc import Callable

    from rtp_mm.media.decode_backend import DevicePixels

FORMATS = plain_formats()  # JPEG and JPEG 2000 by kernels of the GPU; the others by nvImageCodec's host decoders

_PADDING = [1, 254, 2]  # a green that fills no clip's frame
_DISTRIBUTIONS = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")

# On a GPU. Chroma is interpolated as libjpeg does it; no JPEG goes to the hardware engines, which do not.
_GPU_IMAGE_OPTIONS: dict[str, Any] = {"jpeg_fancy_upsampling": True, "hw_decoder_load": 0.0}
# DALI raises RuntimeError for all; these are no fault of a file.
_DEVICE_FAULTS = ("out of memory", "bad_alloc", "cuda")


def is_installed() -> bool:
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # no package `nvidia`
        return False


def library() -> str:
    """Its name and version, for cache keys; "" where it is not installed."""
    if not is_installed():
        return ""
    for name in _DISTRIBUTIONS:
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "dali"


class DaliDecoder:
    """A `DeviceDecoder`. `device_id`: of the CUDA device; `None`: DALI's decoders for the CPU. `stream`: of CUDA, on
    which the pixels come into being; whoever reads them on another waits for it.
    """

    def __init__(self, device_id: int | None, stream: Any = None) -> None:
        """Takes seconds for a process's first. Raises `StartError`."""
        try:
            import nvidia.dali.experimental.dynamic as ndd
        except (ImportError, OSError) as error:
            raise StartError(f"DALI cannot be imported: {error} (pip install 'rtp_mm[dali]')") from None
        self._ndd: Any = ndd
        self._device = "cpu" if device_id is None else ndd.Device("gpu", device_id)
        self._image_options = {} if device_id is None else _GPU_IMAGE_OPTIONS
        self._context = ndd.EvalContext(num_threads=1, device_id=device_id, cuda_stream=stream)

    def image(self, data: bytes) -> DevicePixels:
        with self._calling():
            options = {"adjust_orientation": False, **self._image_options}
            pixels: DevicePixels = self._decode(self._ndd.decoders.image, data, **options)
            return pixels

    def frames(self, data: bytes, indices: Sequence[int]) -> DevicePixels:
        with self._calling():
            numbers = np.asarray(indices, np.int32)
            decoded = self._decode(self._ndd.decoders.video, data, frames=numbers, fill_value=_PADDING)
            if self._is_padding(decoded[-1]):
                raise DecoderRefusedError(f"frame {indices[-1]} is not there")
            frames: DevicePixels = decoded
            return frames

    def _decode(self, decode: Callable[..., Any], data: bytes, **options: Any) -> Any:
        return decode(np.frombuffer(data, np.uint8), device=self._device, **options).evaluate()

    def _is_padding(self, frame: Any) -> bool:
        """[H, W, 3]. DALI makes frames of one colour where a clip has no more, and cannot be told not to (2.4)."""
        extremes = (reduce(frame, axes=(0, 1)).cpu() for reduce in (self._ndd.reductions.min, self._ndd.reductions.max))
        return all(np.array_equal(extreme, _PADDING) for extreme in extremes)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Turns DALI's one error into ours."""
        try:
            with self._context, self._ndd.EvalMode.sync_cpu:
                yield
        except RuntimeError as error:
            text = " ".join(str(error).split())
            if any(fault in text.lower() for fault in _DEVICE_FAULTS):
                raise ProcessError(f"the device's decoder failed: {text[:200]}") from None
            raise DecoderRefusedError(text) from None
