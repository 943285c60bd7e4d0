"""An image file of every supported format, in its variants: what mutations and fuzzers begin from.

`python tests/image_seeds.py FOLDER` writes them, and some random animations.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from animations import RANDOM
from PIL import Image

Variant = tuple[str, str, dict[str, Any]]  # format, mode, options of Pillow's encoder

STILL: list[Variant] = [
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {"progressive": True}),
    ("PNG", "RGB", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {}),
    ("GIF", "P", {"comment": b"a comment"}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {}),
    ("TIFF", "L", {"big_tiff": True}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("AVIF", "RGB", {}),
    ("AVIF", "RGBA", {}),
    ("JPEG2000", "RGB", {}),
    ("JPEG2000", "RGB", {"no_jp2": True}),
    ("ICO", "RGBA", {"sizes": [(16, 16), (8, 8)]}),
    ("ICO", "RGBA", {"sizes": [(16, 16)], "bitmap_format": "bmp"}),
    ("PPM", "RGB", {}),
    ("PPM", "1", {}),
    ("PPM", "F", {}),
    ("QOI", "RGB", {}),
    ("TGA", "RGB", {}),
    ("TGA", "P", {"compression": "tga_rle"}),
    ("JPEG", "L", {"quality": 95}),
    ("JPEG", "RGB", {"quality": 95, "progressive": True, "restart_marker_rows": 1}),
    ("JPEG", "RGB", {"subsampling": "4:4:4", "restart_marker_blocks": 2, "optimize": True}),
    ("JPEG", "RGB", {"subsampling": "4:2:2", "restart_marker_rows": 1}),
]
ANIMATED = ["PNG", "GIF", "WEBP", "AVIF", "TIFF", "MPO"]


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def seeds(size: tuple[int, int] = (18, 17)) -> Iterator[tuple[str, bytes]]:
    """A name and a file, one of each kind."""
    gradient = Image.linear_gradient("L").resize(size)
    sideways = Image.linear_gradient("L").rotate(90).resize(size)
    image = Image.merge("RGB", (gradient, sideways, gradient.rotate(180)))  # every colour channel another
    for number, (format, mode, options) in enumerate(STILL):
        yield f"{number:02}.{format.lower()}", encode(image.convert(mode), format, **options)
    for format in ANIMATED:
        frames = [image.convert("RGB").rotate(90 * turns) for turns in range(3)]
        yield f"animated.{format.lower()}", encode(frames[0], format, save_all=True, append_images=frames[1:])


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    animations = [
        (f"{number}.{kind.lower()}", make(np.random.default_rng(number)))
        for kind, make in RANDOM.items()
        for number in range(10)
    ]
    for name, data in [*seeds(), *animations]:
        (folder / name).write_bytes(data)
