"""What the video decoders of an NVIDIA GPU (NVDEC) take, asked of its driver.

Source: `cuviddec.h` of NVIDIA's Video Codec SDK 13.0.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, Structure, byref, c_int, c_ubyte, c_uint, c_ushort

from rtp_mm.media.decode_backend import FrameLimits

_LIBRARY = "libnvcuvid.so.1"  # of the driver; containers have it where NVIDIA_DRIVER_CAPABILITIES has `video`
_CHROMA_420 = 1
# FFmpeg's name to cudaVideoCodec: those that DALI hands to NVDEC.
_CODECS = {"h264": 4, "hevc": 8, "vp9": 10, "av1": 11}


class _Caps(Structure):
    """CUVIDDECODECAPS: the first three are asked, the others answered."""

    _fields_ = (
        ("codec", c_int),
        ("chroma_format", c_int),
        ("bit_depth_minus_8", c_uint),
        ("reserved_1", c_uint * 3),
        ("is_supported", c_ubyte),
        ("decoders", c_ubyte),
        ("output_formats", c_ushort),
        ("max_width", c_uint),
        ("max_height", c_uint),
        ("max_macroblocks", c_uint),
        ("min_width", c_ushort),
        ("min_height", c_ushort),
        ("histogram", c_ubyte * 4),
        ("reserved_3", c_uint * 10),
    )


def nvdec_codecs() -> tuple[tuple[str, FrameLimits], ...]:
    """Codecs by FFmpeg's names, 8-bit 4:2:0, with their limits, on the CUDA device whose context is current in this
    thread. None where the driver brings no decoder, or the device has none.
    """
    try:
        ask = ctypes.CDLL(_LIBRARY).cuvidGetDecoderCaps
    except (OSError, AttributeError):
        return ()
    ask.argtypes, ask.restype = (POINTER(_Caps),), c_int
    found = []
    for name, number in _CODECS.items():
        caps = _Caps(codec=number, chroma_format=_CHROMA_420)
        if ask(byref(caps)) == 0 and caps.is_supported:
            limits = (caps.min_width, caps.min_height, caps.max_width, caps.max_height, caps.max_macroblocks)
            found.append((name, FrameLimits(*limits)))
    return tuple(found)
