"""Choice of slices, contrast limits, scale bars and colours."""

import math

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.visualization.figures import best_row, best_slice, contrast_limits, outline_colors, scale_bar_nm

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(
    ("extent", "expected"),
    [(589, 200), (512, 200), (500, 200), (499, 100), (10_000, 2000), (2.5, 1), (2.4, 0.5), (1250, 500), (1000, 200)],
)
def test_scale_bar_is_round(extent, expected):
    assert scale_bar_nm(extent) == pytest.approx(expected)


def test_scale_bar_is_never_tiny_or_too_long():
    for extent in np.geomspace(0.5, 1e7, 500):
        assert 0.15 < scale_bar_nm(float(extent)) / extent <= 0.4 + 1e-6


@pytest.mark.parametrize("extent", [0, -3, math.nan, math.inf])
def test_scale_bar_refuses_an_invalid_extent(extent):
    with pytest.raises(CellMapValueError, match="positive number of nm"):
        scale_bar_nm(extent)


def test_colors_are_distinct_stable_and_valid():
    many = outline_colors(48)
    assert len(set(many)) == 48
    assert outline_colors(7) == many[:7]
    assert outline_colors(0) == []
    assert len(set(outline_colors(300))) == 300
    assert outline_colors(300)[:48] == many
    rgb = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in many], dtype=float)
    apart = np.linalg.norm(rgb[:, None] - rgb[None], axis=-1) + 1e9 * np.eye(48)
    assert apart.min() > 20
    assert apart[:8, :8].min() > 60
    assert (rgb.max(axis=1) - rgb.min(axis=1)).min() > 40  # no grey, which the image is
    with pytest.raises(CellMapValueError):
        outline_colors(-1)


def test_colors_repeat_after_400():
    assert len(outline_colors(1000)) == 1000
    assert len(set(outline_colors(400))) == 400


def test_contrast_ignores_large_padding_and_never_collapses():
    rng = np.random.default_rng(1)
    raw = rng.normal(100, 5, (8, 32, 32)).astype(np.float32)
    low, high = contrast_limits(raw)
    assert 80 < low < 92
    assert 108 < high < 120
    padded = raw.copy()
    padded[:, :, 8:] = 0
    assert contrast_limits(padded)[0] > 80
    assert contrast_limits(np.zeros((4, 4))) == (-1.0, 1.0)
    assert contrast_limits(np.full((4, 4), np.nan)) == (0.0, 1.0)
    low, high = contrast_limits(np.array([1.0, np.nan, np.inf, 3.0]))
    assert 1 <= low < high <= 3
    low, high = contrast_limits(np.eye(40))  # a mask as raw: zeros are content
    assert low == 0
    assert high == 1


def test_contrast_of_one_bright_voxel():
    raw = np.zeros(10_000)
    raw[5] = 7
    assert contrast_limits(raw) == (0.0, 7.0)


def test_best_slice_prefers_classes_to_voxels():
    target = np.zeros((2, 8, 10, 10))
    target[0, 6] = 1  # a hundred voxels of one class
    target[0, 2, 0, 0] = target[1, 2, 9, 9] = 1  # one voxel of each of two
    assert best_slice(target, None, (8, 10, 10)) == 2
    target[1, 2] = 0
    assert best_slice(target, None, (8, 10, 10)) == 6


def test_best_slice_falls_back_to_prediction_then_annotation_then_middle():
    empty = np.zeros((1, 9, 4, 4))
    prediction = empty.copy()
    prediction[0, 7] = 0.6
    prediction[0, 1] = 0.4
    assert best_slice(empty, prediction, (9, 4, 4)) == 7
    assert best_slice(None, prediction, (9, 4, 4)) == 7
    half = np.full((1, 9, 4, 4), np.nan)
    half[0, 1] = 0
    assert best_slice(half, None, (9, 4, 4)) == 1
    assert best_slice(empty, None, (9, 4, 4)) == 4
    assert best_slice(None, None, (9, 4, 4)) == 4
    assert best_slice(None, None, (8, 4, 4)) == 3


def test_best_row_crosses_an_object_instead_of_grazing_its_shell():
    y, x = np.mgrid[:41, :41]
    ball = np.hypot(y - 14, x - 20) < 12
    shell = ball & (np.hypot(y - 14, x - 20) > 9)
    cell = np.ones_like(ball)
    across = range(10, 19)  # rows that are as long as the middle one
    assert best_row(np.stack([ball, shell]), None, 41) in across
    assert best_row(np.stack([ball, shell, cell]), None, 41) in across
    assert best_row(None, np.stack([ball]), 41) in across
    assert best_row(np.zeros((2, 41, 41), bool), np.stack([ball]), 41) in across
    assert best_row(None, None, 41) == 20
    assert best_row(cell[None], None, 41) == 20
