"""Preprocessing on the CPU without torch (csrc/core_module.cpp)."""

from types import EllipsisType
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Buffer

class Jpeg:
    """A JPEG file, or a part of its image, of the plainer kinds: sequential, of one scan, or progressive, by Huffman's
    code, of 8 bits, grey or YCbCr, chroma of full or half size. Its pixels are libjpeg-turbo's, byte for byte.
    """

    @staticmethod
    def read(data: Buffer) -> Jpeg | None:
        """Headers and a copy of the bits; `None` for any other file, for whatever other decoders might think different
        of, and for what is broken or ends early, as far as that is seen before it is decoded. Releases the GIL.
        """

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, 3)."""

    def __getitem__(self, index: tuple[EllipsisType, slice, slice, slice]) -> Jpeg:
        """A part of the image as of an array, [..., rows, columns, :]. Raises `ValueError` for one that is empty or has
        steps.
        """

    def pixels(self, *, level: str | None = None) -> NDArray[np.uint8] | None:
        """[H, W, 3], read-only; `None` where the file is broken after all. Releases the GIL meanwhile."""

@overload
def resize_patchify(
    image: NDArray[np.uint8],
    height: int,
    width: int,
    patch_size: int,
    merge_size: int,
    *,
    order: Literal["horizontal", "vertical"] = "horizontal",
    filter: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic",
    temporal_patch_size: int = 1,
    slot: int = 0,
    level: str | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """Pillow's 8-bit resize to `height` x `width`, byte for byte, cut into patch rows; releases the GIL meanwhile.

    image:  [H, W, 3] with any row stride, 3 or 4 bytes from pixel to pixel: a crop is a view.
    order:  the pass that goes first; each rounds to bytes. A pass that changes no size changes nothing.
    slot:   which of the `temporal_patch_size` T frames of a patch the image is; only its columns are written. A still
            image is 0 of 1.
    level:  one of `resize_levels()`; the last and fastest if left out. All give the same bytes.
    out:    [height/P * width/P, 3 * T * P * P] contiguous, written and returned; a new array if left out.

    Rows are in merge-block order, (block row, block column, row in block, column in block), columns (channel, frame,
    y, x). Raises `ValueError` that says what came.
    """

@overload
def resize_patchify(
    image: Jpeg,
    height: int,
    width: int,
    patch_size: int,
    merge_size: int,
    *,
    order: Literal["horizontal", "vertical"] = "horizontal",
    filter: Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"] = "bicubic",
    temporal_patch_size: int = 1,
    slot: int = 0,
    level: str | None = None,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8] | None:
    """The same of a JPEG, whose rows are resized as they are decoded; `None`, and anything in `out`, if broken."""

def arrow_pixels(schema: object, array: object, height: int, width: int) -> NDArray[np.uint8]:
    """[height, width, 3], read-only, strides (4 * width, 4, 1): the memory of a Pillow image, which it keeps alive.

    schema, array: what `Image.__arrow_c_array__` gives for pixels of four bytes. Raises `ValueError` for others.
    """

def probe(data: Buffer) -> tuple[str, int, int, int | None] | int | None:
    """An image file's header from its first bytes: see `rtp_mm.media.probe`; releases the GIL meanwhile.

    (Pillow's name of the format, width, height, frames or `None`); or the number of bytes, from the beginning, that it
    takes to tell; or `None` for what begins no image.
    """

def animation(data: Buffer) -> tuple[int, int, NDArray[np.float64]]:
    """The frames of a whole GIF, WebP, PNG or AVIF file by its own headers: see `rtp_mm.media.animation`; releases the
    GIL meanwhile.

    (Width and height of the canvas that holds them all, [frames] milliseconds that each is shown, as Pillow's
    `info["duration"]`, 0 where it has none.) A GIF's canvas may be larger than its screen. Raises `ValueError` that
    says what is wrong with the file.
    """

def jpeg_scans(data: Buffer) -> int:
    """Scans of a whole JPEG file, those of its thumbnails too: by their markers, without decoding; releases the GIL."""

def over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[H, W, 4] over opaque white to [H, W, 3], rounded as Pillow's `alpha_composite` does; releases the GIL."""

def unfilter_png(filtered: Buffer, height: int, width: int, channels: int) -> NDArray[np.uint8] | None:
    """[height, width, channels] of an inflated PNG image of 8 bits that is not interlaced; releases the GIL meanwhile.

    filtered: height * (1 + width * channels) bytes; 1 to 4 channels. `None` for a filter type that there is not.
    """

def bf16_instructions() -> str:
    """What multiplies bfloat16s faster than float32 here: "amx", "avx512_bf16" (where that is fast, AMD's) or "".

    A process asks the system for AMX with it; RTP_MM_AMX=0 has it do without.
    """

def multiplies_bytes() -> bool:
    """Whether this CPU multiplies words of four bytes in one instruction (AVX-512 VNNI, ARM's i8mm)."""

def resize_levels() -> list[str]:
    """The instruction sets that this CPU can run, slowest first."""
