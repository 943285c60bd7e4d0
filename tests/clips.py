"""Clips for tests: crops that move over a photograph, encoded by PyAV."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

FRAMES = 48
X265 = "log-level=none:pools=1"

# name: codec, container, encoder's options
KINDS: dict[str, tuple[str, str, Mapping[str, str]]] = {
    "h264 mp4, B-frames": ("libx264", "mp4", {"bf": "3", "x264-params": "b-pyramid=normal"}),
    "h264 mp4, open groups": ("libx264", "mp4", {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}),
    "h264 mp4, intra refresh": ("libx264", "mp4", {"x264-params": "intra-refresh=1:bframes=0"}),
    "h264 mov, no B-frames": ("libx264", "mov", {"bf": "0"}),
    "h264 mkv": ("libx264", "matroska", {"bf": "2"}),
    "h264 avi": ("libx264", "avi", {"bf": "2"}),
    "h264 ts": ("libx264", "mpegts", {"bf": "2"}),
    "h264 mp4, interlaced": ("libx264", "mp4", {"x264-params": "interlaced=1:bframes=2"}),
    "hevc mp4": ("libx265", "mp4", {"x265-params": X265}),
    "hevc mkv, closed groups": ("libx265", "matroska", {"x265-params": f"{X265}:open-gop=0"}),
    "hevc mp4, temporal layers": (
        "libx265",
        "mp4",
        {"x265-params": f"{X265}:temporal-layers=1:bframes=7"},
    ),
    "vp9 webm": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1"}),
    "mpeg4 avi": ("mpeg4", "avi", {}),
    "mpeg4 avi, B-frames": ("mpeg4", "avi", {"bf": "2"}),
    "mpeg4 mp4": ("mpeg4", "mp4", {"bf": "2"}),
    "mjpeg avi": ("mjpeg", "avi", {}),
    "mjpeg mov": ("mjpeg", "mov", {}),
    "av1 mp4": ("libsvtav1", "mp4", {"preset": "12", "svtav1-params": "lp=1"}),
    "av1 webm": ("libsvtav1", "webm", {"preset": "12", "svtav1-params": "lp=1"}),
    "vp8 webm": ("libvpx", "webm", {"deadline": "good", "cpu-used": "5", "auto-alt-ref": "1", "lag-in-frames": "25"}),
    "vp9 webm, alpha": ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8", "pixel_format": "yuva420p"}),
    "mpeg2 ts": ("mpeg2video", "mpegts", {"bf": "2"}),
    "mpeg1 mpg": ("mpeg1video", "mpeg", {"bf": "2"}),
    "h264 flv": ("libx264", "flv", {"bf": "2"}),
    "wmv asf": ("wmv2", "asf", {}),
    "divx 3 avi": ("msmpeg4", "avi", {}),
    "prores mov": ("prores_ks", "mov", {"pixel_format": "yuv422p10le"}),
}


def moving(
    photo: NDArray[np.uint8], count: int = FRAMES, width: int = 112, height: int = 80
) -> list[NDArray[np.uint8]]:
    """`count` crops, each moved a little from the one before, brightness changing so that no two are equal."""
    frames = []
    for i in range(count):
        crop = photo[2 * i : 2 * i + height, 3 * i : 3 * i + width]
        frames.append(np.clip(crop.astype(np.int16) + i % 7 * 5, 0, 255).astype(np.uint8))
    return frames


def encode(
    frames: Sequence[NDArray[np.uint8]],
    codec: str = "libx264",
    container: str = "mp4",
    options: Mapping[str, str] | None = None,
    *,
    rate: int = 24,
    times: Sequence[int] | None = None,
    group: int = 10,
    rotation: int = 0,
    with_sound: bool = False,
    muxer: Mapping[str, str] | None = None,
) -> bytes:
    """A file of these frames. `times`: when each is shown, in units of 1 / `rate`; a variable frame rate. `muxer`: the
    container's options.
    """
    file = io.BytesIO()
    with av.open(file, "w", format=container, options=dict(muxer or {})) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=dict(options or {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = (options or {}).get("pixel_format", "yuvj420p" if codec == "mjpeg" else "yuv420p")
        stream.codec_context.gop_size = group
        stream.codec_context.thread_count = 1
        if rotation:
            stream.set_display_rotation(rotation)
        sound: Any = out.add_stream("aac", rate=16000) if with_sound else None
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.sample_rate = 16000
            out.mux([*sound.encode(silence), *sound.encode(None)])
    return file.getvalue()


def packed_divx(frames: Sequence[NDArray[np.uint8]], container: str) -> bytes:
    """MPEG-4 as DivX 5 wrote it: a B-frame comes in the packet of the frame before it, and a packet that shows nothing
    stands in its place.
    """
    marker = b"\0\0\1\xb6"
    with av.open(io.BytesIO(encode(frames, "mpeg4", "avi", {"bf": "1"}))) as source:
        stream: Any = source.streams.video[0]
        packets = [bytes(packet) for packet in source.demux(stream) if packet.size]
        kinds = [packet[packet.index(marker) + 4] >> 6 for packet in packets]  # 0: I, 1: P, 2: B
        packed: list[bytes] = []
        for kind, packet in zip(kinds, packets, strict=True):
            if kind == 2:
                packed[-1] += packet
                packed.append(marker + b"\x50\x7f")
            else:
                packed.append(packet)
        file = io.BytesIO()
        with av.open(file, "w", format=container) as out:
            copy: Any = out.add_stream_from_template(stream)
            for index, data in enumerate(packed):
                packet = av.Packet(data)
                packet.pts = packet.dts = index
                packet.time_base, packet.stream = Fraction(1, 24), copy
                packet.is_keyframe = data[data.index(marker) + 4] >> 6 == 0
                out.mux(packet)
    return re.sub(rb"Lavc[0-9.]+", lambda found: b"DivX503b1393p".ljust(len(found[0]), b"\0"), file.getvalue(), count=1)


def rewritten(data: bytes, container: str, change: Callable[[int, bytes], bytes]) -> bytes:
    """The same packets at the same times, each as `change` makes it of its number and bytes."""
    file = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(file, "w", format=container) as out:
        copy: Any = out.add_stream_from_template(source.streams.video[0])
        for number, read in enumerate(packet for packet in source.demux(video=0) if packet.size):
            packet = av.Packet(change(number, bytes(read)))
            packet.pts, packet.dts, packet.time_base = read.pts, read.dts, read.time_base
            packet.stream, packet.is_keyframe = copy, read.is_keyframe
            out.mux(packet)
    return file.getvalue()


def spliced(claim: bytes, parts: Sequence[bytes], container: str) -> bytes:
    """The packets of these files, none of which is shown late, one behind the other in a stream that its container
    describes as that of `claim`.
    """
    file = io.BytesIO()
    with av.open(io.BytesIO(claim)) as like, av.open(file, "w", format=container) as out:
        copy: Any = out.add_stream_from_template(like.streams.video[0])
        index = 0
        for part in parts:
            with av.open(io.BytesIO(part)) as source:
                for read in source.demux(video=0):
                    if read.size:
                        packet = av.Packet(bytes(read))
                        packet.pts = packet.dts = index
                        packet.time_base, packet.stream, packet.is_keyframe = Fraction(1, 24), copy, read.is_keyframe
                        out.mux(packet)
                        index += 1
    return file.getvalue()


def sound_only() -> bytes:
    """An mp4 that holds a second of silence."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        stream: Any = out.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        out.mux([*stream.encode(frame), *stream.encode(None)])
    return file.getvalue()


def decode_all(data: bytes) -> list[NDArray[np.uint8]]:
    """The slow, obvious way: every frame, from first to last, on one thread."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "NONE"
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
