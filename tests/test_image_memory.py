"""Decoded images that Pillow holds: read where they lie, and for as long as they are read."""

from __future__ import annotations

import gc
import io
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from rtp_mm import _core
from rtp_mm.media.image import KEPT_BYTES, decode, keep_decode_buffers

Pixels = NDArray[np.uint8]


@pytest.fixture(autouse=True)
def pillows_own_settings() -> Iterator[None]:
    size, kept = Image.core.get_block_size(), Image.core.get_blocks_max()
    yield
    Image.core.set_blocks_max(kept)
    Image.core.set_block_size(size)


def noise(height: int, width: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def decoded(image: Pixels, format: str = "TIFF") -> Pixels:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format, compress_level=0)
    return decode(file.getvalue(), max_pixels=10**8, allow_truncated=False, exif_transpose=False)


def is_in_place(pixels: Pixels) -> bool:
    return pixels.strides == (4 * pixels.shape[1], 4, 1)


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (97, 131)])
def test_pixels_are_read_where_pillow_keeps_them(shape: tuple[int, int]) -> None:
    image = noise(*shape)
    pixels = decoded(image)
    assert is_in_place(pixels)
    assert not pixels.flags.writeable
    np.testing.assert_array_equal(pixels, image)


def test_an_images_memory_lives_as_long_as_its_pixels() -> None:
    """Each image would take the memory that the one before it had."""
    keep_decode_buffers()
    images = [noise(500, 700) + np.uint8(i) for i in range(4)]
    views = [decoded(image)[100:] for image in images]
    gc.collect()
    for image, view in zip(images, views, strict=True):
        np.testing.assert_array_equal(view, image[100:])


def test_an_image_in_several_blocks_is_copied() -> None:
    Image.core.set_block_size(4096)
    image = noise(100, 80)
    pixels = decoded(image)
    assert pixels.flags.c_contiguous
    np.testing.assert_array_equal(pixels, image)


def test_twelve_megapixels_lie_in_one_kept_block() -> None:
    keep_decode_buffers()
    assert KEPT_BYTES >= 4 * 4032 * 3024
    assert is_in_place(decoded(np.zeros((2600, 2000, 3), np.uint8), "BMP"))  # over the 16 MiB of Pillow's own blocks


def test_rows_are_the_same_from_pillows_memory() -> None:
    image = noise(97, 131)
    ours = _core.resize_patchify(decoded(image), 56, 84, 14, 2)
    np.testing.assert_array_equal(ours, _core.resize_patchify(image, 56, 84, 14, 2))


@pytest.mark.parametrize(
    ("image", "height", "width"),
    [
        (Image.new("RGB", (20, 10)), 11, 20),
        (Image.new("RGB", (20, 10)), 10, -20),
        (Image.new("L", (20, 10)), 10, 20),
        (Image.new("F", (20, 10)), 10, 20),
    ],
)
def test_other_pixels_are_refused(image: Image.Image, height: int, width: int) -> None:
    with pytest.raises(ValueError, match="no pixels of four bytes"):
        _core.arrow_pixels(*image.__arrow_c_array__(), height, width)


def test_other_objects_are_refused() -> None:
    schema, array = Image.new("RGB", (20, 10)).__arrow_c_array__()
    with pytest.raises(ValueError, match="no pixels of four bytes"):
        _core.arrow_pixels(array, schema, 10, 20)
    with pytest.raises(TypeError):
        _core.arrow_pixels(None, array, 10, 20)


def test_a_large_jpeg_never_lies_in_memory_as_a_whole(tmp_path: Path) -> None:
    """Its 62 MB of pixels go to the resize row by row."""
    if "avx2" not in _core.resize_levels():
        pytest.skip("libjpeg-turbo decodes here, which makes all of them")
    file = tmp_path / "large.jpg"
    Image.linear_gradient("L").resize((5400, 3840)).convert("RGB").save(file)
    code = f"""
import resource
from pathlib import Path
from rtp_mm.config import load_settings
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.patches import ImagePreprocessor
from rtp_mm.types import Blob, MMUrlType, PreprocessOptions

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

config = ImageProcessorConfig(14, 2, 2, 3136, 1003520, (0.5,) * 3, (0.5,) * 3)
preprocessor = ImagePreprocessor.from_config(config, load_settings())
blob = Blob(Path({str(file)!r}).read_bytes(), b"", "")
before = peak()
preprocessor(blob, MMUrlType.IMAGE, PreprocessOptions())
print(peak() - before)
"""
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(told.stdout) < 25 << 10  # KB: rows of 3 MB, a ring of bands, libraries on their first use
