"""Outlines: exactly along the borders of voxels, all of them visible."""

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.visualization.figures import SheetSample, contact_sheet, outline_paths
from tests.visualization.drawings import by_gid, panel

pytest.importorskip("matplotlib")


def area(polygon):
    x, y = polygon[:-1].T
    return 0.5 * float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def edge_length(mask):
    padded = np.pad(mask, 1).astype(int)
    return np.abs(np.diff(padded, axis=0)).sum() + np.abs(np.diff(padded, axis=1)).sum()


def test_outline_of_a_rectangle_is_that_rectangle():
    mask = np.zeros((9, 12), bool)
    mask[2:5, 3:10] = True
    (polygon,) = outline_paths(mask)
    assert {tuple(p) for p in polygon} == {(2.5, 1.5), (9.5, 1.5), (9.5, 4.5), (2.5, 4.5)}
    assert len(polygon) == 5
    np.testing.assert_array_equal(polygon[0], polygon[-1])


def test_outline_of_one_voxel_whole_image_and_hole():
    one = np.zeros((3, 3), bool)
    one[1, 1] = True
    assert {tuple(p) for p in outline_paths(one)[0]} == {(0.5, 0.5), (1.5, 0.5), (1.5, 1.5), (0.5, 1.5)}
    (frame,) = outline_paths(np.ones((2, 5)))
    assert {tuple(p) for p in frame} == {(-0.5, -0.5), (4.5, -0.5), (4.5, 1.5), (-0.5, 1.5)}
    ring = np.ones((3, 3), bool)
    ring[1, 1] = False
    areas = sorted(area(p) for p in outline_paths(ring))
    assert sorted(map(abs, areas)) == [1, 9]
    assert areas[0] * areas[1] < 0  # the hole runs the other way round, so that filling leaves it out
    assert outline_paths(np.zeros((4, 4), bool)) == []
    with pytest.raises(CellMapValueError, match="two axes"):
        outline_paths(np.ones((2, 2, 2)))


@pytest.mark.parametrize("density", [0.05, 0.4, 0.5, 0.9])
def test_outline_of_noise_follows_every_edge_exactly_once(density):
    mask = np.random.default_rng(3).uniform(size=(23, 17)) < density
    polygons = outline_paths(mask)
    assert all((p % 1 == 0.5).all() for p in polygons)
    steps = np.concatenate([np.diff(p, axis=0) for p in polygons])
    assert ((steps == 0).sum(axis=1) == 1).all()  # along the axes only
    assert np.abs(steps).sum() == edge_length(mask)
    assert abs(sum(area(p) for p in polygons)) == mask.sum()


def test_outlines_lie_on_the_voxels_in_the_drawn_figure():
    """The rendered outline is on the edges of the raw data, in screen pixels."""
    raw = np.zeros((20, 30))
    raw[5:12, 8:22] = 1
    figure = contact_sheet([SheetSample(raw, raw[None], None, (8, 8))], ["box"])
    axes = panel(figure, "0:target")
    (line,) = by_gid(axes, "target:box")
    corners = axes.transData.transform(line.get_path().vertices)
    image = axes.images[0]
    assert image.get_extent() == [-0.5, 29.5, 19.5, -0.5]
    assert image.get_interpolation() == "nearest"
    box = axes.get_window_extent()
    expected_x = box.x0 + np.array([8, 22]) / 30 * box.width
    expected_y = box.y1 - np.array([5, 12]) / 20 * box.height
    np.testing.assert_allclose([corners[:, 0].min(), corners[:, 0].max()], expected_x, atol=1e-6)
    np.testing.assert_allclose([corners[:, 1].min(), corners[:, 1].max()], expected_y[::-1], atol=1e-6)

    figure.canvas.draw()
    pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3].astype(int)
    grey = np.ptp(pixels, axis=-1) == 0
    raw_box = panel(figure, "0:raw").get_window_extent()
    shift = round(box.x0 - raw_box.x0)
    height = len(pixels)
    row = height - round(corners[:, 1].mean())
    colored = np.flatnonzero(~grey[row, round(box.x0) : round(box.x1)]) + round(box.x0)
    white = np.flatnonzero(pixels[row, round(raw_box.x0) : round(raw_box.x1)].min(axis=-1) > 200) + round(raw_box.x0)
    assert abs(colored.min() - (white.min() + shift)) <= 2
    assert abs(colored.max() - (white.max() + shift)) <= 2


def test_outline_along_the_image_edge_stays_visible_and_inner_edges_stay_exact():
    raw = np.zeros((10, 10))
    mask = np.zeros((1, 10, 10))
    mask[0, :4, 3:6] = 1
    figure = contact_sheet([SheetSample(raw, mask, None, (8, 8))], ["box"])
    (line,) = by_gid(panel(figure, "0:target"), "target:box")
    assert not line.get_clip_on()
    x, y = line.get_path().vertices.T
    assert set(x) == {2.5, 5.5}
    assert sorted(set(y))[1] == 3.5
    assert -0.6 < min(y) < -0.5  # half a line width outside


def test_coinciding_outlines_are_both_visible():
    mask = np.zeros((2, 12, 12))
    mask[0, 3:9, 3:9] = 1
    mask[1, 3:9, 3:9] = 1
    mask[1, 5:7, 5:7] = 0
    figure = contact_sheet([SheetSample(mask[0], mask, mask, (8, 8))], ["mito", "mito_mem"])
    axes = panel(figure, "0:target")
    (rim,) = by_gid(axes, "rim:mito")
    assert not by_gid(axes, "rim:mito_mem")
    segments = rim.get_path().vertices.reshape(-1, 2, 2)
    assert len(segments) == 24
    assert set(segments.ravel()) == {2.5 + i for i in range(7)}
    (top,) = by_gid(axes, "target:mito_mem")
    assert rim.get_linewidth() > 2 * top.get_linewidth()
    assert rim.get_zorder() < by_gid(axes, "target:mito")[0].get_zorder() < top.get_zorder()
    assert not by_gid(panel(figure, "0:prediction"), "rim:mito")
