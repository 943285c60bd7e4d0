"""Damage as files meet it, and as attackers make it: seeded, so that a failure comes again."""

from __future__ import annotations

import numpy as np

# What a length, an offset or a count does most harm with.
EXTREMES = [b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\0\0", b"\xff\xff", b"\x7f\xff\xff\xff", b"\xff\xff\xff\xff",
            b"\x80\0\0\0", b"\0\0\0\0", b"\1\0\0\0", b"\xff" * 8]  # fmt: skip


def mutated(data: bytes, rng: np.random.Generator, head: int = 200) -> bytes:
    """The file after one to four changes, most of them in its first `head` bytes, where the headers are."""
    file = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if not file:
            break
        reach = len(file) if rng.random() < 0.3 else min(len(file), head)
        at = int(rng.integers(reach))
        match rng.integers(6):
            case 0:
                file[at] ^= 1 << rng.integers(8)
            case 1:
                file[at] = rng.integers(256)
            case 2:
                extreme = EXTREMES[rng.integers(len(EXTREMES))]
                file[at : at + len(extreme)] = extreme
            case 3:
                del file[at : at + int(rng.integers(1, 40))]
            case 4:
                source = int(rng.integers(len(file)))
                file[at:at] = file[source : source + int(rng.integers(1, 60))]
            case 5:
                del file[at + int(rng.integers(len(file))) :]
    return bytes(file)
