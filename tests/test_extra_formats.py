"""MM_EXTRA_IMAGE_FORMATS: what it adds is read as Pillow reads it, within the limits of all images; nothing else is."""

from __future__ import annotations

import base64
import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extra_images import MAKERS, saved, telling
from image_seeds import seeds
from mutations import mutated
from numpy.typing import NDArray
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from watched_engine import Watched, watched

from rtp_mm.config import EXTRA_IMAGE_FORMATS, load_settings
from rtp_mm.errors import BadItemsError, NotSupportedError, StartError, WrongFormatError
from rtp_mm.media.image import FORMATS, decode
from rtp_mm.media.probe import probe
from rtp_mm.media.sniff import sniff

pytestmark = pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")

MAX_PIXELS = 10**6
DAMAGED = 40  # of each file


def format_of(name: str) -> str:
    return name.split()[0]


def pixels(data: bytes, *extra_formats: str) -> NDArray[np.uint8]:
    return decode(data, max_pixels=MAX_PIXELS, allow_truncated=False, exif_transpose=False, extra_formats=extra_formats)


@pytest.fixture(scope="module")
def picture(photos: dict[str, NDArray[np.uint8]]) -> Image.Image:
    return Image.fromarray(photos["chelsea"]).resize((24, 18))


# --- the option


def test_names_are_pillows_in_any_case() -> None:
    assert load_settings().mm_extra_image_formats == ()
    assert load_settings(["--mm_extra_image_formats=dds, Pcx,SGI"]).mm_extra_image_formats == ("DDS", "PCX", "SGI")


@pytest.mark.parametrize("name", ["eps", "WMF", "BLP", "cur", "DCX", "icns", "IPTC", "FITS", "png", "no such", ""])
def test_what_cannot_be_added_stops_the_start(name: str) -> None:
    with pytest.raises(StartError) as caught:
        load_settings(mm_extra_image_formats=f"dds,{name}")
    possible = ", ".join(EXTRA_IMAGE_FORMATS)
    assert str(caught.value) == f"MM_EXTRA_IMAGE_FORMATS={name!r}: {name!r} is none that can be added: {possible}"


def test_all_are_readers_of_pillows_that_know_a_file_by_its_start() -> None:
    Image.init()
    assert all(Image.OPEN[format][1] is not None for format in EXTRA_IMAGE_FORMATS)
    assert set(EXTRA_IMAGE_FORMATS).isdisjoint(FORMATS)
    assert {format_of(name) for name in MAKERS} == {*EXTRA_IMAGE_FORMATS}


# --- what is read


@pytest.mark.parametrize("name", MAKERS)
def test_a_file_is_read_as_the_reference_does_where_its_format_was_added(name: str, picture: Image.Image) -> None:
    data = MAKERS[name](picture)
    with Image.open(io.BytesIO(data)) as image:
        expected = convert_to_rgb(image, return_numpy=True)
    np.testing.assert_array_equal(pixels(data, format_of(name)), expected)
    np.testing.assert_array_equal(pixels(data, *EXTRA_IMAGE_FORMATS), expected)
    assert sniff(data) is probe(data) is None
    for others in ((), set(EXTRA_IMAGE_FORMATS) - {format_of(name)}):
        with pytest.raises(WrongFormatError, match="no image in a supported format"):
            pixels(data, *others)


def test_what_is_added_is_named_among_the_supported() -> None:
    with pytest.raises(WrongFormatError, match=r"\(JPEG, .*, QOI, DDS, PSD, TGA\)"):
        pixels(b"neither", "DDS", "PSD")


@pytest.mark.parametrize(
    "data", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xd7\xcd\xc6\x9a" + bytes(99)]
)
def test_what_runs_programs_is_never_read(data: bytes) -> None:
    with pytest.raises(WrongFormatError, match="no image in a supported format"):
        pixels(data, *EXTRA_IMAGE_FORMATS)


@pytest.mark.parametrize(("name", "data"), [*seeds()], ids=lambda value: value if isinstance(value, str) else "")
def test_other_files_stay_what_they_were(name: str, data: bytes) -> None:
    np.testing.assert_array_equal(pixels(data, *EXTRA_IMAGE_FORMATS), pixels(data))


# --- what is refused


@pytest.mark.parametrize("name", MAKERS)
def test_damage_gives_the_image_or_a_clear_error(name: str, picture: Image.Image) -> None:
    whole, rng = MAKERS[name](picture), np.random.default_rng(zlib.crc32(name.encode()))
    refused = 0
    for number in range(DAMAGED):
        data = mutated(whole, rng, head=64)
        try:
            found = pixels(data, format_of(name))
        except (WrongFormatError, NotSupportedError):
            refused += 1
            continue
        with Image.open(io.BytesIO(data), formats=(*FORMATS[:-1], format_of(name), FORMATS[-1])) as image:
            np.testing.assert_array_equal(found, convert_to_rgb(image, return_numpy=True), str(number))
    assert 0 < refused < DAMAGED


@pytest.mark.parametrize("name", MAKERS)
def test_a_bomb_is_refused_by_its_header(name: str, picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    data = telling(MAKERS[name](picture), format_of(name), 1001, 1002)
    monkeypatch.delattr("rtp_mm.media.image._decode")
    with pytest.raises(WrongFormatError, match="1001x1002 is 1003002 pixels, over the limit of 1000000"):
        pixels(data, format_of(name))


# --- through workers


def data_url(data: bytes) -> str:
    return "data:;base64," + base64.b64encode(data).decode()


async def refusal(w: Watched, data: bytes) -> str:
    with pytest.raises(BadItemsError) as caught:
        await w.ask(data_url(data))
    assert isinstance(caught.value.verdict, WrongFormatError)
    return str(caught.value.verdict)


async def test_workers_read_what_was_added_and_refuse_the_rest(tiny_qwen2_5_vl: Path, picture: Image.Image) -> None:
    limits: dict[str, Any] = {"mm_max_pixels": MAX_PIXELS, "mm_preprocess_max_workers": 1}
    async with watched(tiny_qwen2_5_vl, mm_extra_image_formats="dds,pcx,sgi", **limits) as w:
        expected = (await w.ask(data_url(saved("PNG")(picture)))).embeddings[0]
        pids = worker_pids(w)
        for format in ("DDS", "PCX", "SGI"):
            data = saved(format)(picture)
            assert torch.equal((await w.ask(data_url(data))).embeddings[0], expected)
            assert "broken image: " in await refusal(w, data[: len(data) // 2])
            before = most_memory(pids)
            for side in (10_001, 60_000):  # within what Pillow itself takes, and beyond
                assert "pixels" in await refusal(w, telling(data, format, side, side))
            assert most_memory(pids) - before < 16 << 20
        assert "no image in a supported format" in await refusal(w, saved("MSP", "1")(picture))
        assert worker_pids(w) == pids
    async with watched(tiny_qwen2_5_vl, **limits) as w:
        assert "no image in a supported format" in await refusal(w, saved("DDS")(picture))


def worker_pids(w: Watched) -> list[int]:
    processes = w.engine._items.workers._processes
    assert processes is not None
    return [worker.pid for worker in processes._workers]


def most_memory(pids: list[int]) -> int:
    """Bytes of address space that these processes had at most."""
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return sum(int(line.split()[1]) << 10 for line in lines if line.startswith("VmPeak:"))
