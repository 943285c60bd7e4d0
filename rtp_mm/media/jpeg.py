"""JPEG files to RGB, with Pillow's bytes in a fraction of its time."""

from __future__ import annotations

import numpy as np
import simplejpeg
from numpy.typing import NDArray

from rtp_mm import _core

DECODER = f"simplejpeg {simplejpeg.__version__}"  # which bundles libjpeg-turbo

# What both decode by the same code with the same settings: accurate inverse DCT, smooth chroma upsampling. Others
# (CMYK, YCCK) are turned to RGB by Pillow's own rules.
_SAME_AS_PILLOW = ("YCbCr", "Gray")

# Without, libjpeg-turbo's own kernels are faster than our decoder, or, on ARM, nobody has measured which are.
_HAS_KERNELS = "avx2" in _core.resize_levels()


def read_jpeg(data: bytes, width: int, height: int) -> _core.Jpeg | None:
    """A file for our own decoder, whose bytes are libjpeg-turbo's; or `None` for one that is another decoder's to
    judge: in another colour space, of unusual sampling, of another size than Pillow read, unusual otherwise, or broken.
    """
    if not _HAS_KERNELS or (jpeg := _core.Jpeg.read(data)) is None or jpeg.shape != (height, width, 3):
        return None
    return jpeg


def decode_jpeg(data: bytes, width: int, height: int) -> NDArray[np.uint8] | None:
    """[height, width, 3] uint8 by libjpeg-turbo, Pillow's bytes; or `None` for a file that is Pillow's to judge.

    That is one of another size than Pillow read, in another colour space, of 12 bits, broken or truncated in any way,
    or of a kind that libjpeg-turbo does not read.
    """
    try:
        *size, colour_space, _ = simplejpeg.decode_jpeg_header(data)
        if size != [height, width] or colour_space not in _SAME_AS_PILLOW:
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
    except (ValueError, KeyError):  # strict: warnings count as errors; of 4:4:1 it knows no name
        return None
    return pixels
