"""JPEGs as ITU-T T.81 allows them, within our decoder's kinds, of random coefficients: seeded, so that a failure comes
again. The slow obvious twin of the decoder's entropy part; bits are text.

Pillow's own encoder writes few of these codes and scans.
"""

from __future__ import annotations

import struct
from bisect import bisect_left, insort
from dataclasses import dataclass, replace
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

Random = np.random.Generator
Blocks = NDArray[np.int64]  # [rows, columns, 64], in zigzag order
Sampling = tuple[int, int] | None  # samples of luma to one of chroma, across and down; `None`: grey
Words = dict[int, str]  # of a Huffman code, by symbol

ZIGZAG = sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8))
MOST_IN_COLUMN = 2900  # of absolute values, times steps: what has more than 2950, the decoder leaves to others
MOST_ENDED = 0x7FFF  # blocks whose end is told at once
DC, AC = 0, 1
DC_SYMBOLS = list(range(12))
AC_SYMBOLS = [0, 0xF0, *(zeros << 4 | size for zeros in range(16) for size in range(1, 11))]
PROGRESSIVE_AC_SYMBOLS = [zeros << 4 | size for zeros in range(16) for size in range(11)]


@dataclass(frozen=True, slots=True)
class Picture:
    width: int
    height: int
    sampling: Sampling
    blocks: list[Blocks]  # by component, of whole MCUs: coefficients, divided by their steps
    steps: list[bytes]

    def mcus(self, components: tuple[int, ...]) -> list[list[tuple[int, int, int]]]:
        """Component, row and column of each block, MCU by MCU of a scan of these components."""
        across, down = (1, 1) if components == (0,) else self.sampling or (1, 1)
        rows, columns = block_counts(self.width, self.height, across, down)
        sizes = {c: (down, across) if c == 0 else (1, 1) for c in components}
        return [
            [(c, row * v + y, column * u + x) for c, (v, u) in sizes.items() for y in range(v) for x in range(u)]
            for row in range(rows)
            for column in range(columns)
        ]


@dataclass(frozen=True, slots=True)
class Scan:
    """Coefficients [first, last] in zigzag order: their bits from `low` on, less those from `high` on, if not 0."""

    components: tuple[int, ...]
    first: int = 0
    last: int = 63
    high: int = 0
    low: int = 0


def block_counts(width: int, height: int, across: int, down: int) -> tuple[int, int]:
    """Rows and columns."""
    return -(-height // (8 * down)), -(-width // (8 * across))


# --- What is written


def random_picture(rng: Random, width: int, height: int, sampling: Sampling) -> Picture:
    across, down = sampling or (1, 1)
    rows, columns = block_counts(width, height, across, down)
    blocks, steps = [], []
    for shape in [(rows * down, columns * across), *([(rows, columns)] * 2 if sampling else [])]:
        divisors = rng.integers(1, rng.choice([2, 2, 10, 256]), 64)
        steps.append(bytes(divisors.tolist()))
        blocks.append(np.trunc(random_coefficients(rng, shape) / divisors).astype(np.int64))
    # Blocks past the edge, of which scans of luma alone tell nothing: finer bits of a negative number are a large one.
    lines, places = block_counts(width, height, 1, 1)
    for margin in (blocks[0][lines:], blocks[0][:, places:]):
        margin[..., 0] = np.abs(margin[..., 0])
    return Picture(width, height, sampling, blocks, steps)


def random_coefficients(rng: Random, shape: tuple[int, int]) -> NDArray[np.float64]:
    is_told = rng.random((*shape, 8, 8)) < rng.choice([0, 0.02, 0.1, 0.4, 0.9])
    values = np.clip(rng.laplace(0, rng.choice([1, 5, 20, 100]), is_told.shape), -1023, 1023) * is_told
    values[..., 0, 0] = np.clip(rng.normal(0, 300, shape), -1023, 1023)
    sums = np.abs(values).sum(axis=-2, keepdims=True)
    return (values * np.minimum(1, MOST_IN_COLUMN / np.maximum(sums, 1))).reshape(*shape, 64)[..., ZIGZAG]


def random_script(rng: Random, components: int) -> list[Scan]:
    """First coefficients first, of all components at once or one by one; then the rest of it all, in any order."""
    coarse, *finer = approximations((), 0, 0, rng.choice([0, 0, 1, 2, 3, 10]))
    chains = [[part for scan in finer for part in together_or_not(rng, scan, components)]]
    for c in range(components):
        cuts = sorted(rng.choice(range(2, 64), rng.choice([0, 0, 1, 2, 4]), replace=False).tolist())
        for first, end in pairwise([1, *cuts, 64]):
            chains.append(approximations((c,), first, end - 1, rng.choice([0, 0, 1, 1, 2, 4, 9])))
    order = rng.permutation(np.repeat(range(len(chains)), [len(chain) for chain in chains]))
    rest = [iter(chain) for chain in chains]
    return together_or_not(rng, coarse, components) + [next(rest[i]) for i in order]


def approximations(components: tuple[int, ...], first: int, last: int, low: int) -> list[Scan]:
    """All bits but the `low` last ones, then these one by one."""
    finer = [Scan(components, first, last, bit + 1, bit) for bit in reversed(range(low))]
    return [Scan(components, first, last, 0, low), *finer]


def together_or_not(rng: Random, scan: Scan, components: int) -> list[Scan]:
    if rng.random() < 0.5:
        return [replace(scan, components=tuple(range(components)))]
    return [replace(scan, components=(c,)) for c in rng.permutation(components).tolist()]


def random_code(rng: Random, symbols: list[int], spare: int = 1) -> tuple[bytes, Words]:
    """As a file defines it, and its words. spare: how many are left over, the last ones; none may be of ones alone."""
    lengths, power = [0], rng.choice([0.1, 1, 5])  # the larger it is, the more alike are the lengths
    for place in rng.random(len(symbols) + spare - 1) ** power:
        length = lengths.pop(int(place * bisect_left(lengths, 16))) + 1
        insort(lengths, length)
        insort(lengths, length)
    lengths, order = lengths[: len(symbols)], rng.permutation(symbols).tolist()
    words, word, previous = {}, 0, 0
    for symbol, length in zip(order, lengths, strict=True):
        word <<= length - previous
        words[symbol] = bits_of(word, length)
        word, previous = word + 1, length
    return bytes(map(lengths.count, range(1, 17))) + bytes(order), words


# --- How it is written


def bits_of(number: int, count: int) -> str:
    return f"{number:0{count}b}" if count else ""


def sized(value: int) -> tuple[int, str]:
    """How many bits a value has, and these."""
    size = abs(value).bit_length()
    return size, bits_of(value if value > 0 else value + (1 << size) - 1, size)


class Bits:
    """Of a scan, from one restart to the next. codes: by kind and component.

    haste: how often the end of a block is told at once, and not with those that follow.
    """

    def __init__(self, rng: Random, scan: Scan, codes: dict[tuple[int, int], Words], haste: float) -> None:
        self._rng, self._scan, self._codes, self._haste = rng, scan, codes, haste
        self._predictions = [0, 0, 0]
        self._ended, self._corrections = 0, ""  # of blocks whose end is not told so far

    def block(self, c: int, values: list[int]) -> str:
        """values: as far as they are told once the scan is."""
        dc = self._dc(c, values[0]) if self._scan.first == 0 else ""
        return dc + self._ac(c, values) if self._scan.last > 0 else dc

    def _dc(self, c: int, value: int) -> str:
        if self._scan.high > 0:
            return str(value & 1)
        size, bits = sized(value - self._predictions[c])
        self._predictions[c] = value
        return self._codes[DC, c][size] + bits

    def _ac(self, c: int, values: list[int]) -> str:
        first, end = max(self._scan.first, 1), self._scan.last + 1
        new = [i for i in range(first, end) if values[i] != 0 and not self._is_known(values[i])]
        rest = new[-1] + 1 if new else first
        parts, zeros, corrections = [], 0, ""
        for value in values[first:rest]:
            if self._is_known(value):
                corrections += str(value & 1)
            elif value == 0 and zeros < 15:
                zeros += 1
            else:
                size, bits = sized(value)
                parts += [self.end_run(c), self._codes[AC, c][zeros << 4 | size], bits, corrections]
                zeros, corrections = 0, ""
        if rest < end:
            self._ended += 1
            self._corrections += "".join(str(value & 1) for value in values[rest:end] if self._is_known(value))
            if self._ended == MOST_ENDED or self._rng.random() < self._haste:
                parts.append(self.end_run(c))
        return "".join(parts)

    def end_run(self, c: int) -> str:
        if self._ended == 0:
            return ""
        size = self._ended.bit_length() - 1
        told = self._codes[AC, c][size << 4] + bits_of(self._ended - (1 << size), size) + self._corrections
        self._ended, self._corrections = 0, ""
        return told

    def _is_known(self, value: int) -> bool:
        """By scans before this one."""
        return self._scan.high > 0 and abs(value) > 1


class JpegWriter:
    """A progressive file, unless the first scan tells all."""

    def __init__(self, rng: Random, picture: Picture, script: list[Scan], spare: tuple[int, int] = (1, 1)) -> None:
        """spare: words left over in codes of first coefficients, and of others."""
        self._rng, self._picture, self._script, self._spare = rng, picture, script, spare
        self._is_progressive = script[0].last == 0
        self._sof = 0xC2 if self._is_progressive else int(rng.choice([0xC0, 0xC1]))
        self._slots = 2 if self._sof == 0xC0 else 4
        self._codes: dict[tuple[int, int], Words] = {}  # by kind and slot
        self._is_jfif = rng.random() < 0.5  # else it is YCbCr because of its ids
        ids = rng.choice(256, 3, replace=False).tolist() if self._is_jfif else [1, 2, 3]
        self._ids = ids[: len(picture.blocks)]

    def file(self) -> bytes:
        jfif = segment(0xE0, b"JFIF\0\1\1\0\0\1\0\1\0\0") if self._is_jfif else b""
        steps = [segment(0xDB, bytes([c]) + steps) for c, steps in enumerate(self._picture.steps)]
        head = [b"\xff\xd8", jfif, *steps, segment(self._sof, self._frame())]
        return b"".join([*head, *map(self._scan, self._script), b"\xff\xd9"])

    def _frame(self) -> bytes:
        picture = self._picture
        across, down = picture.sampling or self._rng.integers(1, 5, 2).tolist()
        header = struct.pack(">BHHB", 8, picture.height, picture.width, len(self._ids))
        return header + b"".join(bytes([id, 0x11 if c else across << 4 | down, c]) for c, id in enumerate(self._ids))

    def _tables(self) -> bytes:
        """New codes, where there is none or chance will have one, for the next scan or not."""
        symbols = [DC_SYMBOLS, PROGRESSIVE_AC_SYMBOLS if self._is_progressive else AC_SYMBOLS]
        parts = []
        for kind, slot in product((DC, AC), range(self._slots)):
            if (kind, slot) not in self._codes or self._rng.random() < 0.15:
                code, self._codes[kind, slot] = random_code(self._rng, symbols[kind], self._spare[kind])
                parts.append(segment(0xC4, bytes([kind << 4 | slot]) + code))
        return b"".join(parts)

    def _scan(self, scan: Scan) -> bytes:
        rng, picture = self._rng, self._picture
        interval = int(rng.choice([0, 0, 1, 2, 3, 7, picture.blocks[-1].shape[1], 1000]))
        parts = [self._tables(), segment(0xDD, struct.pack(">H", interval))]
        slots = {c: rng.integers(self._slots, size=2).tolist() for c in scan.components}
        ids = [bytes([self._ids[c], dc << 4 | ac]) for c, (dc, ac) in slots.items()]
        progress = bytes([scan.first, scan.last, scan.high << 4 | scan.low])
        parts.append(segment(0xDA, b"".join([bytes([len(ids)]), *ids, progress])))
        codes = {(kind, c): self._codes[kind, slot] for c in slots for kind, slot in enumerate(slots[c])}
        values = {c: values_told(picture.blocks[c], scan.low) for c in scan.components}
        haste = rng.choice([0, 0.1, 0.5]) if self._is_progressive else 1
        mcus = picture.mcus(scan.components)
        length = interval or len(mcus)
        for i, begin in enumerate(range(0, len(mcus), length)):
            parts.append(bytes([0xFF, 0xD0 + (i - 1) % 8]) if i > 0 else b"")
            bits = Bits(rng, scan, codes, haste)
            blocks = [block for mcu in mcus[begin : begin + length] for block in mcu]
            told = [bits.block(c, values[c][y][x]) for c, y, x in blocks]
            parts.append(as_bytes("".join(told) + bits.end_run(scan.components[0])))
        return b"".join(parts)


def values_told(blocks: Blocks, low: int) -> list[list[list[int]]]:
    """Without the bits below `low`: first coefficients are rounded down, others towards 0."""
    values = np.sign(blocks) * (np.abs(blocks) >> low)
    values[..., 0] = blocks[..., 0] >> low
    return values.tolist()


def segment(marker: int, data: bytes) -> bytes:
    return bytes([0xFF, marker]) + struct.pack(">H", len(data) + 2) + data


def as_bytes(bits: str) -> bytes:
    bits += "1" * (-len(bits) % 8)
    return int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")


def random_jpeg(rng: Random, width: int, height: int, sampling: Sampling, is_progressive: bool) -> bytes:
    picture = random_picture(rng, width, height, sampling)
    components = len(picture.blocks)
    script = random_script(rng, components) if is_progressive else [Scan(tuple(range(components)))]
    return JpegWriter(rng, picture, script).file()
