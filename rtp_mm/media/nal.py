"""What a packet of H.264 or HEVC is for other frames, read from its NAL headers: what may be skipped, where decoding
may start. Sources: ITU-T H.264 (7.3.1, 7.4.1, D.2.8), H.265 (7.3.1.2, 7.4.2.2), ISO/IEC 14496-15 (avcC, hvcC).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

_START_CODE = b"\0\0\1"
_SEI_RECOVERY_POINT = 6


@dataclass(frozen=True, slots=True)
class NalReader:
    """How the packets of one stream are cut: `length_size` bytes before each NAL unit, or 0: start codes."""

    is_hevc: bool
    length_size: int
    has_one_layer: bool  # HEVC's temporal layers: with more, a frame that its own layer does not need serves others

    @classmethod
    def of(cls, codec: str, extradata: bytes | None) -> NalReader | None:
        """`None` for other codecs, about whose packets nothing is said."""
        extradata = extradata or b""
        if codec == "h264":
            is_avcc = len(extradata) > 6 and extradata[0] == 1
            return cls(False, (extradata[4] & 3) + 1 if is_avcc else 0, True)
        if codec == "hevc":
            is_hvcc = len(extradata) > 22 and extradata[0] == 1
            layers = extradata[21] >> 3 & 7 if is_hvcc else 0  # 0: unknown
            return cls(True, (extradata[21] & 3) + 1 if is_hvcc else 0, layers == 1)
        return None

    def is_unreferenced(self, packet: memoryview) -> bool:
        """Whether no other frame is predicted from this one."""
        slices = False
        for unit in self._units(packet):
            if self.is_hevc:
                kind = unit[0] >> 1 & 0x3F
                if kind < 32:  # a slice: of a sub-layer non-reference picture where even and up to 14
                    slices = True
                    if kind > 14 or kind & 1 or not self.has_one_layer or unit[1] & 7 != 1:
                        return False
            elif 1 <= unit[0] & 0x1F <= 5:
                slices = True
                if unit[0] & 0x60:  # nal_ref_idc
                    return False
        return slices

    def is_entry(self, packet: memoryview) -> bool:
        """Whether a decoder that starts at this key frame gives it, and all that is shown after it, exactly.

        HEVC's key frames are entries. H.264's are where they are IDR pictures, or recovery points that need no frames
        to recover and promise an exact match.
        """
        if self.is_hevc:
            return True
        for unit in self._units(packet):
            kind = unit[0] & 0x1F
            if kind == 5 or (kind == _SEI_RECOVERY_POINT and _is_exact_recovery(bytes(unit[1:]))):
                return True
        return False

    def _units(self, packet: memoryview) -> Iterator[memoryview]:
        """NAL units of at least two bytes; ends early in a broken packet."""
        if self.length_size == 0:
            yield from _between_start_codes(packet)
            return
        start = 0
        while start + self.length_size < len(packet):
            size = int.from_bytes(packet[start : start + self.length_size], "big")
            start += self.length_size
            if size >= 2:
                yield packet[start : start + size]
            start += size


def _between_start_codes(packet: memoryview) -> Iterator[memoryview]:
    content = bytes(packet)
    at = content.find(_START_CODE)
    while at >= 0:
        following = content.find(_START_CODE, at + 3)
        if len(unit := packet[at + 3 : following if following >= 0 else len(packet)]) >= 2:
            yield unit
        at = following


def _is_exact_recovery(sei: bytes) -> bool:
    """A recovery point message: recovery_frame_cnt, in Exp-Golomb code, 0 (one bit, set) and exact_match_flag set."""
    at = 0
    while at + 2 < len(sei):
        numbers = []
        for _ in range(2):  # payload type and size, each a run of 255s and a last byte
            number = 0
            while at < len(sei) and sei[at] == 255:
                number, at = number + 255, at + 1
            number, at = number + (sei[at] if at < len(sei) else 0), at + 1
            numbers.append(number)
        kind, size = numbers
        if kind == _SEI_RECOVERY_POINT:
            return at < len(sei) and sei[at] & 0xC0 == 0xC0
        at += size
    return False
