"""Images: file bytes to RGB pixels, with Pillow, as Hugging Face's PIL processors see them."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TypeVar

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from rtp_mm import _core
from rtp_mm.errors import NotSupportedError, WrongFormatError
from rtp_mm.media.decode_threads import DECODE_THREADS
from rtp_mm.media.jpeg import DECODER as JPEG_DECODER
from rtp_mm.media.jpeg import decode_jpeg, read_jpeg
from rtp_mm.media.limits import check_pixels
from rtp_mm.media.png import decode_png
from rtp_mm.media.probe import probe
from rtp_mm.media.sniff import HEIC_BRANDS, kind_of_text, sniff
from rtp_mm.media.truncation import TRUNCATION
from rtp_mm.types import MMUrlType

# TGA comes last, behind MM_EXTRA_IMAGE_FORMATS too: it has no signature, so its reader tries whatever the others leave.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "ICO", "PPM", "QOI", "TGA")
KEPT_BYTES = 48 << 20  # an image of 12 megapixels, in Pillow's four bytes each
MAX_SCANS = 200  # of a JPEG; encoders make a dozen, and each, of a few bytes, may take as long as the whole image
_TILE_SIDES, _TILE_OFFSETS = (322, 323), 324  # tags of a TIFF: TileWidth and TileLength
_MODES = {1: "L", 2: "LA", 4: "RGBA"}  # Pillow's, by channels

Taken = TypeVar("Taken")  # what becomes of pixels

# What Pillow's readers raise for broken files. RuntimeError and ArithmeticError (a time scale of 0) are AVIF's. The
# warning is an exception where warnings are errors. A MemoryError is for the caller, who knows the memory's limit.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, RuntimeError, LookupError, EOFError, struct.error, ArithmeticError,
    Image.DecompressionBombError, Image.DecompressionBombWarning,
)  # fmt: skip


def decoders() -> tuple[str, ...]:
    """The libraries that decide the pixels, with their versions: a part of every cache key."""
    return f"pillow {PIL.__version__}", JPEG_DECODER


def keep_decode_buffers() -> None:
    """For a process that decodes one image after another: Pillow keeps the last one's memory for the next.

    Up to `KEPT_BYTES`; by itself Pillow gives all of it back, and takes it in blocks of 16 MiB, so that `decode` has to
    copy what is larger.
    """
    memory = Image.core  # type: ignore[attr-defined]  # documented, but left out of Pillow's types
    memory.set_block_size(KEPT_BYTES)
    memory.set_blocks_max(1)


@dataclass(frozen=True, slots=True)
class OpenedImage:
    """An image, which is decoded where it is needed if it is a JPEG: other headers may be wrong about the size."""

    height: int
    width: int
    _forms: Iterator[NDArray[np.uint8] | _core.Jpeg]

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> OpenedImage:
        """One that is decoded already: [H, W, 3], read-only from now on."""
        pixels.flags.writeable = False
        height, width, _ = pixels.shape
        return cls(height, width, iter([pixels]))

    def give(self, take: Callable[[NDArray[np.uint8] | _core.Jpeg], Taken | None]) -> Taken:
        """What `take` makes of the pixels, [H, W, 3] uint8 RGB, read-only, with 3 or 4 bytes from pixel to pixel.

        Where the file is a JPEG that takes no other decoder, `take` is called with that first, and may decode it row by
        row; with the pixels where it returns `None`. To be called once. Raises `WrongFormatError` for a broken image.
        """
        return next(taken for form in self._forms if (taken := take(form)) is not None)


@contextmanager
def open_image(
    data: bytes,
    *,
    max_pixels: int,
    allow_truncated: bool,
    exif_transpose: bool,
    extra_formats: Sequence[str] = (),
) -> Iterator[OpenedImage]:
    """The first frame of a file.

    allow_truncated: a file that ends early is decoded as far as it goes.
    exif_transpose:  the image is turned as its EXIF orientation says.
    extra_formats:   that are taken besides `FORMATS`, by Pillow's names.

    Transparent pixels are laid over white, as in transformers' `convertto_rgb` (5.23); other modes become RGB by
    Pillow's `convert("RGB")`. Raises `WrongFormatError` for a broken image or one of more than `max_pixels` (before it
    is decoded), `NotSupportedError` for a video or sound.
    """
    if (header := probe(data)) is not None:
        check_pixels(header.width, header.height, max_pixels)  # Pillow opens an icon by decoding it
    formats = (*FORMATS[:-1], *extra_formats, FORMATS[-1])
    with TRUNCATION.decoding(allow_truncated):
        with named_errors(data, formats):
            image = Image.open(BytesIO(data), formats=(*formats, *_heif_format(data)))
        with image:
            check_pixels(*image.size, max_pixels)
            _check_work(data, image, max_pixels)
            is_jpeg = image.format in ("JPEG", "MPO")
            if is_jpeg and exif_transpose:
                with named_errors(data, formats):
                    exif_transpose = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
            if is_jpeg and not exif_transpose:
                width, height = image.size
                yield OpenedImage(height, width, _forms(data, image, formats))
                return
            if exif_transpose or (pixels := _decode_png(data, image)) is None:
                with named_errors(data, formats):
                    pixels = _decode(image, exif_transpose)
            yield OpenedImage.of(pixels)


def decode(
    data: bytes,
    *,
    max_pixels: int,
    allow_truncated: bool,
    exif_transpose: bool,
    extra_formats: Sequence[str] = (),
) -> NDArray[np.uint8]:
    """The first frame as [H, W, 3] uint8 RGB, read-only, with 3 or 4 bytes from pixel to pixel. See `open_image`."""
    with open_image(
        data,
        max_pixels=max_pixels,
        allow_truncated=allow_truncated,
        exif_transpose=exif_transpose,
        extra_formats=extra_formats,
    ) as image:
        return image.give(lambda form: form.pixels() if isinstance(form, _core.Jpeg) else form)


def _check_work(data: bytes, image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Raises `WrongFormatError` for a file that takes far more time or memory than its pixels."""
    if image.format in ("JPEG", "MPO") and (scans := _core.jpeg_scans(data)) > MAX_SCANS:
        raise WrongFormatError(f"a JPEG of {scans} scans, over the limit of {MAX_SCANS}")
    if image.format == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        width, height = (tags.get(side) for side in _TILE_SIDES)
        if isinstance(width, int) and isinstance(height, int):
            check_pixels(width, height, max_pixels)
        elif _TILE_OFFSETS in tags:  # libtiff may read what Pillow does not
            raise WrongFormatError("broken image: a TIFF in tiles of no size")


def _forms(data: bytes, image: ImageFile.ImageFile, formats: Sequence[str]) -> Iterator[NDArray[np.uint8] | _core.Jpeg]:
    """Of a JPEG's pixels, which are the same in all. The first may turn out to have none."""
    if (jpeg := read_jpeg(data, *image.size)) is not None:
        yield jpeg
    if (pixels := decode_jpeg(data, *image.size)) is None:
        with named_errors(data, formats):
            pixels = _decode(image, exif_transpose=False)
    pixels.flags.writeable = False
    yield pixels


def _decode(image: ImageFile.ImageFile, exif_transpose: bool) -> NDArray[np.uint8]:
    image.load()
    if exif_transpose:
        ImageOps.exif_transpose(image, in_place=True)
    return rgb_pixels(image)


def _decode_png(data: bytes, image: ImageFile.ImageFile) -> NDArray[np.uint8] | None:
    """Pillow's pixels by a faster decoder; `None` for other files, and those that it leaves to Pillow."""
    if image.format != "PNG" or (pixels := decode_png(data, *image.size)) is None:
        return None
    channels = pixels.shape[2]
    return pixels if channels == 3 else rgb_pixels(Image.frombuffer(_MODES[channels], image.size, pixels))


def _heif_format(data: bytes) -> tuple[str, ...]:
    if data[4:8] != b"ftyp" or data[8:12] not in HEIC_BRANDS:
        return ()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        raise NotSupportedError("HEIC images need pillow-heif on the server (pip install 'rtp_mm[heif]')") from None
    register_heif_opener(decode_threads=DECODE_THREADS.count)
    return ("HEIF",)


def rgb_pixels(image: Image.Image) -> NDArray[np.uint8]:
    """[H, W, 3] RGB, with 3 or 4 bytes from pixel to pixel: a view of the image's memory where it has all it takes."""
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        return _core.over_white(np.asarray(image.convert("RGBA")))
    return _pixels(image if image.mode == "RGB" else image.convert("RGB"))


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Of an RGB image: a view of its memory where that is in one piece, else a copy."""
    try:
        capsules = image.__arrow_c_array__()
    except ValueError:  # more than one of Pillow's blocks
        return np.asarray(image)
    return _core.arrow_pixels(*capsules, image.height, image.width)


@contextmanager
def named_errors(data: bytes, formats: Sequence[str]) -> Iterator[None]:
    """Turns Pillow's many errors into ours, for a file that should have one of these formats."""
    try:
        yield
    except UnidentifiedImageError:
        mm_type = sniff(data)
        if mm_type in (MMUrlType.VIDEO, MMUrlType.AUDIO):
            raise NotSupportedError(f"expected an image, got {mm_type.name.lower()}") from None
        found = f"; these bytes are {kind}" if (kind := kind_of_text(data)) else ""
        raise WrongFormatError(f"no image in a supported format ({', '.join(formats)}){found}") from None
    except _DECODE_ERRORS as error:
        text = " ".join(str(error).split())  # on one line
        raise WrongFormatError(f"broken image: {text or type(error).__name__}") from None
