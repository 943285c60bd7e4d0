"""Edit lists: the frames of a trimmed clip are those that a full decode shows, by FFmpeg's own reading of the list."""

from __future__ import annotations

import io

import av
import numpy as np
import pytest
from clips import FRAMES, X265, decode_all, encode, moving
from edit_lists import NOTHING, Edit, media_start, with_edits
from numpy.typing import NDArray

from rtp_mm.errors import WrongFormatError
from rtp_mm.media.clip import ClipLimits
from rtp_mm.media.video import open_video, open_video_header

LIMITS = ClipLimits(max_pixels=10**8, max_seconds=1000, max_animation_pixels=0)
FRAME = 1 / 24  # seconds; a key frame every 10 frames
Pixels = NDArray[np.uint8]

# codec, encoder's options, muxer's
KINDS = {
    "h264": ("libx264", {"bf": "3", "x264-params": "b-pyramid=normal"}, {}),
    "h264, open groups": ("libx264", {"x264-params": "open-gop=1:bframes=3"}, {}),
    "h264, negative dts": ("libx264", {"bf": "3"}, {"movflags": "negative_cts_offsets"}),
    "h264, no B-frames": ("libx264", {"bf": "0"}, {}),
    "hevc": ("libx265", {"x265-params": X265}, {}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}, {}),
    "mpeg4": ("mpeg4", {"bf": "2"}, {}),
    "mjpeg": ("mjpeg", {}, {}),
}
# How long, from which frame; each has the number of frames shown, and the first and last of them among all.
TRIMS: dict[str, tuple[list[tuple[float, float]], int, int, int]] = {
    "start in the middle of a group": ([(41, 7)], 41, 7, 47),
    "start at a key frame": ([(38, 10)], 38, 10, 47),
    "start between frames": ([(41, 6.5)], 41, 7, 47),
    "start late": ([(5, 43)], 5, 43, 47),
    "end": ([(30, 0)], 30, 0, 29),
    "both": ([(20, 13)], 20, 13, 32),
    "nothing at first": ([(24, NOTHING), (48, 0)], 48, 0, 47),
    "nothing at first, then trimmed": ([(24, NOTHING), (24, 7)], 24, 7, 30),
    "longer than the media": ([(900, 7)], 41, 7, 47),
}
CUTS: dict[str, list[tuple[float, float]]] = {
    "two parts": [(10, 5), (10, 30)],
    "two parts from key frames": [(10, 0), (10, 20)],
    "backwards": [(10, 30), (10, 5)],
    "overlapping": [(20, 5), (10, 15)],
    "twice the same": [(10, 20), (10, 20)],
    "three parts": [(5, 3), (5, 13), (5, 33)],
}


@pytest.fixture(scope="module", params=KINDS)
def clip(request: pytest.FixtureRequest, photos: dict[str, Pixels]) -> bytes:
    codec, options, muxer = KINDS[request.param]
    return encode(moving(photos["chelsea"]), codec, "mp4", options, muxer=muxer)


@pytest.fixture(scope="module")
def plain(photos: dict[str, Pixels]) -> bytes:
    return encode(moving(photos["chelsea"]), options={"x264-params": "bframes=2:b-adapt=0:scenecut=0:b-pyramid=none"})


def trimmed(data: bytes, frames: list[tuple[float, float]]) -> bytes:
    start = media_start(data)
    edits: list[Edit] = [
        (length * FRAME, NOTHING if first == NOTHING else start + first * FRAME) for length, first in frames
    ]
    return with_edits(data, edits)


def shown_at(data: bytes) -> list[float]:
    """Seconds of each frame that FFmpeg shows."""
    with av.open(io.BytesIO(data)) as container:
        return [float(frame.time or 0) for frame in container.decode(video=0)]


def check_all_ways(data: bytes) -> list[Pixels]:
    """Every frame that FFmpeg shows, after a check that all together, and each alone, are the same for us."""
    expected = decode_all(data)
    with open_video(data, LIMITS) as clip:
        assert clip.frames == len(expected)
        assert clip.fps == 24
        assert all(map(np.array_equal, clip.read(range(clip.frames)), expected))
        for index in range(0, clip.frames, 7):
            [frame] = clip.read([index])
            assert np.array_equal(frame, expected[index])
    return expected


@pytest.mark.parametrize("trim", TRIMS)
def test_frames_of_a_trimmed_clip_are_those_that_are_shown(trim: str, clip: bytes) -> None:
    edits, count, first, last = TRIMS[trim]
    frames = check_all_ways(trimmed(clip, edits))
    whole = decode_all(clip)
    assert len(frames) == count
    assert np.array_equal(frames[0], whole[first])
    assert np.array_equal(frames[-1], whole[last])


@pytest.mark.parametrize("cut", CUTS)
def test_frames_of_a_cut_clip_are_those_that_are_shown(cut: str, clip: bytes) -> None:
    assert 0 < len(check_all_ways(trimmed(clip, CUTS[cut]))) < FRAMES


@pytest.mark.parametrize("trim", TRIMS)
def test_frames_of_a_trimmed_clip_come_at_their_times(trim: str, clip: bytes) -> None:
    """Frame i is shown i / fps after the first, which is what the model is told."""
    times = shown_at(trimmed(clip, TRIMS[trim][0]))
    assert np.allclose(np.diff(times), FRAME, atol=1e-3)


def test_what_is_hidden_is_decoded_only_where_a_chosen_frame_needs_it(plain: bytes) -> None:
    """Key frames at 0, 10, 20, 30, 40; from each of them frames 3, 6, 9 are referred to."""

    def decoded(data: bytes, index: int) -> int:
        with open_video(data, LIMITS) as clip:
            list(clip.read([index]))
            return clip.decoded

    from_7 = trimmed(plain, [(30, 7)])  # shows 7 to 36
    assert decoded(from_7, 0) == 1 + 5  # 0, 3, 6, 9 and 7, which lies between
    assert decoded(from_7, 13) == 1 + 1  # 20
    assert decoded(from_7, 29) == 1 + 3  # 30, 33, 36


def test_a_trimmed_clip_is_turned_as_the_container_says(photos: dict[str, Pixels]) -> None:
    """Its first packet, which tells, is hidden."""
    data = trimmed(encode(moving(photos["chelsea"]), rotation=90), [(41, 7)])
    with open_video(data, LIMITS) as clip:
        [frame] = clip.read([3])
        assert (clip.height, clip.width) == frame.shape[:2] == (112, 80)
    assert np.array_equal(frame, np.rot90(decode_all(data)[3]))


@pytest.mark.parametrize(("trim", "is_indexed"), [("both", False), ("end", False), ("nothing at first", True)])
def test_other_decoders_are_told_of_hidden_packets(trim: str, is_indexed: bool, plain: bytes) -> None:
    """They would count them."""
    with open_video_header(trimmed(plain, TRIMS[trim][0]), LIMITS) as (header, _):
        assert header.is_indexed == is_indexed


def test_a_clip_of_which_nothing_is_shown_is_refused(plain: bytes) -> None:
    data = trimmed(plain, [(0, 7)])
    assert decode_all(data) == []
    with pytest.raises(WrongFormatError, match="without frames"), open_video(data, LIMITS):
        pass
