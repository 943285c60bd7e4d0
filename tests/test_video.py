"""Videos: the frames that were asked for are those of a full decode, at the least cost, and bad files are refused."""

from __future__ import annotations

import io
import random
import struct
from collections.abc import Callable, Sequence

import av
import numpy as np
import pytest
from clips import FRAMES, KINDS, X265, decode_all, encode, moving, packed_divx, rewritten, sound_only, spliced
from numpy.typing import NDArray

from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.clip import ClipLimits
from rtp_mm.media.video import CODECS, open_video, open_video_header

LIMITS = ClipLimits(max_pixels=10**8, max_seconds=1000, max_animation_pixels=0)
Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def frames(photos: dict[str, Pixels]) -> list[Pixels]:
    return moving(photos["chelsea"])


@pytest.fixture(scope="module")
def plain(frames: list[Pixels]) -> bytes:
    """H.264 in mp4: key frames every 10 frames, two of three frames in between referred to by nothing."""
    return encode(frames, options={"x264-params": "bframes=2:b-adapt=0:scenecut=0:b-pyramid=none"})


def choices() -> list[list[int]]:
    chance = random.Random(0)
    some = [sorted(chance.sample(range(FRAMES), n)) for n in (2, 8)]
    return [[0], [FRAMES - 1], [9, 10, 11], [*range(FRAMES)], *some]


def read(data: bytes, indices: Sequence[int]) -> tuple[list[Pixels], int]:
    with open_video(data, LIMITS) as clip:
        return list(clip.read(indices)), clip.decoded


@pytest.mark.parametrize("kind", KINDS)
def test_chosen_frames_are_those_of_a_full_decode(kind: str, frames: list[Pixels]) -> None:
    codec, container, options = KINDS[kind]
    data = encode(frames, codec, container, options)
    expected = decode_all(data)
    with open_video(data, LIMITS) as clip:
        assert clip.frames == len(expected) == FRAMES
        assert clip.fps == 24
        for indices in choices():
            got = list(clip.read(indices))
            assert [next(i for i, e in enumerate(expected) if np.array_equal(g, e)) for g in got] == indices


@pytest.mark.parametrize("container", ["avi", "mov", "asf"])
def test_key_frames_of_h263_are_not_those_that_avi_tells(container: str, photos: dict[str, Pixels]) -> None:
    """There FFmpeg marks every packet as one. H.263 has five sizes, of which this is one."""
    data = encode(moving(photos["chelsea"], 24, 176, 144), "h263", container)
    expected = decode_all(data)
    for indices in ([23], [3, 12], [*range(24)]):
        assert all(map(np.array_equal, read(data, indices)[0], [expected[index] for index in indices]))
    assert read(data, [23])[1] == (24 + 24 if container == "avi" else 1 + 24 - 14)


def test_a_program_stream_is_decoded_from_its_start(frames: list[Pixels]) -> None:
    """Behind a seek FFmpeg gives its frames the times of others."""
    data = encode(frames[:30], "libx265", "mpeg", {"x265-params": f"{X265}:keyint=1:repeat-headers=1"})
    assert all(np.array_equal(read(data, [index])[0][0], decode_all(data)[index]) for index in (0, 15, 28, 29))


@pytest.mark.parametrize("pixel_format", ["yuv420p", "yuv444p"])
@pytest.mark.parametrize("container", ["flv", "mpegts", "mpeg", "avi", "mp4", "matroska", "asf"])
def test_a_single_frame_is_found_again(container: str, pixel_format: str, frames: list[Pixels]) -> None:
    """Of some containers FFmpeg cannot seek to the time of an only frame."""
    data = encode(frames[:1], "libx264", container, {"pixel_format": pixel_format})
    assert np.array_equal(read(data, [0])[0], decode_all(data))


def test_a_stream_that_cannot_be_sought_in_is_read_from_its_start(frames: list[Pixels]) -> None:
    """FFmpeg finds no place in one of two frames that has sound too."""
    data = encode(frames[:2], "libx264", "mpegts", {"x264-params": "keyint=1"}, group=1, with_sound=True)
    assert all(map(np.array_equal, read(data, [1])[0], decode_all(data)[1:]))


def test_no_two_frames_of_these_clips_are_equal(plain: bytes) -> None:
    """Else the test above would not notice a frame taken for another."""
    assert len({frame.tobytes() for frame in decode_all(plain)}) == FRAMES


def test_only_what_the_chosen_frames_need_is_decoded(plain: bytes) -> None:
    """Key frames at 0, 10, 20, 30, 40; from each of them frames 3, 6, 9 are referred to. One frame more, the first, is
    always decoded.
    """
    assert read(plain, [0])[1] == 1 + 1
    assert read(plain, [20])[1] == 1 + 1
    assert read(plain, [26])[1] == 1 + 3  # 20, 23, 26
    assert read(plain, [25])[1] == 1 + 4  # and 25, which lies between
    assert read(plain, [10, 30])[1] == 1 + 2
    assert read(plain, range(FRAMES))[1] == 1 + FRAMES


def test_a_variable_frame_rate_is_read_by_index(frames: list[Pixels]) -> None:
    steps = [1, 5, 2, 9]
    times = [sum(steps[j % 4] for j in range(i)) for i in range(FRAMES)]
    data = encode(frames, times=times)
    expected = decode_all(data)
    with open_video(data, LIMITS) as clip:
        assert clip.frames == FRAMES
        assert clip.fps == pytest.approx(24 * FRAMES / (times[-1] + 9), rel=0.1)
        for index, frame in zip([3, 17, 40], clip.read([3, 17, 40]), strict=True):
            assert np.array_equal(frame, expected[index])


@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_frames_are_turned_as_the_container_says(degrees: int, frames: list[Pixels]) -> None:
    data = encode(frames, rotation=degrees)
    with open_video(data, LIMITS) as clip:
        [frame] = clip.read([7])
        assert (clip.height, clip.width) == frame.shape[:2]
    assert np.array_equal(frame, np.rot90(decode_all(data)[7], degrees // 90))


ONE = 1 << 16


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-ONE, 0, 0, ONE), lambda frame: frame[:, ::-1]),
        ((ONE, 0, 0, -ONE), lambda frame: frame[::-1]),
        ((0, ONE, ONE, 0), lambda frame: frame.swapaxes(0, 1)),
        ((0, -ONE, -ONE, 0), lambda frame: frame.swapaxes(0, 1)[::-1, ::-1]),
    ],
    ids=["left to right", "upside down", "along one diagonal", "along the other"],
)
def test_frames_are_mirrored_as_the_container_says(
    matrix: tuple[int, int, int, int], shown: Callable[[Pixels], Pixels], plain: bytes
) -> None:
    """x' = a x + c y, y' = b x + d y. FFmpeg's angle says nothing of it: a mirror alone would be half a turn."""
    a, b, c, d = matrix
    at = plain.index(b"tkhd") + 4 + 40
    data = plain[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + plain[at + 36 :]
    with open_video(data, LIMITS) as clip:
        [frame] = clip.read([7])
        assert (clip.height, clip.width) == frame.shape[:2]
    assert np.array_equal(frame, shown(decode_all(plain)[7]))
    with open_video_header(data, LIMITS) as (header, _):
        assert header.turn, "which is not for a device's decoder"


@pytest.mark.parametrize("container", ["avi", "matroska"])
def test_frames_that_share_a_packet_are_each_shown(container: str, frames: list[Pixels]) -> None:
    data = packed_divx(frames, container)
    expected = decode_all(data)
    assert len(expected) == FRAMES
    with open_video(data, LIMITS) as clip:
        assert clip.frames == FRAMES
        for indices in choices():
            assert all(map(np.array_equal, clip.read(indices), [expected[i] for i in indices]))


SILENT = (10, 25, 40)  # packets that show nothing


def hidden_vp8(number: int, packet: bytes) -> bytes:
    """As an alternate reference: show_frame is 0."""
    return bytes([packet[0] & ~0x10]) + packet[1:] if number in SILENT else packet


def not_coded_mpeg4(number: int, packet: bytes) -> bytes:
    """A P-frame, vop_coded 0, as DivX wrote it where a picture stayed as it was."""
    if number not in SILENT or packet[4] >> 6 != 1:
        return packet
    bits = int.from_bytes(packet[4:8], "big") & ~(1 << 21)
    return packet[:4] + (bits >> 16).to_bytes(2, "big") + b"\x7f"


@pytest.mark.parametrize(
    ("codec", "container", "change"),
    [
        ("libvpx", "webm", hidden_vp8),
        ("libvpx", "matroska", hidden_vp8),
        ("mpeg4", "avi", not_coded_mpeg4),
        ("mpeg4", "matroska", not_coded_mpeg4),
    ],
)
def test_packets_that_show_nothing_are_no_frames(
    codec: str, container: str, change: Callable[[int, bytes], bytes], frames: list[Pixels]
) -> None:
    data = rewritten(encode(frames, codec, container, {}), container, change)
    expected = decode_all(data)
    assert len(expected) < FRAMES
    with open_video(data, LIMITS) as clip:
        assert clip.frames == len(expected)
        for indices in ([0], [9, 10, 11], [*range(len(expected))], [len(expected) - 1]):
            assert all(map(np.array_equal, clip.read(indices), [expected[i] for i in indices]))


@pytest.mark.parametrize(
    "flags", ["frag_keyframe+empty_moov", "frag_every_frame+empty_moov", "dash", "cmaf+delay_moov", "hybrid_fragmented"]
)
def test_fragments_are_read_as_one_file(flags: str, frames: list[Pixels]) -> None:
    data = encode(frames, options={"bf": "3"}, muxer={"movflags": flags})
    expected = decode_all(data)
    with open_video(data, LIMITS) as clip:
        assert (clip.frames, clip.fps) == (FRAMES, 24)
        for indices in choices():
            assert all(map(np.array_equal, clip.read(indices), [expected[i] for i in indices]))


@pytest.mark.parametrize("name", CODECS)
def test_decoders_are_named_as_ffmpeg_names_them(name: str) -> None:
    """A codec's name, msmpeg4v3, may find another: a stream would not be known by it."""
    assert av.codec.Codec(name, "r").name == name


def test_a_singular_display_matrix_turns_nothing(plain: bytes) -> None:
    """Some muxers write zeros. FFmpeg's angle of that is no number."""
    matrix = plain.index(b"tkhd") + 4 + 40
    with open_video(plain[:matrix] + bytes(36) + plain[matrix + 36 :], LIMITS) as clip:
        assert (clip.width, clip.height) == (112, 80)
        [frame] = clip.read([7])
    assert np.array_equal(frame, decode_all(plain)[7])


def test_sound_beside_a_video_is_ignored(frames: list[Pixels]) -> None:
    data = encode(frames, with_sound=True)
    assert np.array_equal(read(data, [5])[0][0], decode_all(data)[5])


@pytest.mark.parametrize("start", [1, 13])
def test_a_stream_that_starts_anywhere_is_what_a_decoder_makes_of_it(start: int, frames: list[Pixels]) -> None:
    """A transport stream cut before its first key frame."""
    data = encode(frames, "libx264", "mpegts", {"bf": "2"})
    cut = data[188 * start * 8 :]
    expected = decode_all(cut)
    assert 0 < len(expected) <= FRAMES
    with open_video(cut, LIMITS) as clip:
        assert clip.frames == len(expected)
        assert all(map(np.array_equal, clip.read(range(clip.frames)), expected))


# --- what is refused


def test_thousands_of_streams_are_called_so(plain: bytes) -> None:
    """And not a want of memory, which is all that FFmpeg says of them."""
    moov = plain.index(b"moov") - 4
    trak = plain.index(b"trak") - 4
    length = int.from_bytes(plain[trak : trak + 4], "big")
    copies = plain[trak : trak + length] * 3000
    size = int.from_bytes(plain[moov : moov + 4], "big") + len(copies)
    data = plain[:moov] + size.to_bytes(4, "big") + plain[moov + 4 : trak] + copies + plain[trak:]
    with pytest.raises(WrongFormatError, match="over 64 streams"), open_video(data, LIMITS):
        pass


def test_a_packet_that_says_it_is_larger_than_memory_is_called_broken(plain: bytes) -> None:
    """And not a want of memory, for which a worker would be replaced."""
    sizes = plain.index(b"stsz") + 16 + 4 * 4  # of which this is the fifth
    data = plain[:sizes] + (1 << 29).to_bytes(4, "big") + plain[sizes + 4 :]
    with pytest.raises(WrongFormatError, match="a packet that is larger than memory"), open_video(data, LIMITS):
        pass


def test_a_file_without_video_is_refused() -> None:
    with (
        pytest.raises(WrongFormatError, match="no video in this file, it holds audio"),
        open_video(sound_only(), LIMITS),
    ):
        pass


def test_a_file_without_key_frames_is_called_so(frames: list[Pixels]) -> None:
    """And not an operation that is not permitted, which is what FFmpeg's -1 reads as."""
    file = io.BytesIO()
    with (
        av.open(io.BytesIO(encode(frames, "mpeg4", "matroska"))) as whole,
        av.open(file, "w", format="matroska") as rest,
    ):
        stream = rest.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size and not packet.is_keyframe:
                packet.stream = stream
                rest.mux(packet)
    with pytest.raises(WrongFormatError, match="no key frame"), open_video(file.getvalue(), LIMITS):
        pass


@pytest.mark.parametrize("share", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(share: float, plain: bytes) -> None:
    data = plain[: int(len(plain) * share)]  # the index of this mp4 is at its end
    with pytest.raises(WrongFormatError, match="broken video"):
        read(data, [40])


SPLICED = {  # codec, a container that keeps its headers among the packets, the encoder's options, containers for both
    "h264": ("libx264", "mpegts", {"bf": "0", "x264-params": "repeat-headers=1"}, ("mp4", "mov", "matroska", "mpegts")),
    "hevc": ("libx265", "mpegts", {"x265-params": f"{X265}:bframes=0:repeat-headers=1"}, ("mp4", "matroska")),
    "vp9": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}, ("webm", "mp4")),
    "vp8": ("libvpx", "webm", {"deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}, ("webm",)),
    "mpeg4": ("mpeg4", "avi", {}, ("avi", "mp4", "matroska")),
    "mjpeg": ("mjpeg", "avi", {}, ("avi", "mov", "matroska")),
}


@pytest.fixture(scope="module", params=SPLICED)
def two_sizes(request: pytest.FixtureRequest, photos: dict[str, Pixels]) -> tuple[bytes, bytes, Sequence[str]]:
    """A small clip and a large one, and containers for a stream of both."""
    codec, container, options, containers = SPLICED[request.param]
    sizes = ((64, 48), (320, 240))
    small, large = (encode(moving(photos["chelsea"], 6, *size), codec, container, options) for size in sizes)
    return small, large, containers


def test_frames_that_change_their_size_come_as_they_are(two_sizes: tuple[bytes, bytes, Sequence[str]]) -> None:
    *clips, containers = two_sizes
    for container in containers:
        for first, second in (clips, clips[::-1]):
            expected = [*decode_all(first), *decode_all(second)]
            got, _ = read(spliced(first, [first, second], container), range(12))
            assert len(got) == 12
            assert all(map(np.array_equal, got, expected))


def test_frames_that_are_larger_than_the_container_says_are_refused(
    two_sizes: tuple[bytes, bytes, Sequence[str]],
) -> None:
    """From the first on, or later."""
    small, large, containers = two_sizes
    limits = ClipLimits(max_pixels=64 * 48, max_seconds=10, max_animation_pixels=0)
    for container in containers:
        for parts in ([large], [small, large]):
            data = spliced(small, parts, container)
            with pytest.raises(WrongFormatError, match=r"320x240 is .*MM_MAX_PIXELS"), open_video(data, limits) as clip:
                list(clip.read(range(clip.frames)))


def test_damage_in_the_chosen_frames_is_an_error_or_a_picture_never_a_crash(plain: bytes) -> None:
    chance = random.Random(3)
    for _ in range(30):
        damaged = bytearray(plain)
        for _ in range(20):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        try:
            with open_video(bytes(damaged), LIMITS) as clip:
                assert all(frame.ndim == 3 for frame in clip.read([*range(0, clip.frames, 13)]))
        except (WrongFormatError, NotSupportedError, MemoryError):
            pass


@pytest.mark.parametrize("data", [b"", b"not a video at all", b"\0" * 4096, b"\x1a\x45\xdf\xa3" + b"\xff" * 100])
def test_no_video_is_refused(data: bytes) -> None:
    with pytest.raises(WrongFormatError), open_video(data, LIMITS):
        pass


def test_playlists_are_not_followed(tmp_path: object) -> None:
    """FFmpeg would open what they name: other files, other hosts."""
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"
    concat = b"ffconcat version 1.0\nfile '/etc/passwd'\n"
    for data in (playlist, concat):
        with pytest.raises(WrongFormatError, match="broken video"), open_video(data, LIMITS):
            pass


def test_limits_come_before_decoding(plain: bytes) -> None:
    with pytest.raises(WrongFormatError, match="MM_MAX_PIXELS"), open_video(plain, ClipLimits(112 * 80 - 1, 1000, 0)):
        pass
    with pytest.raises(WrongFormatError, match="MM_MAX_VIDEO_SECONDS"), open_video(plain, ClipLimits(10**6, 1, 0)):
        pass
    with open_video(plain, ClipLimits(112 * 80, 2, 0)) as clip:
        assert clip.decoded <= 1
