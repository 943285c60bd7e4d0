"""Preprocessing on the CPU without torch (csrc/core_module.cpp)."""

import numpy as np
from numpy.typing import NDArray

def patchify(
    frames: NDArray[np.uint8],
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Cuts frames into patch rows and releases the GIL meanwhile.

    frames: [F, H, W, 3] contiguous, F divisible by `temporal_patch_size` T (1 for a still image), H and W by
            `patch_size * merge_size`.
    out:    [F/T * H/P * W/P, 3 * T * P * P] contiguous, written and returned; a new array if left out.

    Rows are in merge-block order, (frame group, block row, block column, row in block, column in block), columns
    (channel, frame, y, x). Raises `ValueError` that says what came.
    """
