"""Sound files to samples: every format, mixed and resampled, cut where asked, and clear errors for the rest."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
import soxr
from PIL import Image
from sounds import FORMATS, encode, sine

from rtp_mm.errors import MMError, NotSupportedError, WrongFormatError
from rtp_mm.media import audio
from rtp_mm.media.audio import decode_audio, decode_channels
from rtp_mm.media.container import packets
from rtp_mm.media.sniff import sniff
from rtp_mm.types import MMUrlType

RATE, LONGEST = 16000, 480000


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_sound_at_the_models_rate(name: str) -> None:
    container, codec, rate, tolerance = FORMATS[name]
    data = encode(np.stack([sine(2, rate)] * 2), rate, container, codec)
    samples, is_cut = decode_audio(data, rate=RATE, max_samples=LONGEST)
    assert samples.dtype == np.float32
    assert not is_cut
    assert 0 <= len(samples) - 2 * RATE < 1024  # AAC and AC-3 end on a whole frame
    middle = slice(1000, 31000)  # in phase, so nothing was delayed
    assert np.abs(samples[middle] - sine(2)[middle]).max() < tolerance


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 32000, 44100, 48000])
def test_resampling_keeps_what_is_below_7_khz(rate: int) -> None:
    for hertz in (100.0, 1000.0, 3000.0, 7000.0):
        if hertz < 0.44 * rate:
            data = encode(sine(1, rate, hertz), rate, codec="pcm_f32le")
            samples, _ = decode_audio(data, rate=RATE, max_samples=LONGEST)
            assert len(samples) == RATE
            middle = slice(500, 15500)
            assert np.abs(samples[middle] - sine(1, RATE, hertz)[middle]).max() < 1e-3, hertz


def test_samples_are_those_that_librosa_would_read() -> None:
    """Channels averaged, then soxr's HQ: also where the sound comes in many frames."""
    sides = np.random.default_rng(0).standard_normal((2, 5 * 44100)).astype(np.float32) / 8
    samples, _ = decode_audio(encode(sides, 44100, codec="pcm_f32le"), rate=RATE, max_samples=LONGEST)
    assert np.array_equal(samples, soxr.resample(sides.mean(axis=0), 44100, RATE, quality="HQ"))


def test_what_is_above_half_the_rate_is_gone() -> None:
    """It would come back as another tone."""
    samples, _ = decode_audio(encode(sine(1, 48000, 9500.0), 48000), rate=RATE, max_samples=LONGEST)
    assert np.abs(samples[500:15500]).max() < 1e-3


def test_channels_are_averaged() -> None:
    left, right = sine(1), sine(1, hertz=1000.0)
    samples, _ = decode_audio(encode(np.stack([left, right]), RATE, codec="pcm_f32le"), rate=RATE, max_samples=LONGEST)
    np.testing.assert_allclose(samples, (left + right) / 2, atol=1e-7)
    six = np.stack([left, *[np.zeros_like(left)] * 5])
    samples, _ = decode_audio(encode(six, RATE, codec="pcm_f32le"), rate=RATE, max_samples=LONGEST)
    np.testing.assert_allclose(samples, left / 6, atol=1e-7)


def test_samples_at_the_models_rate_are_not_touched() -> None:
    sound = sine(1)
    samples, _ = decode_audio(encode(sound, RATE, codec="pcm_f32le"), rate=RATE, max_samples=LONGEST)
    assert np.array_equal(samples, sound)


def test_a_longer_sound_is_cut_and_says_so() -> None:
    data = encode(sine(3, 48000), 48000)
    for limit, is_longer in ((47999, True), (48000, False), (48001, False)):
        samples, is_cut = decode_audio(data, rate=RATE, max_samples=limit)
        assert is_cut is is_longer
        assert len(samples) == min(limit, 48000)


def test_the_sound_of_a_video_is_taken() -> None:
    data = encode(sine(1, 44100), 44100, "mp4", "aac", video=True)
    assert sniff(data) is MMUrlType.VIDEO
    samples, _ = decode_audio(data, rate=RATE, max_samples=LONGEST)
    assert np.abs(samples[1000:15000] - sine(1)[1000:15000]).max() < 3e-2


def id3(size: int) -> bytes:
    """A tag of so many bytes with a picture, as music files have before their sound."""
    body = b"APIC" + syncsafe(size - 10) + b"\0\0\0image/png\0\3\0\x89PNG".ljust(size - 4, b"\0")
    return b"ID3\4\0\0" + syncsafe(size) + body[:size]


def syncsafe(value: int) -> bytes:
    return bytes(value >> shift & 127 for shift in (21, 14, 7, 0))


@pytest.mark.parametrize("tags", [[100], [2_000_000], [5000, 300_000]], ids=str)
@pytest.mark.parametrize("name", ["mp3", "flac", "opus"])
def test_a_tag_before_a_sound_changes_nothing(name: str, tags: list[int]) -> None:
    container, codec, rate, _ = FORMATS[name]
    data = encode(sine(1, rate), rate, container, codec)
    bare = decode_audio(data, rate=RATE, max_samples=LONGEST)
    tagged = decode_audio(b"".join(map(id3, tags)) + data, rate=RATE, max_samples=LONGEST)
    assert np.array_equal(tagged.samples, bare.samples)


def test_the_cover_of_an_album_is_no_sound_and_no_video() -> None:
    data = encode(sine(1), RATE, "flac", "flac")
    picture = struct.pack(">II9sIIIIII", 3, 9, b"image/png", 0, 1, 1, 24, 0, 100_000) + bytes(100_000)
    head = 8 + 34  # the signature and STREAMINFO, no longer the last block of metadata
    covered = data[:4] + b"\0" + data[5:head] + b"\6" + len(picture).to_bytes(3, "big") + picture + data[head:]
    expected = decode_audio(data, rate=RATE, max_samples=LONGEST)
    assert np.array_equal(decode_audio(covered, rate=RATE, max_samples=LONGEST).samples, expected.samples)


def silent_video() -> bytes:
    file = io.BytesIO()
    import av

    with av.open(file, "w", format="mp4") as out:
        stream = out.add_stream("mpeg4", rate=10, width=64, height=48, pix_fmt="yuv420p")
        out.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        out.mux(stream.encode(None))
    return file.getvalue()


def test_a_video_without_sound_is_refused() -> None:
    with pytest.raises(WrongFormatError, match="no sound in this file, it holds video"):
        decode_audio(silent_video(), rate=RATE, max_samples=LONGEST)


def wav(rate: int = RATE, channels: int = 1, tag: int = 1, bits: int = 16, payload: bytes = b"\0\0" * 100) -> bytes:
    block = channels * bits // 8
    fmt = struct.pack("<HHIIHH", tag, channels, rate, rate * block % 2**32, block, bits)
    body = b"WAVEfmt " + struct.pack("<I", len(fmt)) + fmt + b"data" + struct.pack("<I", len(payload)) + payload
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"RIFF",
        b"no sound at all, but long enough to be looked at by every demuxer there is" * 20,
        b"ID3\x04\0\0\0\0\0\0" + bytes(1000),
        b"OggS" + bytes(1000),
        b"fLaC" + b"\xff" * 1000,
        wav(payload=b""),
        wav(rate=1),
        wav(rate=2**31 - 1),
        wav(channels=200, payload=bytes(4000)),
        wav(bits=64, payload=bytes(8000)),
        wav(tag=3, bits=32, payload=struct.pack("<3f", 0.0, float("nan"), 1.0)),
        wav(tag=3, bits=32, payload=struct.pack("<3f", 0.0, float("inf"), 1.0)),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nhttp://192.0.2.1/x.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
    ],
)
def test_hostile_files_get_an_error_of_ours(data: bytes) -> None:
    with pytest.raises((WrongFormatError, NotSupportedError)):
        decode_audio(data, rate=RATE, max_samples=LONGEST)


def test_a_sound_without_channels_is_called_broken() -> None:
    with pytest.raises(WrongFormatError, match="broken sound: no channels"):
        decode_audio(wav(channels=0, payload=bytes(4000)), rate=RATE, max_samples=LONGEST)


def test_an_image_is_no_sound() -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64)).save(file, "PNG")
    with pytest.raises((WrongFormatError, NotSupportedError)):
        decode_audio(file.getvalue(), rate=RATE, max_samples=LONGEST)


@pytest.mark.parametrize(
    ("rate", "is_taken"), [(999, False), (1000, True), (768_000, True), (768_001, False), (1, False)]
)
def test_rates_are_limited_before_more_than_a_packet_is_read(
    rate: int, is_taken: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 1 Hz FFmpeg makes one of every sample, and a server minutes of some megabytes."""
    read = []
    monkeypatch.setattr(audio, "packets", lambda *of: (read.append(p.size) or p for p in packets(*of)))  # type: ignore[func-returns-value]
    data = wav(rate, payload=bytes(2 * 5000))
    if is_taken:
        assert decode_channels(data, max_seconds=10)[1] == rate
        return
    with pytest.raises(WrongFormatError, match=f"sound of 1 channels at {rate} Hz; at most"):
        decode_audio(data, rate=RATE, max_samples=LONGEST)
    assert len(read) == 1


@pytest.mark.parametrize("container", ["ac3", "matroska"])
@pytest.mark.parametrize("place", [0, 2, 4, 5])
def test_a_damaged_packet_is_left_out_whatever_its_decoder_calls_it(container: str, place: int) -> None:
    """AC-3's has errors of its own for the fields of a header."""
    data = bytearray(encode(sine(2, 48000), 48000, container, "ac3"))
    data[data.index(b"\x0b\x77", len(data) // 2) + place] ^= 0xFF
    samples, _ = decode_audio(bytes(data), rate=RATE, max_samples=LONGEST)
    assert 2 * RATE - 1024 <= len(samples) < 2 * RATE + 1024


@pytest.mark.parametrize("name", ["wav", "flac", "mp3", "opus", "m4a"])
def test_damaged_files_give_sound_or_an_error_of_ours(name: str) -> None:
    container, codec, rate, _ = FORMATS[name]
    data = encode(sine(1, rate), rate, container, codec)
    generator = np.random.default_rng(0)
    for _ in range(40):
        damaged = bytearray(data[: generator.integers(1, len(data) + 1)])
        for place in generator.integers(0, len(damaged), 3):
            damaged[place] = generator.integers(0, 256)
        try:
            samples, _ = decode_audio(bytes(damaged), rate=RATE, max_samples=LONGEST)
        except MMError:
            continue
        assert 0 < len(samples) <= LONGEST
        assert np.isfinite(samples).all()


def test_channels_come_as_they_are_for_a_third_party() -> None:
    both = np.stack([sine(1, 22050), sine(1, 22050, 900.0)])
    waveform, rate = decode_channels(encode(both, 22050, codec="pcm_f32le"), max_seconds=2)
    assert rate == 22050
    assert np.array_equal(waveform, both)
    with pytest.raises(WrongFormatError, match="more than"):
        decode_channels(encode(both, 22050), max_seconds=0.5)


@pytest.mark.parametrize(("samples", "is_taken"), [(21999, True), (22000, True), (22001, False)])
def test_a_third_partys_sound_is_as_long_as_it_may_be(samples: int, is_taken: bool) -> None:
    sound = encode(sine(2, 22000)[:samples], 22000, codec="pcm_f32le")
    if is_taken:
        assert decode_channels(sound, max_seconds=1)[0].shape == (1, samples)
    else:
        with pytest.raises(WrongFormatError, match="more than"):
            decode_channels(sound, max_seconds=1)
