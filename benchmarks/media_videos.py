"""Videos to patch rows: 64 frames of a clip, against decoding every frame and against random access on one thread.

Clips are 1920x1080 H.264 (x264 ultrafast with 3 B-frames, 24 a second) of crops that move over a photograph; 10 seconds
are encoded and repeated. All ways write the same rows through the same kernel, each in a process of its own:
    ours    only what the chosen frames need, threaded
    every   every frame decoded, threaded, chosen ones converted (torchvision's reader converts and keeps all)
    random  for each frame a seek to the key frame before it, unless that was passed, and decoding from there, on one
            thread, all chosen frames kept (decord's way)
"""

from __future__ import annotations

import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.report import write_result
from rtp_mm.config import load_settings
from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
from rtp_mm.preprocess.media import MediaPreprocessor
from rtp_mm.preprocess.patches import new_rows
from rtp_mm.preprocess.video import VideoPreprocessor, _Frames
from rtp_mm.types import PreprocessOptions

RATE, WIDTH, HEIGHT, FRAMES = 24, 1920, 1080, 64
ENCODED_S = 10
OPTIONS = PreprocessOptions(min_frames=FRAMES, max_frames=FRAMES)
Pixels = NDArray[np.uint8]


# --- clips


def write_clip(path: Path, seconds: int, interval_s: int) -> None:
    """`seconds` of video, a key frame every `interval_s`, groups closed."""
    import av
    from PIL import Image

    large = Image.fromarray(skimage.data.astronaut()).resize((WIDTH + 1000, WIDTH + 1000), Image.Resampling.BICUBIC)
    planes = av.VideoFrame.from_image(large).to_ndarray(format="yuv420p")
    side = WIDTH + 1000
    luma = planes[:side]
    chroma = planes[side:].reshape(2, side // 2, side // 2)
    params = f"keyint={interval_s * RATE}:min-keyint={interval_s * RATE}:scenecut=0:bframes=3:b-adapt=0:open-gop=0"
    with av.open(path, "w", format="mp4") as out:
        stream: Any = out.add_stream("libx264", rate=RATE, options={"preset": "ultrafast", "x264-params": params})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        packets = []
        count = ENCODED_S * RATE
        for i in track(range(count), f"encoding {path.name}"):
            y, x = 2 * (i % 300), 2 * (i * 2 % 400)
            cut = (chroma[:, y // 2 : (y + HEIGHT) // 2, x // 2 : (x + WIDTH) // 2]).reshape(2, -1)
            frame = np.concatenate([luma[y : y + HEIGHT, x : x + WIDTH].reshape(-1), cut.reshape(-1)])
            packets += stream.encode(av.VideoFrame.from_ndarray(frame.reshape(-1, WIDTH), format="yuv420p"))
        packets += stream.encode(None)
        contents = [(p.pts, p.dts, p.is_keyframe, bytes(p), p.time_base) for p in packets]
        for turn in range(seconds // ENCODED_S):
            for pts, dts, is_keyframe, content, time_base in contents:
                shift = round(turn * ENCODED_S / time_base)
                packet = av.Packet(content)
                packet.pts, packet.dts, packet.time_base, packet.stream = pts + shift, dts + shift, time_base, stream
                packet.is_keyframe = is_keyframe
                out.mux(packet)


# --- ways to read it: frames, and a count of those decoded


def every(data: bytes, indices: list[int], decoded: list[int]) -> Iterator[Pixels]:
    import av

    wanted = set(indices)
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for index, frame in enumerate(container.decode(video=0)):
            decoded[0] += 1
            if index in wanted:
                yield frame.to_ndarray(format="rgb24")


def random_access(data: bytes, indices: list[int], decoded: list[int]) -> Iterator[Pixels]:
    import av

    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size]
        times = sorted(time for time, _ in packets)
        keys = sorted(time for time, is_keyframe in packets if is_keyframe)
        kept, at, frames = [], None, iter(())
        for index in indices:
            key = max(time for time in keys if time <= times[index])
            if at is None or at < key:
                container.seek(key, stream=stream)
                frames = container.decode(stream)
            for frame in frames:
                decoded[0] += 1
                if frame.pts == times[index]:
                    kept.append(frame.to_ndarray(format="rgb24"))
                    break
            at = times[index]
    yield from kept


def measure(way: str, path: Path) -> dict[str, float]:
    """In a process of its own. Seconds from the file's bytes to rows, and the peak beyond those bytes."""
    settings = load_settings(None, mm_max_patches_per_item=1 << 20)
    video = MediaPreprocessor.from_checkpoint(Path("/nonexistent"), PUBLISHED_PROCESSOR, settings).video
    data = path.read_bytes()
    decoded = [0]
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = _status_kb("VmRSS")
    started = time.perf_counter()
    rows = _ours(video, data, decoded) if way == "ours" else _peer(video, data, decoded, PEERS[way])
    seconds = time.perf_counter() - started
    peak = _status_kb("VmHWM") - before
    checksum = int(rows.sum(dtype=np.int64))
    return {"seconds": seconds, "peak_mb": peak / 1024, "decoded": decoded[0], "checksum": checksum}


def _status_kb(name: str) -> int:
    match = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert match is not None
    return int(match[1])


def _ours(video: VideoPreprocessor, data: bytes, decoded: list[int]) -> Pixels:
    from rtp_mm.media.clip import ClipLimits
    from rtp_mm.media.video import open_video

    with open_video(data, ClipLimits(10**9, 10**6, 0)) as clip:
        chosen = video.rule.choose_frames(clip.frames, clip.fps, OPTIONS)
        rows = video._patches(clip.read(chosen), _Frames(FRAMES, HEIGHT, WIDTH, 2.0), OPTIONS, new_rows).rows
        decoded[0] = clip.decoded
    return rows


def _peer(video: VideoPreprocessor, data: bytes, decoded: list[int], read: Callable[..., Iterator[Pixels]]) -> Pixels:
    import av

    with av.open(io.BytesIO(data)) as container:
        chosen = video.rule.choose_frames(container.streams.video[0].frames, RATE, OPTIONS)
    return video._patches(read(data, chosen, decoded), _Frames(FRAMES, HEIGHT, WIDTH, 2.0), OPTIONS, new_rows).rows


PEERS = {"every": every, "random": random_access}


def run(rounds: int, seconds: Sequence[int] = (10, 300), intervals_s: Sequence[int] = (2, 10)) -> None:
    """Clips of these lengths, with a key frame every so many seconds; of each way the best of `rounds`."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for interval_s, length in itertools.product(intervals_s, seconds):
            path = Path(folder) / f"{length} s, a key frame every {interval_s} s.mp4"
            write_clip(path, length, interval_s)
            ways = {way: [_in_a_process(way, path) for _ in range(rounds)] for way in ("ours", *PEERS)}
            assert len({run["checksum"] for runs in ways.values() for run in runs}) == 1, "rows differ"
            for way, runs in ways.items():
                best = min(runs, key=lambda run: run["seconds"])
                results.append({"clip": path.stem, "file_mb": path.stat().st_size / 1e6, "way": way, **best})
    _print(results)
    write_result("media_videos", {"frames": FRAMES, "size": [WIDTH, HEIGHT], "clips": results})


def _in_a_process(way: str, path: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.media_videos", way, str(path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result: dict[str, float] = json.loads(output)
    return result


def _print(results: list[dict[str, Any]]) -> None:
    table = Table(
        "clip",
        "way",
        "seconds",
        "ours is faster by",
        "frames decoded",
        "peak MB beyond the file",
        title="64 frames to patch rows",
    )
    ours = {row["clip"]: row["seconds"] for row in results if row["way"] == "ours"}
    for row in results:
        ratio = f"{row['seconds'] / ours[row['clip']]:.1f}x"
        table.add_row(
            row["clip"], row["way"], f"{row['seconds']:.2f}", ratio, str(row["decoded"]), f"{row['peak_mb']:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], Path(sys.argv[2]))))
