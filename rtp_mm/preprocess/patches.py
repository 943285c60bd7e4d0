"""Images to patch rows, for the Qwen2-VL line: decode, crop, size, resize, cut."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from rtp_mm import _core
from rtp_mm.errors import WrongFormatError
from rtp_mm.media.image import OpenedImage, decoders, open_image
from rtp_mm.media.limits import check_pixels
from rtp_mm.media.plain_pixels import may_be_turned
from rtp_mm.media.probe import probe
from rtp_mm.preprocess.image_config import ImageProcessorConfig
from rtp_mm.preprocess.resize_order import Order, ResizeRule, installed_rule, resize_order
from rtp_mm.preprocess.sizes import PixelBox, crop_pixels, smart_resize
from rtp_mm.types import Blob, Layout, MMUrlType, Patches, PreprocessOptions, RowAllocator

if TYPE_CHECKING:
    from rtp_mm.config import Settings  # its pydantic would be half of a worker's memory

_SEARCHED_BYTES = 1 << 18  # takes up to a millisecond, on the event loop


def new_rows(shape: tuple[int, int]) -> NDArray[np.uint8]:
    """A `RowAllocator`: memory of the process's own."""
    return np.empty(shape, np.uint8)


Pixels = TypeVar("Pixels")  # an array, a tensor or a JPEG file


class ResizePlan(NamedTuple):
    """What becomes of decoded pixels: the part that is cut out, the size that it gets, the pass that goes first."""

    rows: slice
    columns: slice
    height: int
    width: int
    order: Order

    @classmethod
    def of(cls, box: PixelBox, height: int, width: int, rule: ResizeRule) -> ResizePlan:
        """From the box to (height, width)."""
        order = resize_order(*box.size, height, width, rule)
        return cls(slice(box.top, box.bottom), slice(box.left, box.right), height, width, order)

    def cut(self, pixels: Pixels) -> Pixels:
        """A view of [..., H, W, 3]."""
        view: Pixels = pixels[..., self.rows, self.columns, :]  # type: ignore[index]
        return view


@dataclass(frozen=True, slots=True)
class ImagePreprocessor:
    """A function from a blob to its patches, with everything that it depends on. Picklable, for worker processes.

    The rows are byte for byte what `Qwen2VLImageProcessorPil` (transformers 5.23) resizes to.
    """

    patch_size: int
    merge_size: int
    temporal_patch_size: int
    min_pixels: int
    max_pixels: int
    max_image_pixels: int  # of an image as it comes, and of one as a request asks for it
    allow_truncated: bool
    exif_transpose: bool
    extra_formats: tuple[str, ...]
    resize_rule: ResizeRule

    @classmethod
    def from_config(cls, config: ImageProcessorConfig, settings: Settings) -> ImagePreprocessor:
        """The checkpoint's rules with the server's limits."""
        rule = settings.mm_resize_order
        return cls(
            patch_size=config.patch_size,
            merge_size=config.merge_size,
            temporal_patch_size=config.temporal_patch_size,
            min_pixels=config.min_pixels,
            max_pixels=config.max_pixels,
            max_image_pixels=settings.mm_max_pixels,
            allow_truncated=settings.mm_allow_truncated_images,
            exif_transpose=settings.mm_exif_transpose,
            extra_formats=settings.mm_extra_image_formats,
            resize_rule=installed_rule() if rule == "auto" else rule,
        )

    @property
    def cache_key(self) -> tuple[object, ...]:
        """All else that decides the bytes."""
        return (*decoders(), *astuple(self))

    @property
    def row_bytes(self) -> int:
        """Of one patch of a still image."""
        return 3 * self.patch_size**2

    def predict(self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions) -> Layout | None:
        """How an image's rows will lie, known before it is decoded; `None` where its header does not tell. Raises
        `WrongFormatError` for a limit that it breaks.
        """
        size = self._size_told(blob, mm_type)
        return None if size is None else self._layout(self.grid(self.plan(*size, options)))

    def is_possible(self, layout: Layout, blob: Blob, mm_type: MMUrlType) -> bool:
        """Whether an image's rows may lie so."""
        grid = layout.grid_thw
        return grid is not None and grid[0] == 1 and self.merges(grid) and layout == self._layout(grid)

    def merges(self, grid: tuple[int, int, int]) -> bool:
        """Whether the patches of each frame make whole tokens."""
        return not any(side % self.merge_size for side in grid[1:])

    def _size_told(self, blob: Blob, mm_type: MMUrlType) -> tuple[int, int] | None:
        """Height and width of an image as it will be decoded; `None` where its header does not tell."""
        data = blob.data
        if isinstance(data, np.ndarray):
            return (data.shape[1], data.shape[2]) if data.ndim == 4 and len(data) == 1 else None
        if mm_type not in (MMUrlType.IMAGE, MMUrlType.DEFAULT) or (header := probe(data)) is None:
            return None
        if self.exif_transpose and _may_be_turned(header.format, data):
            return None
        if header.format == "TIFF" and (len(data) > _SEARCHED_BYTES or b"tiff:Orientation" in data):
            return None  # by which, in its XMP, Pillow turns it unasked
        return header.height, header.width

    def plan(self, height: int, width: int, options: PreprocessOptions) -> ResizePlan:
        """For an image of that size. Raises `WrongFormatError` for a limit that it breaks."""
        check_pixels(width, height, self.max_image_pixels)
        box = crop_pixels(height, width, options.crop)
        return ResizePlan.of(box, *self._target_size(*box.size, options), self.resize_rule)

    def grid(self, plan: ResizePlan) -> tuple[int, int, int]:
        """(1, h, w) in patches."""
        return 1, plan.height // self.patch_size, plan.width // self.patch_size

    def __call__(
        self, blob: Blob, mm_type: MMUrlType, options: PreprocessOptions, allocate: RowAllocator = new_rows
    ) -> Patches:
        """Rows [h * w, 3 * P * P] (one frame: T is 1), written to what `allocate` gives, and the grid (1, h, w).

        Of an image's file, or of [1, H, W, 3]. Raises `WrongFormatError` for what cannot be decoded, is not as its
        header tells, breaks a limit or has bad options, `NotSupportedError` for a video's or a sound's file.
        """
        with self._opened(blob) as image:
            told, found = self._size_told(blob, mm_type), (image.height, image.width)
            if told is not None and told != found:
                raise WrongFormatError(
                    f"broken image: its header tells {told[1]}x{told[0]}, a decoder finds {found[1]}x{found[0]}"
                )
            plan = self.plan(*found, options)
            grid = self.grid(plan)
            rows = allocate(self._layout(grid).shape)
            image.give(
                lambda pixels: _core.resize_patchify(
                    plan.cut(pixels),
                    plan.height,
                    plan.width,
                    self.patch_size,
                    self.merge_size,
                    order=plan.order,
                    out=rows,
                )
            )
        return Patches(rows, grid)

    def _layout(self, grid: tuple[int, int, int]) -> Layout:
        return Layout((prod(grid), self.row_bytes), grid)

    @contextmanager
    def _opened(self, blob: Blob) -> Iterator[OpenedImage]:
        """A file, or [1, H, W, 3] uint8."""
        if isinstance(blob.data, np.ndarray):
            yield OpenedImage.of(blob.data[0])
            return
        with open_image(
            blob.data,
            max_pixels=self.max_image_pixels,
            allow_truncated=self.allow_truncated,
            exif_transpose=self.exif_transpose,
            extra_formats=self.extra_formats,
        ) as image:
            yield image

    def _target_size(self, height: int, width: int, options: PreprocessOptions) -> tuple[int, int]:
        min_pixels = options.min_pixels or self.min_pixels
        max_pixels = options.max_pixels or self.max_pixels
        factor = self.patch_size * self.merge_size
        height, width = smart_resize(options.height or height, options.width or width, factor, min_pixels, max_pixels)
        check_pixels(width, height, self.max_image_pixels)
        return height, width


def _may_be_turned(image_format: str, data: bytes) -> bool:
    """Whether Pillow may find an orientation in the file: a look through a short one tells it, of most formats."""
    is_told = image_format in ("JPEG", "PNG", "WEBP") and len(data) <= _SEARCHED_BYTES
    return not is_told or may_be_turned(data)
