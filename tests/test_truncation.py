"""Pillow's flag for truncated files: no decode runs under that of another, and each has its turn."""

from __future__ import annotations

import threading
import time

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.image import decode
from rtp_mm.media.truncation import TRUNCATION


def decode_some(data: bytes, *, allow_truncated: bool) -> None:
    decode(data, max_pixels=10**8, allow_truncated=allow_truncated, exif_transpose=False)


def test_no_decode_runs_under_the_tolerance_of_another(photo: bytes) -> None:
    truncated = photo[: len(photo) * 2 // 3]
    wrong: list[str] = []

    def strict() -> None:
        for _ in range(20):
            try:
                decode_some(truncated, allow_truncated=False)
            except WrongFormatError:
                continue
            wrong.append("a strict decode let a truncated image pass")

    def tolerant() -> None:
        for _ in range(20):
            try:
                decode_some(truncated, allow_truncated=True)
            except WrongFormatError:
                wrong.append("a tolerant decode refused a truncated image")

    threads = [threading.Thread(target=work) for work in (strict, tolerant) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_decodes_that_disagree_on_truncated_files_take_turns() -> None:
    """Else those that agree, one after the other, would keep out the one that waits for them."""
    order = []

    def decoding(name: str, allow_truncated: bool, inside: threading.Event) -> threading.Thread:
        def run() -> None:
            with TRUNCATION.decoding(allow_truncated):
                order.append(name)
                inside.wait()

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def wait_for(count: int) -> None:
        while sum(TRUNCATION._waiting.values()) < count:
            time.sleep(0.001)

    may_end, at_once = threading.Event(), threading.Event()
    at_once.set()
    threads = [decoding("first", True, may_end)]
    while not order:
        time.sleep(0.001)
    threads.append(decoding("other", False, at_once))
    wait_for(1)
    threads.append(decoding("later", True, at_once))
    wait_for(2)
    assert order == ["first"]
    may_end.set()
    for thread in threads:
        thread.join(60)
    assert sorted(order) == ["first", "later", "other"]
