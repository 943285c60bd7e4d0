"""Images whose files say that they are to be turned by a quarter, in every way that Pillow reads."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Pixels = NDArray[np.uint8]


def saved(pixels: Pixels, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format, **options)
    return file.getvalue()


def exif() -> bytes:
    """A quarter turn."""
    tags = Image.Exif()
    tags[0x0112] = 6
    return tags.tobytes()


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def text(name: str, value: str) -> PngInfo:
    info = PngInfo()
    info.add_text(name, value, zip=True)
    return info


PROFILE = f"\nexif\n{len(exif()):8}\n{exif().hex()}\n"
TURNED: dict[str, Callable[[Pixels], bytes]] = {
    "jpeg": lambda p: saved(p, "JPEG", exif=exif()),
    "jpeg, xmp": lambda p: saved(p, "JPEG", xmp=XMP),
    "png": lambda p: saved(p, "PNG", exif=exif()),
    "png, profile": lambda p: saved(p, "PNG", pnginfo=text("Raw profile type exif", PROFILE)),
    "png, xmp": lambda p: saved(p, "PNG", pnginfo=text("XML:com.adobe.xmp", XMP.decode())),
    "webp": lambda p: saved(p, "WEBP", exif=exif()),
    "webp, xmp": lambda p: saved(p, "WEBP", xmp=XMP),
    "avif": lambda p: saved(p, "AVIF", exif=exif()),
    "tiff": lambda p: saved(p, "TIFF", exif=exif()),
    "tiff, xmp": lambda p: saved(p, "TIFF", tiffinfo={700: XMP}),
}
