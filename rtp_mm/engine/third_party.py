"""What a model of a third party may raise, as errors of ours."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rtp_mm.errors import MMError, ProcessError

_log = logging.getLogger(__name__)


@contextmanager
def as_mm_error(source: str) -> Iterator[None]:
    """What a third party's code raises about the item from `source` leaves as `MMError`; its own text and stack stay in
    the log.
    """
    try:
        yield
    except (MMError, asyncio.CancelledError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except MemoryError:  # of the server's: a worker's, which has a limit of its own, is the item's fault
        raise ProcessError("preprocessing needs more memory than there is") from None
    except BaseException as error:  # noqa: BLE001  # a third party's: a panic of Rust code is no `Exception`
        _log.error("preprocessing of %s failed", source, exc_info=error)
        raise ProcessError(f"preprocessing failed with {type(error).__name__}") from None
