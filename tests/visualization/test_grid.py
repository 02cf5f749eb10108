"""Grids of images: titles, headers and grey values."""

import numpy as np
import pytest

from cellmap_lightning.visualization.figures import picture_grid
from tests.visualization.drawings import labels, texts

pytest.importorskip("matplotlib")


def test_grid_of_2d_and_3d_images(tmp_path):
    rng = np.random.default_rng(0)
    volume, image = rng.normal(size=(5, 12, 16)), 3 * rng.normal(size=(12, 16))
    figure = picture_grid(
        [[volume, image], [image, volume]], ["raw", "output"], ["crop1", "crop2"], path=tmp_path / "a" / "grid.png",
        title="epoch 3",
    )  # fmt: skip
    assert (tmp_path / "a" / "grid.png").read_bytes().startswith(b"\x89PNG")
    assert labels(figure) == ["raw", "output"] * 2
    assert {"epoch 3", "crop1", "crop2"} <= set(texts(figure))
    drawn = [axes.images[0] for axes in figure.axes]
    for picture, values in zip(drawn, [volume[2], image, image, volume[2]], strict=True):
        np.testing.assert_array_equal(picture.get_array(), values)
    # Both images of a row have the grey values of the first.
    for row, first in ((drawn[:2], volume[2]), (drawn[2:], image)):
        assert {picture.get_clim() for picture in row} == {(first.min(), first.max())}
    boxes = [axes.get_window_extent() for axes in figure.axes]
    assert all(box.width / box.height == pytest.approx(16 / 12) for box in boxes)
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0 for box in boxes)
