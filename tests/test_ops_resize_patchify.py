"""`ops.resize_patchify` against `_core`, which is tested against Pillow, and against Pillow itself."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import reference
import torch
from conftest import require
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rtp_mm import _core, ops

Order = Literal["horizontal", "vertical"]
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
# (height, width) -> (height, width), patch, merge: tiles cut and whole, several bands, one pass, none, one pixel.
SHAPES = [
    ((90, 130), (56, 84), 14, 2),
    ((300, 451), (280, 448), 14, 2),
    ((64, 96), (128, 192), 16, 2),
    ((500, 40), (28, 28), 14, 2),
    ((40, 700), (28, 28), 14, 1),
    ((28, 300), (28, 140), 14, 2),
    ((28, 56), (28, 56), 14, 2),
    ((1, 1), (40, 60), 5, 4),
    ((33, 47), (21, 42), 7, 3),
    ((50, 30), (96, 64), 32, 1),
    ((9, 8), (3, 70), 1, 1),
]


def noise(*shape: int) -> Tensor:
    return torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def by_core(frames: Tensor, height: int, width: int, patch: int, merge: int, temporal: int = 1, **how: Any) -> Tensor:
    """Frame by frame into its slot."""
    rows = height // patch * (width // patch)
    out = np.empty((len(frames) // temporal * rows, 3 * temporal * patch**2), np.uint8)
    for i, frame in enumerate(frames):
        clip = out[i // temporal * rows : (i // temporal + 1) * rows]
        slot = {"temporal_patch_size": temporal, "slot": i % temporal, "out": clip}
        _core.resize_patchify(frame.numpy(), height, width, patch, merge, **slot, **how)
    return torch.from_numpy(out)


def test_a_photograph_is_pillows(photos: dict[str, NDArray[np.uint8]]) -> None:
    image = photos["chelsea"]
    # 300 to 280 rows, 451 to 448 columns: the vertical pass first, as Pillow 13 has it; an order shows in the bytes
    lines = Image.fromarray(image).resize((451, 280), Image.Resampling.BICUBIC)
    expected = np.asarray(lines.resize((448, 280), Image.Resampling.BICUBIC))
    frames = torch.from_numpy(image.copy())[None]
    ours = ops.resize_patchify(frames, 280, 448, 14, 2, order="vertical")
    np.testing.assert_array_equal(ours.numpy(), reference.patchify(expected[None], 14, 2, 1))
    assert not torch.equal(ours, ops.resize_patchify(frames, 280, 448, 14, 2, order="horizontal"))


@pytest.mark.parametrize("temporal", [1, 2])
@pytest.mark.parametrize("order", ["horizontal", "vertical"])
def test_clips_are_frame_by_frame_what_core_gives(order: Order, temporal: int) -> None:
    for size, out, patch, merge in SHAPES:
        frames = noise(4, *size)
        ours = ops.resize_patchify(frames, *out, patch, merge, order=order, temporal_patch_size=temporal)
        assert torch.equal(ours, by_core(frames, *out, patch, merge, temporal, order=order))


def test_views_are_read_as_they_lie_in_memory() -> None:
    whole = torch.randint(0, 256, (3, 60, 80, 4), dtype=torch.uint8)
    view = whole[::2, 5:55, 7:70, :3]
    assert torch.equal(ops.resize_patchify(view, 28, 56, 14, 2), ops.resize_patchify(view.contiguous(), 28, 56, 14, 2))


@pytest.mark.parametrize(
    ("frames", "arguments", "options", "message"),
    [
        (noise(28, 28), (28, 28, 14, 2), {}, r"frames must be \[F, H, W, 3\] uint8 .*, got \[28, 28, 3\] uint8"),
        (noise(1, 28, 28).int(), (28, 28, 14, 2), {}, r"got \[1, 28, 28, 3\] int32"),
        (noise(1, 0, 28), (28, 28, 14, 2), {}, r"not empty, got \[1, 0, 28, 3\]"),
        (noise(1, 28, 56)[:, :, ::2], (28, 28, 14, 2), {}, r"strides .*, got .* with strides \[4704, 168, 6, 1\]"),
        (noise(1, 28, 28), (28, 50, 14, 2), {}, r"multiples of patch_size \* merge_size = 14 \* 2, got 28 and 50"),
        (noise(1, 28, 28), (28, 28, 0, 2), {}, "must be positive, got 0 and 2"),
        (noise(3, 28, 28), (28, 28, 14, 2), {"temporal_patch_size": 2}, "temporal_patch_size 2 must divide the frames"),
        (noise(1, 28, 28), (28, 28, 14, 2), {"order": "both"}, "order must be one of horizontal, vertical, got both"),
        (noise(1, 28, 28), (28, 28, 14, 2), {"filter": "cubic"}, "filter must be one of nearest, .*, got cubic"),
    ],
)
def test_a_bad_argument_is_refused_with_what_came(
    frames: Tensor, arguments: tuple[int, int, int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises((RuntimeError, ValueError), match=f"resize_patchify: .*{message}"):
        ops.resize_patchify(frames, *arguments, **options)


@pytest.mark.parametrize("temporal", [1, 2])
def test_schema_and_fake_agree_with_the_kernel(temporal: int) -> None:
    arguments = (noise(2, 30, 40), 28, 56, 14, 2, "horizontal", "bicubic", temporal)
    torch.library.opcheck(torch.ops.rtp_mm.resize_patchify.default, arguments)


@pytest.mark.parametrize("order", ["horizontal", "vertical"])
@pytest.mark.parametrize("filter", FILTERS)
def test_cuda_gives_the_same_bytes(filter: Any, order: Order) -> None:
    require("cuda")
    rng = np.random.default_rng(0)
    sizes = [np.exp(rng.uniform(0, 6, 2)).astype(int).tolist() for _ in range(40)]
    random = [(size, tuple((28 * rng.integers(1, 12, 2)).tolist()), 14, 2) for size in sizes]
    for size, out, patch, merge in [*SHAPES, *random]:
        whole = torch.randint(0, 256, (2, size[0] + 3, size[1] + 2, 4), dtype=torch.uint8)
        on_device = whole.cuda()  # a view that is copied there would be no view
        views = ((t[..., :3], t[:, 1:-2, 2:, :3], t[..., :3].contiguous()) for t in (whole, on_device))
        for frames, device_frames in zip(*views, strict=True):
            for temporal in (1, 2):
                how: Any = {"order": order, "filter": filter, "temporal_patch_size": temporal}
                ours = ops.resize_patchify(device_frames, *out, patch, merge, **how)
                assert torch.equal(ours.cpu(), ops.resize_patchify(frames, *out, patch, merge, **how))
    with pytest.raises(RuntimeError, match="patch_size must be at most 32 on CUDA, got 64"):
        ops.resize_patchify(noise(1, 64, 64).cuda(), 64, 64, 64, 1)
