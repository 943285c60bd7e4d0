"""How much one forward takes, where the options leave it open."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from rtp_mm.config import Settings
from rtp_mm.errors import WrongFormatError
from rtp_mm.models.multimodal_common import MultiModalEmbeddingInterface
from rtp_mm.models.registry import thread_on
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.types import MMPreprocessConfig, MMUrlType, Patches

CPU_BATCH_PATCHES = 4096  # a CPU's throughput is flat from some 1000 on: more in a batch only makes others wait
CUDA_BATCH_PATCHES = 32768  # a guess, until it is measured on one
# 16384 tokens of 2 x 2: the most that a published checkpoint of these families asks for one image. On CUDA also the
# 115200 tokens of a video by the published rule; they would keep a CPU from everybody else for minutes or an hour, so
# there it takes the operator's word.
CPU_ITEM_PATCHES = 65536
CUDA_ITEM_PATCHES = 460800
QUEUE_BATCHES = 32  # full batches that may wait
_PROBE_SIDE = 16  # tokens
# Of the free device memory, for one forward: the allocator's pieces and other programs have the rest. A second one in
# flight takes no more (see `Forward.launch`).
_SHARE = 0.5


class DeviceLimits(NamedTuple):
    """In patches: of one batch, of one item (which goes alone if it is larger than a batch), of all that waits."""

    batch: int
    item: int
    queue: int

    def check_item(self, patches: int) -> None:
        """Raises `WrongFormatError` for an item too large for the device."""
        if patches > self.item:
            raise WrongFormatError(
                f"{patches} patches, over the limit of {self.item} (MM_MAX_PATCHES_PER_ITEM); fewer pixels "
                "(max_pixels) fit, or fewer frames of a clip (max_frames, fps)"
            )


def device_limits(mm_part: MultiModalEmbeddingInterface, settings: Settings) -> DeviceLimits:
    """What the options say; what they leave open is a constant, or less where the device's free memory is less."""
    fitting = _fitting_patches(mm_part)
    batch = settings.vit_max_batch_patches or min(
        CPU_BATCH_PATCHES if mm_part._device.type == "cpu" else CUDA_BATCH_PATCHES, fitting
    )
    item = settings.mm_max_patches_per_item or fitting
    return DeviceLimits(batch, item, settings.mm_max_queue_patches or QUEUE_BATCHES * batch)


def _fitting_patches(mm_part: MultiModalEmbeddingInterface) -> int:
    """Patches that one forward has memory for, by what a small one takes, up to the constants above."""
    device, preprocessor = mm_part._device, mm_part.preprocessor
    if device.type != "cuda" or not isinstance(preprocessor, MediaPreprocessor):
        return CPU_ITEM_PATCHES if device.type == "cpu" else CUDA_ITEM_PATCHES
    side = _PROBE_SIDE * preprocessor.merge_size
    patches = side * side
    grey = Patches(np.full((patches, preprocessor.row_bytes), 128, np.uint8), (1, side, side))
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    with thread_on(device), torch.inference_mode():
        mm_part.mm_process_batch([grey], [MMUrlType.IMAGE], [MMPreprocessConfig()])
    torch.cuda.synchronize(device)
    a_patch: int = max(1, (torch.cuda.max_memory_allocated(device) - before) // patches)
    free: int = torch.cuda.mem_get_info(device)[0]
    return min(max(patches, int(free * _SHARE) // a_patch), CUDA_ITEM_PATCHES)
