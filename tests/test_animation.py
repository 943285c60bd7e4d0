"""Animations: what their headers say is what Pillow finds in them, or the file is refused."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from animations import RANDOM, animate, by_pillow, png_chunk, riff_chunk
from clips import moving
from mutations import mutated
from numpy.typing import NDArray
from PIL import Image

from rtp_mm import _core
from rtp_mm.errors import WrongFormatError
from rtp_mm.media.animation import open_animation
from rtp_mm.media.clip import ClipLimits
from rtp_mm.media.image import decode
from rtp_mm.media.probe import probe

LIMITS = ClipLimits(max_pixels=10**6, max_seconds=10**9, max_animation_pixels=10**9)
SIZE = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0))  # 4x4, grey
Pixels = NDArray[np.uint8]


def png_file(*chunks: bytes) -> bytes:
    return b"".join((b"\x89PNG\r\n\x1a\n", *chunks, png_chunk(b"IEND", b"")))


def apng_frame(number: int) -> bytes:
    """Its header, of 4x4 pixels for 0.1 s."""
    return png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 4, 4, 0, 0, 1, 10, 0, 0))


def by_headers(data: bytes) -> tuple[tuple[int, int], list[float], list[Pixels]]:
    milliseconds = _core.animation(data)[2].tolist()
    with open_animation(data, LIMITS) as clip:
        assert clip.frames == len(milliseconds)
        return (clip.width, clip.height), milliseconds, list(clip.read(range(clip.frames)))


def is_same(ours: Any, theirs: Any) -> bool:
    return ours[:2] == theirs[:2] and len(ours[2]) == len(theirs[2]) and all(map(np.array_equal, ours[2], theirs[2]))


def avif(rng: np.random.Generator) -> bytes:
    frames = [rng.integers(0, 256, (16, 24, 3), np.uint8) for _ in range(rng.integers(1, 6))]
    return animate(frames, "AVIF", rng.integers(1, 3000, len(frames)).tolist(), speed=10)


MAKERS = {**RANDOM, "AVIF": avif}


@pytest.fixture(scope="module")
def frames(photos: dict[str, Pixels]) -> list[Pixels]:
    return moving(photos["chelsea"])


# --- what headers say


@pytest.mark.parametrize("kind", MAKERS)
def test_frames_and_times_are_pillows(kind: str) -> None:
    compared, count = 0, 10 if kind == "AVIF" else 120
    for seed in range(count):
        data = MAKERS[kind](np.random.default_rng(seed))
        try:
            expected = by_pillow(data)
        except ValueError as error:
            assert "no palette" in str(error), "Pillow wants one for the transparent index of a grey GIF"  # noqa: PT017
            continue
        assert is_same(by_headers(data), expected), seed
        compared += 1
    assert compared >= 0.9 * count


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_animation_is_what_pillow_makes_of_it_or_refused(kind: str) -> None:
    accepted = refused = 0
    for seed in range(40 if kind == "AVIF" else 200):
        rng = np.random.default_rng(seed)
        data = mutated(MAKERS[kind](rng), rng)
        try:
            ours = by_headers(data)
        except (ValueError, WrongFormatError):
            refused += 1
            continue
        assert is_same(ours, by_pillow(data)), seed
        accepted += 1
    assert accepted > 0
    assert refused > 0


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF"])
def test_animations_are_clips(kind: str, frames: list[Pixels]) -> None:
    with open_animation(animate(frames[:10], kind, 50), LIMITS) as clip:
        assert (clip.frames, clip.fps) == (10, 20)
        got = list(clip.read([2, 9]))
    tolerance = 0 if kind != "GIF" else 60  # a palette of 256 colours
    assert all(np.abs(g.astype(int) - frames[i]).mean() <= tolerance for g, i in zip(got, [2, 9], strict=True))
    assert clip.decoded == 10


def test_frames_of_an_animation_may_last_differently(frames: list[Pixels]) -> None:
    with open_animation(animate(frames[:4], "GIF", [100, 200, 300, 400]), LIMITS) as clip:
        assert clip.fps == 4


def test_frames_that_are_hardly_shown_are_shown_as_browsers_do(frames: list[Pixels]) -> None:
    with open_animation(animate(frames[:4], "GIF", [0, 10, 20, 100]), LIMITS) as clip:
        assert clip.fps == pytest.approx(4 / (0.1 + 0.1 + 0.02 + 0.1))


def test_the_picture_for_viewers_without_animation_is_no_frame(frames: list[Pixels]) -> None:
    with open_animation(animate(frames[:4], "PNG", 50, default_image=True), LIMITS) as clip:
        assert (clip.frames, clip.fps) == (3, 20)
        assert all(map(np.array_equal, clip.read(range(3)), frames[1:4]))


def test_frames_with_a_palette_have_its_colours() -> None:
    """Pillow loses a PNG's palette where it begins anew, as one does who decodes twice."""
    images = [Image.new("P", (3, 2), index) for index in (7, 9)]
    file = io.BytesIO()
    for image in images:
        image.putpalette(bytes(range(30)))
    images[0].save(file, "PNG", save_all=True, append_images=images[1:])
    with open_animation(file.getvalue(), LIMITS) as clip:
        assert [frame[0, 0].tolist() for frame in clip.read([0, 1])] == [[21, 22, 23], [27, 28, 29]]


@pytest.mark.parametrize("kind", ["WEBP", "PNG", "GIF", "AVIF"])
def test_a_still_is_a_clip_of_one_frame(kind: str, frames: list[Pixels]) -> None:
    file = io.BytesIO()
    Image.fromarray(frames[0]).save(file, kind)
    assert is_same(by_headers(file.getvalue()), by_pillow(file.getvalue()))
    with open_animation(file.getvalue(), LIMITS) as clip:
        assert (clip.frames, clip.fps) == (1, 1 if kind == "AVIF" else 10)


def test_a_gif_may_end_without_its_trailer(frames: list[Pixels]) -> None:
    data = animate(frames[:3], "GIF", 50)
    assert data[-1:] == b";"
    assert is_same(by_headers(data[:-1]), by_headers(data))


def test_what_leaves_a_gifs_screen_is_cut_off() -> None:
    """As in browsers; Pillow makes the screen larger from there on."""
    images = [Image.new("P", (4, 3), 1), Image.new("P", (4, 3), 2)]
    for image in images:
        image.putpalette(bytes([0, 0, 0, 10, 20, 30, 40, 50, 60]))
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], optimize=False)
    data = bytearray(file.getvalue())
    second = data.rindex(b",\0\0\0\0\4\0\3\0")
    data[second + 1 : second + 5] = struct.pack("<HH", 2, 1)
    with open_animation(bytes(data), LIMITS) as clip:
        assert (clip.width, clip.height) == (4, 3)
        first, last = clip.read([0, 1])
    assert first.shape == last.shape == (3, 4, 3)
    changed = np.zeros((3, 4), bool)
    changed[1:, 2:] = True
    assert np.array_equal((last == [40, 50, 60]).all(axis=2), changed)
    data[second + 1 : second + 5] = struct.pack("<HH", 60_000, 60_000)
    with pytest.raises(WrongFormatError, match="60004x60003 is 3600"), open_animation(bytes(data), LIMITS):
        pass


# --- what is refused


def test_a_still_of_a_format_without_animation_is_told_what_is_taken(frames: list[Pixels]) -> None:
    file = io.BytesIO()
    Image.fromarray(frames[0]).save(file, "JPEG")
    with (
        pytest.raises(
            WrongFormatError, match=r"expected a video, got a still image \(animations: GIF, WEBP, PNG, AVIF\)"
        ),
        open_animation(file.getvalue(), LIMITS),
    ):
        pass


@pytest.mark.parametrize("bug", [ValueError, LookupError, RuntimeError, OSError, struct.error])
def test_what_a_reader_does_wrong_is_no_broken_file(bug: type[Exception], frames: list[Pixels]) -> None:
    data = animate(frames[:3], "GIF", 50)

    def fail(_: Pixels) -> None:
        raise bug("ours")

    with pytest.raises(bug, match="ours"), open_animation(data, LIMITS):
        raise bug("ours")
    with pytest.raises(bug, match="ours"), open_animation(data, LIMITS) as clip:
        list(map(fail, clip.read([0, 2])))
    with pytest.raises(IndexError), open_animation(data, LIMITS) as clip:
        next(clip.read([]))


def apng(announced: Sequence[int], frames: int) -> bytes:
    """Of 1x1, without pixels."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    control = [png_chunk(b"acTL", struct.pack(">II", count, 0)) for count in announced]
    shown = [png_chunk(b"fcTL", struct.pack(">IIIIIHHBB", i, 1, 1, 0, 0, 1, 4, 0, 0)) for i in range(frames)]
    data = [png_chunk(b"IDAT" if i == 0 else b"fdAT", b"") for i in range(frames)]
    pairs = b"".join(a + b for a, b in zip(shown, data, strict=True))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(control) + pairs + png_chunk(b"IEND", b"")


def webp(*chunks: bytes, flags: int = 2) -> bytes:
    body = b"WEBP" + riff_chunk(b"VP8X", bytes([flags]) + bytes(9)) + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (apng([3], 2), "its header announces 3 frames, it holds 2"),
        (apng([1], 2), "its header announces 1 frames, it holds 2"),
        (apng([2, 2], 2), "it announces two animations"),
        (apng([2], 2)[:-20], "the file ends within a block"),
        (webp(), "it holds no frame"),
        (webp(riff_chunk(b"ANMF", bytes(15))), "a frame's header is too short"),
        (webp(riff_chunk(b"ANMF", bytes(16)))[:-1], "the file ends within a block"),
        (b"GIF89a" + bytes(7) + b",\0\0\0\0\1\0\1\0\0\2\0!\xf9\4\0", "the file ends within a block"),
        (b"GIF89a" + bytes(7) + b"," + bytes(4) + b"\1\0\1\0\0\2\2", "the file ends within a block"),
    ],
    ids=repr,
)
def test_headers_that_contradict_themselves_are_told(data: bytes, reason: str) -> None:
    with pytest.raises(WrongFormatError, match=f"broken image: {reason}"), open_animation(data, LIMITS):
        pass


def test_these_headers_are_told_apart_from_good_ones() -> None:
    assert _core.animation(apng([2], 2))[2].tolist() == [250, 250]
    assert _core.animation(apng([0], 2))[2].tolist() == [0], "none is announced"
    assert _core.animation(webp(riff_chunk(b"ANMF", bytes(12) + b"\1\2\0\0")))[2].tolist() == [513]
    assert _core.animation(webp(flags=0))[2].tolist() == [0]


def test_a_decoder_that_finds_other_frames_is_believed_in_nothing(frames: list[Pixels]) -> None:
    data = animate(frames[:3], "WEBP", 50).replace(b"VP8L", b"VP8?", 1)
    with (
        open_animation(data, LIMITS) as clip,
        pytest.raises(WrongFormatError, match=r"headers tell 3 frames of 112x80, a decoder finds 2"),
    ):
        next(clip.read([0]))


def test_a_frame_that_ends_early_is_refused_whatever_images_are_granted() -> None:
    """All headers are whole: only a decoder that is told to mind finds it out."""
    announced = png_chunk(b"acTL", struct.pack(">II", 1, 0))
    damaged = png_file(SIZE + announced, apng_frame(0), png_chunk(b"IDAT", zlib.compress(bytes(20))[:6]))
    decode(damaged, max_pixels=10**6, allow_truncated=True, exif_transpose=False)
    with pytest.raises(WrongFormatError, match="broken image"), open_animation(damaged, LIMITS) as clip:
        list(clip.read([0]))


def test_an_animation_is_announced_by_the_first_number_that_can_be_even_before_the_size() -> None:
    """As in Pillow."""
    two, none = (png_chunk(b"acTL", struct.pack(">II", count, 0)) for count in (2, 0))
    pixels = zlib.compress(bytes(20))
    first, second = png_chunk(b"IDAT", pixels), png_chunk(b"fdAT", struct.pack(">I", 2) + pixels)
    for head in (two + SIZE, SIZE + two, SIZE + none + two):
        data = png_file(head, apng_frame(0), first, apng_frame(1), second)
        header = probe(data)
        assert header is not None
        assert header.frames == len(_core.animation(data)[2]) == len(by_pillow(data)[2]) == 2


def test_nothing_is_announced_behind_the_end() -> None:
    """As in Pillow, whose header ends there."""
    ended = png_file(SIZE, png_chunk(b"IEND", b""), png_chunk(b"acTL", struct.pack(">II", 8, 0)))
    header = probe(ended)
    assert header is not None
    assert header.frames == 1 == getattr(Image.open(io.BytesIO(ended)), "n_frames", None)
    assert probe(png_file(png_chunk(b"IEND", b""), SIZE)) is None
