"""Raw tensor items (type 4): pixels or samples that the caller decoded."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rtp_mm.errors import WrongFormatError

EXPECTED = "int32 or uint8 pixels [H, W, 3] or [T, H, W, 3], or float32 samples [S]"


def as_array(tensor: Any) -> NDArray[Any]:
    """A numpy array, or anything that offers itself as one (a torch tensor on the host), checked and copied.

    Pixels, int32 or uint8 [H, W, 3] or [T, H, W, 3] with values of 0..255, become uint8 [T, H, W, 3]; float32 [S]
    samples stay. The result is read-only and shares no memory with the caller's tensor, which may change any time.
    Raises `WrongFormatError`.
    """
    if tensor is None:
        raise WrongFormatError(f"a TENSOR item needs a tensor: {EXPECTED}")
    try:
        source = np.asarray(tensor)
    except (TypeError, ValueError, RuntimeError) as error:  # bfloat16, ragged, on a device, requires grad
        raise WrongFormatError(f"the tensor cannot be read: {error}") from None
    is_pixels = source.dtype in (np.int32, np.uint8) and source.ndim in (3, 4) and source.shape[-1] == 3
    is_samples = source.dtype == np.float32 and source.ndim == 1
    if not (is_pixels or is_samples) or source.size == 0:
        raise WrongFormatError(f"a tensor must be {EXPECTED}, got {source.dtype} {list(source.shape)}")
    if source.dtype == np.int32 and not (source.min() >= 0 and source.max() <= 255):
        raise WrongFormatError(f"pixels must be in 0..255, got {source.min()}..{source.max()}")
    if is_samples and not np.isfinite(source).all():
        raise WrongFormatError("samples must be finite")
    array = np.array(source, dtype=np.uint8 if is_pixels else np.float32, order="C")
    if array.ndim == 3:
        array = array[None]
    array.flags.writeable = False
    return array
