"""Where a video's frames are, told from its packets without decoding any: when each is shown, where decoding may start,
which packets chosen frames need.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.nal import NalReader

if TYPE_CHECKING:
    from av.packet import Packet

_LONGEST_NOT_CODED = 19  # bytes of a frame of MPEG-4 that shows nothing, as FFmpeg's decoder has it
MAX_PACKETS = 1 << 21  # 19 hours at 30 frames a second; their index takes 325 MiB


@dataclass(slots=True)
class Run:
    """Packets to decode without a break for the frames at `times`: from one where decoding may start, which the demuxer
    finds at `seek_time`, to the last. `first` and `last` are places in the order of decoding.
    """

    first: int
    last: int
    seek_time: int | None
    times: list[int]


class PacketIndex:
    """Of a stream, by one pass over its packets. A packet is known by its time, in the stream's unit.

    start:      no packet is earlier.
    shown:      when each frame is shown, ascending; what an edit list hides is left out.
    is_trimmed: some packets are hidden.
    is_exact:   a decoder shows these frames at these times. Else packets do not tell: some have no time, or the same,
                decoding cannot start at the first, or frames are hidden between others, or some may show nothing.
    """

    def __init__(self, packets: Iterable[Packet[Any]], codec: str, nal: NalReader | None) -> None:
        """Of a stream of `codec`, as FFmpeg names it. Raises `WrongFormatError` for more than `MAX_PACKETS`."""
        self._nal = nal
        self.start = 0
        self._times = array("q")  # by place
        self._entries: list[int] = []  # places where decoding may start
        self._seek_times: list[int | None] = []  # of each entry, by the demuxer's index
        is_shown = array("b")
        is_timed = True
        for packet in packets:
            if not self._times:
                self.start = min(time for time in (0, packet.pts, packet.dts) if time is not None)
            if packet.is_keyframe and (nal is None or nal.is_entry(memoryview(packet))):
                self._entries.append(len(self._times))
                self._seek_times.append(packet.pts if packet.dts is None else packet.dts)
            is_timed = is_timed and packet.pts is not None and not _may_show_nothing(packet, codec)
            self._times.append(packet.pts or 0)
            is_shown.append(not packet.is_discard)
            if len(self._times) > MAX_PACKETS:
                raise WrongFormatError(f"a video of more than {MAX_PACKETS} frames")
        times, shown = np.array(self._times, np.int64), np.array(is_shown, bool)
        self.shown: list[int] = np.sort(times[shown]).tolist()
        self.is_trimmed = len(self.shown) < len(times)
        self.is_exact = is_timed and self._entries[:1] == [0] and self._is_whole(times, times[~shown])

    def _is_whole(self, times: np.ndarray, hidden: np.ndarray) -> bool:
        """Whether no two times are equal, and none of those hidden is between those shown."""
        if not self.shown or (np.diff(np.sort(times)) == 0).any():
            return False
        first, last = self.shown[0], self.shown[-1]
        return times[0] <= first and not ((first < hidden) & (hidden < last)).any()

    @cached_property
    def _places(self) -> dict[int, int]:
        return {time: place for place, time in enumerate(self._times)}

    def runs(self, times: Iterable[int]) -> list[Run]:
        """What to decode for the frames shown at these times; past other entries where that leaves nothing out."""
        runs: list[Run] = []
        for time in times:
            place = self._places[time]
            entry = self._entry_for(place, time)
            first = self._entries[entry]
            if runs and first <= runs[-1].last + 1:
                runs[-1].times.append(time)
                runs[-1].last = max(place, runs[-1].last)
            else:
                runs.append(Run(first, place, self._seek_times[entry], [time]))
        return runs

    def _entry_for(self, place: int, time: int) -> int:
        """The last entry from which a decoder gives this frame: what is shown before an entry may need more."""
        entry = bisect_right(self._entries, place) - 1
        while self._times[self._entries[entry]] > time:
            entry -= 1
        return entry

    def is_before(self, packet: Packet[Any], run: Run) -> bool:
        """Whether a reader at this packet comes to all of the run."""
        return packet.pts is not None and self._places.get(packet.pts, len(self._places)) <= run.first

    def needed(self, run: Run, packets: Iterable[Packet[Any]]) -> Iterator[Packet[Any]]:
        """Those of a run, out of packets from its first or from before it, without those that serve nothing."""
        wanted = set(run.times)
        is_under_way = False
        for packet in packets:
            place = None if packet.pts is None else self._places.get(packet.pts)
            if place is None or place < run.first:
                if is_under_way:
                    yield packet  # is shown never, but others may refer to it
                continue
            is_under_way = True
            if packet.pts in wanted or self._nal is None or not self._nal.is_unreferenced(memoryview(packet)):
                yield packet
            if place >= run.last:
                return


def _may_show_nothing(packet: Packet[Any], codec: str) -> bool:
    """As VP8's alternate references, whose show_frame is 0 (RFC 6386, 9.1), and MPEG-4's frames that are not coded."""
    if codec == "vp8":
        return packet.size == 0 or not memoryview(packet)[0] & 0x10
    return codec == "mpeg4" and packet.size <= _LONGEST_NOT_CODED
