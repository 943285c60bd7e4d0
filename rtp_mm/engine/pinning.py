"""Host memory that a CUDA device reads by itself, so that copies up from it are asynchronous."""

from __future__ import annotations

import logging
from contextlib import suppress

import numpy as np
import torch
from numpy.typing import NDArray

from rtp_mm.logs import log_event

_log = logging.getLogger(__name__)


class PinnedBytes:
    """[n] bytes whose pages stay where they are until `close`: none of them may be given back meanwhile.

    Takes the memory of all pages at once. Where the driver refuses, copies are as right and not asynchronous.
    """

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._runtime = torch.cuda.cudart()
        self._memory = memory  # stays while it is registered
        self._address = memory.ctypes.data
        error = self._runtime.cudaHostRegister(self._address, memory.nbytes, 0)
        self.is_pinned = error == self._runtime.cudaError.success
        if not self.is_pinned:
            reason = self._runtime.cudaGetErrorString(error)
            log_event(_log, "slab not pinned", logging.WARNING, bytes=memory.nbytes, reason=reason)
            _let_go_of_the_error()

    def close(self) -> None:
        """Before the memory goes."""
        if self.is_pinned:
            self.is_pinned = False
            self._runtime.cudaHostUnregister(self._address)


def _let_go_of_the_error() -> None:
    """CUDA keeps its last error until somebody is told: this launch, not whoever's is next on the thread."""
    with suppress(RuntimeError, AssertionError):  # an assertion where torch has no CUDA
        torch.zeros(1, device="cuda")
