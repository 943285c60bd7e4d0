"""Files decoded on the device by DALI, against the same files decoded on the CPU: time, rate, difference, copies.

A step of `gpu_session`; with `--device cpu`, DALI's decoders for the CPU stand in, to try the script.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from benchmarks.gpu_common import Figures, Options, Unavailable, attempt, is_gpu, timed
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

AT_ONCE = 4  # as the engine: `DEVICE_DECODES`
REPEATS = 8  # of each file, for the rate
CLIP_S, RATE = 10, 24


def decode(options: Options) -> Figures:
    """JPEGs and clips by DALI on the device against the CPU."""
    import torch

    from rtp_mm.config import load_settings
    from rtp_mm.media import dali
    from rtp_mm.models.device_preprocessor import DevicePreprocessor
    from rtp_mm.models.qwen2_vl import PUBLISHED_PROCESSOR
    from rtp_mm.preprocess.media import MediaPreprocessor

    if not dali.is_installed():
        raise Unavailable("no DALI")
    settings = load_settings(device=options.device, mm_decode_backend="gpu")
    host = MediaPreprocessor.from_checkpoint(Path("none"), PUBLISHED_PROCESSOR, settings)
    device = torch.device(options.device)
    if is_gpu(options):
        torch.zeros(1, device=device)
        on_device = DevicePreprocessor.for_device(host, device, settings)
        assert on_device is not None
    else:
        on_device = DevicePreprocessor(host, device, "gpu", _cpu_table(), lambda _: dali.DaliDecoder(None))
    yield "takes", str(on_device.cache_key)
    for name, (data, limits) in _files(gpu=is_gpu(options)).items():
        blob = Blob(data, b"", name)
        call = partial(_preprocess, blob, limits)
        yield name, attempt(partial(_compare, call, host, on_device, options))
    yield "decoded_on_device", on_device.decodes
    yield "left_to_cpu", str(dict(on_device.cpu_decodes))


def _preprocess(blob: Blob, limits: PreprocessOptions, preprocessor: Any) -> Any:
    return preprocessor(blob, MMUrlType.DEFAULT, limits)


def _compare(call: Callable[[Any], Any], host: Any, on_device: Any, options: Options) -> dict[str, Any]:
    """One file on both sides. Differences are of the rows, 0 to 255."""
    ours, expected = call(on_device), call(host)
    if ours is None:
        return {"left to the CPU": str(dict(on_device.cpu_decodes))}
    difference = np.abs(ours.rows.cpu().numpy().astype(np.int16) - expected.rows)
    rounds = 5 if is_gpu(options) else 1
    return {
        "device_ms": 1e3 * timed(lambda: call(on_device), options.device, rounds),
        "host_ms": 1e3 * timed(lambda: call(host), options.device, rounds),
        "device_per_s": _rate(lambda: call(on_device), AT_ONCE),
        "host_per_s": _rate(lambda: call(host), len(os.sched_getaffinity(0))),
        "max_difference": int(difference.max()),
        "mean_difference": float(difference.mean()),
        "row_bytes": int(expected.rows.nbytes),
        "copies": _copies(lambda: call(on_device)) if is_gpu(options) else "needs a GPU",
    }


def _rate(call: Callable[[], Any], threads: int) -> float:
    """Calls a second, from so many threads."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: call(), range(threads)))  # each thread makes its decoder
        count = REPEATS * threads
        began = perf_counter()
        list(pool.map(lambda _: call(), range(count)))
        return count / (perf_counter() - began)


def _copies(call: Callable[[], Any]) -> dict[str, Any]:
    """Copies between host and device that one call makes: how often, microseconds. Pixels would be megabytes up."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        call()
        torch.cuda.synchronize()
    events = [event for event in recorded.key_averages() if "Memcpy" in event.key]
    return {event.key: {"count": event.count, "us": event.self_device_time_total} for event in events}


def _cpu_table() -> Any:
    from rtp_mm.media import dali
    from rtp_mm.media.decode_backend import DeviceDecoders, FrameLimits

    return DeviceDecoders(dali.library(), dali.FORMATS, (("vp9", FrameLimits(16, 16, 8192, 8192, 1 << 18)),))


def _files(*, gpu: bool) -> dict[str, tuple[bytes, PreprocessOptions]]:
    native = PreprocessOptions()
    sizes = ((1024, 768), (3840, 2160)) if gpu else ((256, 192),)
    files = {f"JPEG {width}x{height}": (_jpeg(width, height), native) for width, height in sizes}
    if not gpu:
        return files | {"VP9 192x128": (_clip("libvpx-vp9", "webm", 192, 128, 2), native)}
    files["JPEG 3840x2160 to 1 MP"] = (_jpeg(3840, 2160), PreprocessOptions(max_pixels=1 << 20))
    for codec, encoder in (("H.264", "libx264"), ("HEVC", "libx265"), ("AV1", "libsvtav1")):
        files[f"{codec} 1920x1080, {CLIP_S} s"] = (_clip(encoder, "mp4", 1920, 1080, CLIP_S), native)
    return files


def _photo(width: int, height: int) -> Any:
    import skimage.data
    from PIL import Image

    return Image.fromarray(skimage.data.astronaut()).resize((width, height), Image.Resampling.BICUBIC)


def _jpeg(width: int, height: int) -> bytes:
    file = io.BytesIO()
    _photo(width, height).save(file, "JPEG", quality=92)
    return file.getvalue()


def _clip(encoder: str, container: str, width: int, height: int, seconds: int) -> bytes:
    """Crops that move over a photograph, a key frame every two seconds."""
    import av

    large = np.asarray(_photo(width + 4 * seconds * RATE, height))
    options = {"libx264": {"preset": "ultrafast", "bf": "3"}, "libx265": {"preset": "ultrafast"}}
    file = io.BytesIO()
    with av.open(file, "w", format=container) as out:
        stream: Any = out.add_stream(encoder, rate=RATE, options=options.get(encoder, {}))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = 2 * RATE
        for index in range(seconds * RATE):
            crop = np.ascontiguousarray(large[:, 4 * index : 4 * index + width])
            frame = av.VideoFrame.from_ndarray(crop, format="rgb24")
            frame.pts, frame.time_base = index, Fraction(1, RATE)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()
