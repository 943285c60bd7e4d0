"""Fixtures every test may use: tiny checkpoints, real photographs, and `require` for optional features; and a guard: no
test dials or resolves anything but this machine (`no_network.py`).

Imports what the tests of kernels need, which run on GPUs where little is installed; fixtures import the rest.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import arm_compiled
import numpy as np
import pytest
import skimage.data
import torch
from no_network import forbidden_calls, watch_sockets
from numpy.typing import NDArray
from packaging.version import Version
from PIL import Image

from rtp_mm.random_checkpoint import write_checkpoint
from rtp_mm.vit import graphs

if TYPE_CHECKING:
    from web_source import Source

    from rtp_mm.engine.worker_pool import WorkerPool


def _is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _has_interpreter() -> bool:
    """Of Triton's kernels. Triton 3.6's makes a number of an array of one element, which numpy 2.4 refuses."""
    version = importlib.metadata.version
    is_numpy_strict = Version(version("numpy")) >= Version("2.4")
    return _is_installed("triton") and (not is_numpy_strict or Version(version("triton")) >= Version("3.7"))


FEATURES: dict[str, Callable[[], bool]] = {
    "cuda": torch.cuda.is_available,
    "nvcc": lambda: shutil.which("nvcc") is not None,
    "triton": lambda: _is_installed("triton"),
    "triton_interpreter": _has_interpreter,
    "flash": lambda: _is_installed("flash_attn"),
    "heif": lambda: _is_installed("pillow_heif"),
    "dali": lambda: _is_installed("nvidia.dali"),
    "arm": arm_compiled.is_available,
    "avx512": torch.cpu._is_avx512_supported,
}


def require(feature: str, packages: str = "") -> None:
    """Skips the test where `feature` is missing, or fails it where `RTP_MM_REQUIRE=cuda,dali` names the feature.

    packages: what to install to have it.
    """
    if FEATURES[feature]():
        return
    if feature in os.environ.get("RTP_MM_REQUIRE", "").split(","):
        pytest.fail(f"RTP_MM_REQUIRE names {feature}, and it is not here")
    pytest.skip(f"no {feature}: install {packages}" if packages else f"no {feature}")


watch_sockets()


@pytest.fixture(autouse=True)
def dialled_elsewhere() -> Iterator[list[str]]:
    """What the test tried to reach beyond this machine; the test fails if it is more than nothing."""
    forbidden_calls.clear()
    yield forbidden_calls
    assert not forbidden_calls


@pytest.fixture(scope="session")
def tiny_qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen2-VL with 4 layers."""
    return _tiny(tmp_path_factory, "qwen2_vl")


@pytest.fixture(scope="session")
def tiny_qwen2_5_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen2.5-VL with 4 layers, 1 and 3 of them with full attention."""
    return _tiny(tmp_path_factory, "qwen2_5_vl")


@pytest.fixture(scope="session")
def tiny_qwen2_audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a Qwen2-Audio with 4 layers."""
    return _tiny(tmp_path_factory, "qwen2_audio")


def _tiny(tmp_path_factory: pytest.TempPathFactory, family: str) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints") / family
    write_checkpoint(folder, family, "tiny")
    return folder


@pytest.fixture(scope="session", params=["tiny_qwen2_vl", "tiny_qwen2_5_vl"])
def tiny_checkpoint(request: pytest.FixtureRequest) -> Any:
    """Both families in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def photos() -> dict[str, NDArray[np.uint8]]:
    """Real photographs by name, [H, W, 3] uint8, of sizes that no patch grid divides."""
    return {
        "astronaut": skimage.data.astronaut(),  # 512 x 512
        "chelsea": skimage.data.chelsea(),  # 300 x 451
        "coffee": skimage.data.coffee(),  # 400 x 600
        "rocket": skimage.data.rocket(),  # 427 x 640
    }


@pytest.fixture(scope="session")
def photo(photos: dict[str, NDArray[np.uint8]]) -> bytes:
    """A real photograph as a JPEG file, 451 x 300."""
    file = io.BytesIO()
    Image.fromarray(photos["chelsea"]).save(file, "JPEG", quality=92)
    return file.getvalue()


@pytest.fixture(scope="session")
def photo_path(photo: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same JPEG as a file."""
    path = tmp_path_factory.mktemp("photos") / "chelsea.jpg"
    path.write_bytes(photo)
    return path


@pytest.fixture(scope="session")
def sound_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1.3 s of stereo at 44.1 kHz, which who reads it mixes and resamples."""
    from sounds import encode, speech

    path = tmp_path_factory.mktemp("sounds") / "speech.wav"
    path.write_bytes(encode(np.stack([speech(57330), speech(57330, 1)]), 44100))
    return path


@pytest.fixture
async def source() -> AsyncIterator[Source]:
    """A web server on this machine."""
    from web_source import Source

    async with Source.serving() as source:
        yield source


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    """One scripted preprocess worker."""
    from worker_pools import new_pool

    async with new_pool(tmp_path) as pool:
        yield pool


@pytest.fixture
async def pair(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    """Two of them."""
    from worker_pools import new_pool

    async with new_pool(tmp_path, count=2) as pool:
        yield pool


@pytest.fixture
def urls(photos: dict[str, NDArray[np.uint8]]) -> list[str]:
    """Eight small images, as data URLs."""
    from watched_engine import as_data_url

    return [as_data_url(photos["chelsea"][i : i + 60, :60]) for i in range(8)]


@pytest.fixture(autouse=True)
def graphs_at_first_sight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches on a GPU run by graphs from the first one on."""
    monkeypatch.setattr(graphs, "SIGHTS", 1)
