"""How many threads one decoder may have, of videos, AVIF and HEIC: a figure of the process, as Pillow has it for AVIF.

Left alone FFmpeg and dav1d take one per core, in each of as many workers as there are cores. Pixels do not depend on
it.
"""

from __future__ import annotations

from PIL import AvifImagePlugin

from rtp_mm.cores import CoreShare, available_cores


class _DecodeThreads:
    """`count`, for the decoders that are opened from now on; of AVIF once there was a grant."""

    def __init__(self) -> None:
        self.count = CoreShare(available_cores()).among(1)

    def grant(self, count: int) -> None:
        self.count = AvifImagePlugin.DEFAULT_MAX_THREADS = count


DECODE_THREADS = _DecodeThreads()  # one per process, as Pillow's
