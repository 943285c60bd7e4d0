"""The public types: where unset values end, and what a crop may be."""

from __future__ import annotations

import pytest

from rtp_mm.errors import WrongFormatError
from rtp_mm.types import CropBox, MMPreprocessConfig, PreprocessOptions


@pytest.mark.parametrize("unset", [-1, 0, -7])
def test_zero_and_less_is_unset(unset: int) -> None:
    config = MMPreprocessConfig(*[unset] * 7, mm_timeout_ms=unset)
    assert config.options() == PreprocessOptions()
    assert config.timeout_ms is None


def test_set_values_come_through() -> None:
    config = MMPreprocessConfig(1, 2, 3, 4, 5, 6, 7, [0.0, 0.25, 0.5, 1.0], 9)
    assert config.options() == PreprocessOptions(1, 2, 3, 4, 5, 6, 7, CropBox(0.0, 0.25, 0.5, 1.0))
    assert config.timeout_ms == 9


@pytest.mark.parametrize("sides", [{"width": 100}, {"height": 100}, {"width": 100, "height": 0}])
def test_width_and_height_count_only_together(sides: dict[str, int]) -> None:
    options = MMPreprocessConfig(**sides).options()
    assert (options.width, options.height) == (None, None)


@pytest.mark.parametrize(
    "positions",
    [
        [0.1],
        [0, 0, 1, 1, 1],
        [0.5, 0, 0.5, 1],
        [0.6, 0, 0.5, 1],
        [-0.1, 0, 1, 1],
        [0, 0, 1, 1.1],
        [0, 0, float("nan"), 1],
    ],
)
def test_a_crop_that_is_none_is_refused(positions: list[float]) -> None:
    with pytest.raises(WrongFormatError, match="crop_positions must"):
        MMPreprocessConfig(crop_positions=positions).options()


def test_options_can_stand_in_a_key() -> None:
    assert len({MMPreprocessConfig().options(), MMPreprocessConfig(fps=2).options(), PreprocessOptions()}) == 2
