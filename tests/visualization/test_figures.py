"""Contact sheets and training curves: what is drawn where, not how fonts look."""

import builtins
import csv
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from cellmap_lightning.errors import (
    CellMapFileNotFoundError,
    CellMapTypeError,
    CellMapValueError,
    MissingExtraError,
)
from cellmap_lightning.visualization.figures import (
    SheetSample,
    best_row,
    best_slice,
    contact_sheet,
    contrast_limits,
    outline_colors,
    outline_paths,
    scale_bar_nm,
    training_curves,
)

matplotlib = pytest.importorskip("matplotlib")

CLASSES = ["mito", "er", "ves"]


def sample(shape=(6, 12, 16), scale=(50.0, 4.6, 4.6), classes=3, target=True, prediction=True, header="jrc_x crop 1"):
    """Noise with one box a class, each in other slices; boxes [z, y, x] start at (1 + c, 2, 3 * c)."""
    rng = np.random.default_rng(0)
    raw = rng.normal(0.5, 0.1, shape).astype(np.float32)
    masks = np.zeros((classes, *shape), dtype=np.float32)
    for c in range(classes):
        masks[(c, *((slice(1 + c, 5),) if len(shape) == 3 else ()), slice(2, 8), slice(3 * c, 3 * c + 3))] = 1
    return SheetSample(raw, masks if target else None, 0.9 * masks if prediction else None, scale, header)


def by_gid(axes, gid):
    return [artist for artist in axes.get_children() if artist.get_gid() == gid]


def labels(figure):
    return [axes.get_label() for axes in figure.axes]


def texts(figure):
    found = [text.get_text() for text in figure.texts]
    return found + [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def panel(figure, label):
    return next(axes for axes in figure.axes if axes.get_label() == label)


def nm_per_inch(axes, scale):
    """(vertical, horizontal) size of what one inch of the panel shows."""
    (x0, x1), (y1, y0) = axes.get_xlim(), axes.get_ylim()
    box, inches = axes.get_position(), axes.figure.get_size_inches()
    return (y1 - y0) * scale[0] / (box.height * inches[1]), (x1 - x0) * scale[1] / (box.width * inches[0])


# ---------------------------------------------------------------------------------------------------------------------
# Pure helpers


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
def test_scale_bar_refuses_no_extent(extent):
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


def test_colors_repeat_only_after_very_many():
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


# ---------------------------------------------------------------------------------------------------------------------
# Which slice


def test_best_slice_prefers_classes_to_voxels():
    target = np.zeros((2, 8, 10, 10))
    target[0, 6] = 1  # a hundred voxels of one class
    target[0, 2, 0, 0] = target[1, 2, 9, 9] = 1  # one voxel of each of two
    assert best_slice(target, None, (8, 10, 10)) == 2
    target[1, 2] = 0
    assert best_slice(target, None, (8, 10, 10)) == 6


def test_best_slice_falls_back_to_prediction_then_knowledge_then_middle():
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


# ---------------------------------------------------------------------------------------------------------------------
# Outlines


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
    """Where the outline is in the picture, the raw data changes: rendered, in screen pixels."""
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


# ---------------------------------------------------------------------------------------------------------------------
# The sheet


def test_full_sheet_is_written_with_four_panels_a_row(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    figure = contact_sheet([sample(), sample(scale=(8, 8, 8))], CLASSES, path=path, title="epoch 3")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert labels(figure) == [f"{r}:{k}" for r in (0, 1) for k in ("raw", "target", "prediction", "xz")]
    assert round(figure.get_size_inches()[0] * figure.dpi) == 1400
    said = texts(figure)
    assert "epoch 3" in said
    assert "jrc_x crop 1" in said
    assert any("xy at z=3 of 0–5" in text for text in said)
    assert {"mito", "er", "ves", "target", "prediction"} <= set(said)
    assert not any("absent" in text or "unknown" in text for text in said)


def test_chosen_slices_are_what_is_drawn():
    given = sample()
    figure = contact_sheet([given], CLASSES)
    np.testing.assert_array_equal(panel(figure, "0:raw").images[0].get_array(), given.raw[3])
    y = best_row(given.target[:, 3] > 0.5, given.prediction[:, 3] > 0.5, 12)
    np.testing.assert_array_equal(panel(figure, "0:xz").images[0].get_array(), given.raw[:, y])
    assert [float(m.get_ydata()[0]) for m in by_gid(panel(figure, "0:raw"), "slice-mark")] == [y, y]
    assert [float(m.get_ydata()[0]) for m in by_gid(panel(figure, "0:xz"), "slice-mark")] == [3, 3]


@pytest.mark.parametrize(
    ("shape", "scale"), [((16, 128, 128), (50, 4.6, 4.6)), ((24, 24, 24), (8, 8, 8)), ((3, 20, 40), (4, 16, 8))]
)
def test_panels_have_the_true_aspect_and_one_scale(shape, scale):
    figure = contact_sheet([sample(shape, scale)], CLASSES)
    for label, nm in (("raw", scale[1:]), ("target", scale[1:]), ("xz", (scale[0], scale[2]))):
        vertical, horizontal = nm_per_inch(panel(figure, f"0:{label}"), nm)
        assert vertical == pytest.approx(horizontal)
        assert horizontal == pytest.approx(nm_per_inch(panel(figure, "0:raw"), scale[1:])[1])


def test_very_tall_xz_is_shrunk_true_to_scale_and_gets_its_own_bar():
    figure = contact_sheet([sample((6, 12, 16), (400, 8, 8))], CLASSES)
    vertical, horizontal = nm_per_inch(panel(figure, "0:xz"), (400, 8))
    assert vertical == pytest.approx(horizontal)
    assert horizontal > nm_per_inch(panel(figure, "0:raw"), (8, 8))[1]
    assert len(by_gid(panel(figure, "0:xz"), "scale-bar")) == 1


def test_scale_bar_has_the_right_length_in_voxels():
    figure = contact_sheet([sample((6, 128, 128), (50, 4.6, 4.6))], CLASSES)
    axes = panel(figure, "0:raw")
    (bar,) = by_gid(axes, "scale-bar")
    assert bar.get_width() == pytest.approx(200 / 4.6)
    assert [t.get_text() for t in axes.texts] == ["200 nm"]
    assert not by_gid(panel(figure, "0:xz"), "scale-bar")
    large = contact_sheet([sample((32, 64), (100, 100))], CLASSES)
    assert [t.get_text() for t in panel(large, "0:raw").texts] == ["2 µm"]


def test_target_is_solid_prediction_dashed_in_the_color_of_the_class():
    figure = contact_sheet([sample(), sample()], CLASSES)
    for c, name in enumerate(CLASSES):
        for row in (0, 1):
            (target,) = by_gid(panel(figure, f"{row}:target"), f"target:{name}")
            (prediction,) = by_gid(panel(figure, f"{row}:prediction"), f"prediction:{name}")
            assert target.get_linestyle() in ("solid", "-")
            assert prediction.get_linestyle() not in ("solid", "-")
            for line in (target, prediction):
                assert matplotlib.colors.to_hex(line.get_edgecolor()) == outline_colors(3)[c]
                assert line.get_linewidth() < 1.5
    gids = {a.get_gid() for a in panel(figure, "0:xz").get_children()}
    assert any(str(g).startswith("target:") for g in gids)
    assert any(str(g).startswith("prediction:") for g in gids)


def test_prediction_threshold_is_above_one_half():
    probability = np.zeros((1, 4, 4))
    probability[0, 0, 0], probability[0, 2, 2] = 0.5, 0.51
    figure = contact_sheet([SheetSample(np.zeros((4, 4)), None, probability, (8, 8))], ["mito"])
    (line,) = by_gid(panel(figure, "0:prediction"), "prediction:mito")
    assert len(line.get_path()) == 5
    assert labels(figure) == ["0:raw", "0:prediction"]


def test_two_dimensions_have_no_xz():
    figure = contact_sheet([sample((12, 16), (4.6, 4.6))], CLASSES)
    assert labels(figure) == ["0:raw", "0:target", "0:prediction"]
    assert not any("z=" in text for text in texts(figure))
    assert labels(contact_sheet([sample((12, 16), (50, 4.6, 4.6))], CLASSES)) == labels(figure)
    assert labels(contact_sheet([sample((1, 12, 16), (50, 4.6, 4.6))], CLASSES)) == labels(figure)


def test_raw_only_and_without_prediction():
    raw_only = contact_sheet([sample(target=False, prediction=False)], CLASSES)
    assert labels(raw_only) == ["0:raw", "0:xz"]
    assert not raw_only.legends
    assert labels(contact_sheet([sample(target=False, prediction=False)], [])) == ["0:raw", "0:xz"]
    three = contact_sheet([sample(prediction=False)], CLASSES)
    assert labels(three) == ["0:raw", "0:target", "0:xz"]
    assert "prediction" not in texts(three)


def test_samples_of_different_kinds_share_a_sheet():
    figure = contact_sheet(
        [sample(), sample(prediction=False), sample((12, 16), (8, 8), target=False)], CLASSES, title="mixed"
    )
    assert labels(figure) == [
        *("0:raw", "0:target", "0:prediction", "0:xz"),
        *("1:raw", "1:target", "1:xz"),
        *("2:raw", "2:prediction"),
    ]
    assert {"no prediction", "no target", "no slice along z"} <= set(texts(figure))


def test_single_class():
    figure = contact_sheet([sample(classes=1)], ["mito"])
    assert len(figure.axes) == 4
    assert {"mito"} <= set(texts(figure))


def test_many_classes_list_only_those_that_occur(tmp_path):
    names = [f"_{i}$organelle$" for i in range(48)]  # names that matplotlib would treat in its own way
    raw = np.random.default_rng(0).normal(size=(4, 16, 16))
    target = np.zeros((48, 4, 16, 16), dtype=np.float32)
    for c in range(15):
        target[c, 1, c, 2:9] = 1
    target[20, 3, 0, 0] = 1  # off the slices that are shown
    prediction = np.zeros_like(target)
    prediction[30, 1, :4, :4] = 1
    figure = contact_sheet([SheetSample(raw, target, prediction, (8, 8, 8))], names, path=tmp_path / "many.png")
    said = texts(figure)
    assert [n for n in names if n in said] == [*names[:15], names[30]]
    assert f"{names[20]} (off slice)" in said
    assert "+ 31 absent" in said
    (legend,) = figure.legends
    assert legend._ncols > 1
    (line,) = by_gid(panel(figure, "0:prediction"), f"prediction:{names[30]}")
    assert matplotlib.colors.to_hex(line.get_edgecolor()) == outline_colors(48)[30]
    renderer = figure.canvas.get_renderer()
    assert legend.get_window_extent(renderer).x1 <= figure.bbox.x1
    assert legend.get_window_extent(renderer).y0 > panel(figure, "0:raw").get_window_extent().y1


def test_unknown_is_hatched_where_it_is_unknown_for_all_and_named_where_for_some(tmp_path):
    given = sample((6, 12, 16), (8, 8, 8))
    given.target[:, :, :, 12:] = np.nan
    given.target[1] = np.nan
    given.target[2, :, 9:] = np.nan
    figure = contact_sheet([given], CLASSES, path=tmp_path / "unknown.png")
    (hatched,) = by_gid(panel(figure, "0:target"), "unknown")
    assert hatched.get_hatch()
    assert {tuple(v) for v in hatched.get_path().vertices} == {(11.5, -0.5), (15.5, -0.5), (15.5, 11.5), (11.5, 11.5)}
    assert by_gid(panel(figure, "0:xz"), "unknown")
    assert not by_gid(panel(figure, "0:prediction"), "unknown")
    assert by_gid(panel(figure, "0:prediction"), "dimmed")
    assert not by_gid(panel(figure, "0:raw"), "dimmed")
    facts = next(text for text in texts(figure) if "per voxel" in text)
    assert "unknown: er" in facts
    assert "partly unknown: ves (25 %)" in facts
    assert "mito" not in facts
    assert "unknown for every class" in texts(figure)


def test_nothing_annotated():
    given = sample()
    given.target[:] = np.nan
    figure = contact_sheet([given], CLASSES)
    assert any("nothing is annotated here" in text for text in texts(figure))


def test_long_lists_of_unknown_classes_are_cut():
    target = np.full((30, 8, 8), np.nan)
    target[0] = 0
    figure = contact_sheet([SheetSample(np.zeros((8, 8)), target, None, (8, 8))], [f"c{i}" for i in range(30)])
    assert any("unknown: c1, c2, c3, c4, c5, c6 + 23 more" in " ".join(text.split()) for text in texts(figure))


def test_more_samples_than_rows_and_long_headers(tmp_path):
    figure = contact_sheet([sample(header="word " * 300)] * 5, CLASSES, max_rows=2, path=tmp_path / "rows.png")
    assert len(figure.axes) == 8
    assert any("the first 2 of 5 samples" in text for text in texts(figure))
    renderer = figure.canvas.get_renderer()
    assert all(text.get_window_extent(renderer).x1 <= figure.bbox.x1 for text in figure.texts)
    assert sum("word" in text for text in texts(figure)) == 6


def test_fill_tints_the_inside():
    outline = contact_sheet([sample()], CLASSES)
    fill = contact_sheet([sample()], CLASSES, overlay="fill")
    assert len(panel(fill, "0:target").patches) == len(panel(outline, "0:target").patches) + 3
    assert len(panel(fill, "0:xz").patches) > len(panel(outline, "0:xz").patches)


def test_more_voxels_than_pixels_are_averaged():
    figure = contact_sheet([sample((2, 8, 700), (8, 8, 8))], CLASSES)
    assert panel(figure, "0:raw").images[0].get_interpolation() == "antialiased"


def test_tensors_of_any_float_type_are_taken():
    given = sample()
    tensors = SheetSample(
        torch.from_numpy(given.raw).to(torch.bfloat16),
        torch.from_numpy(given.target),
        torch.from_numpy(given.prediction).half().requires_grad_(),
        given.scale,
    )
    assert len(contact_sheet([tensors], CLASSES).axes) == 4


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        ([], {}, "at least one sample"),
        ([SheetSample(np.zeros(4), None, None, (8, 8, 8))], {}, "raw must be"),
        ([SheetSample(np.zeros((0, 4, 4)), None, None, (8, 8, 8))], {}, "not empty"),
        ([SheetSample(np.zeros((4, 4)), None, None, (8,))], {}, "scale must be"),
        ([SheetSample(np.zeros((4, 4, 4)), None, None, (8, 8))], {}, "scale must be"),
        ([SheetSample(np.zeros((4, 4)), None, None, (8, 0))], {}, "scale must be"),
        ([SheetSample(np.zeros((4, 4)), np.zeros((2, 4, 4)), None, (8, 8))], {}, "target must have one channel"),
        ([SheetSample(np.zeros((4, 4)), None, np.zeros((3, 4, 5)), (8, 8))], {}, "prediction must have one channel"),
        ([sample()], {"max_rows": 0}, "max_rows"),
        ([sample()], {"overlay": "glow"}, "overlay must be"),
    ],
)
def test_what_cannot_be_drawn_is_refused(samples, options, message):
    with pytest.raises(CellMapValueError, match=message):
        contact_sheet(samples, CLASSES, **options)


def test_one_text_is_not_a_list_of_classes():
    with pytest.raises(CellMapTypeError, match="single text"):
        contact_sheet([sample()], "mit")


# ---------------------------------------------------------------------------------------------------------------------
# Manners


def test_missing_matplotlib_is_one_plain_sentence(monkeypatch, tmp_path):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.partition(".")[0] in ("matplotlib", "contourpy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    (tmp_path / "metrics.csv").write_text("step\n")
    for call in (
        lambda: contact_sheet([sample()], CLASSES),
        lambda: training_curves(tmp_path / "metrics.csv"),
        lambda: outline_paths(np.ones((2, 2))),
    ):
        with pytest.raises(MissingExtraError, match=r'pip install "cellmap-lightning\[train\]"'):
            call()


def test_pyplot_backend_and_style_are_left_alone():
    code = (
        "import sys, numpy as np, cellmap_lightning.visualization.figures as f\n"
        "assert 'matplotlib' not in sys.modules\n"
        "import matplotlib\n"
        "matplotlib.rcParams['font.size'] = 31\n"
        "before = dict(matplotlib.rcParams.copy())\n"
        "f.contact_sheet([f.SheetSample(np.zeros((4, 4)), np.ones((1, 4, 4)), None, (8, 8))], ['a'])\n"
        "assert dict(matplotlib.rcParams.copy()) == before\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
        "assert matplotlib.get_backend().lower() == 'svg'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "MPLBACKEND": "svg"},
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def write_metrics(path, rows):
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path


def curves(figure, label):
    return {line.get_gid(): line for line in panel(figure, label).lines}


def test_curves_of_a_whole_training(tmp_path):
    rows = [{"epoch": s // 10, "step": s, "train/loss": 1 / (1 + s)} for s in range(40)]
    for s in (9, 19, 29, 39):
        dice = {"val/dice_mito": s / 50, "val/dice_er": "nan", "val/dice_ves": "" if s == 19 else 0.5}
        rows.append({"epoch": s // 10, "step": s, "val/loss": 0.5, "val/dice": 0.4, **dice})
    metrics = write_metrics(tmp_path / "metrics.csv", rows)
    figure = training_curves(metrics, tmp_path / "figs" / "curves.png")
    assert (tmp_path / "figs" / "curves.png").stat().st_size > 5000
    assert labels(figure) == ["loss", "dice"]
    loss, dice = curves(figure, "loss"), curves(figure, "dice")
    assert set(loss) == {"train", "smooth", "val"}
    assert len(loss["train"].get_xdata()) == len(loss["smooth"].get_xdata()) == 40
    np.testing.assert_array_equal(loss["val"].get_xdata(), [9, 19, 29, 39])
    assert set(dice) == {"dice", "dice:mito", "dice:ves"}
    np.testing.assert_array_equal(dice["dice:ves"].get_xdata(), [9, 29, 39])
    np.testing.assert_allclose(dice["dice:mito"].get_ydata(), np.array([9, 19, 29, 39]) / 50)
    np.testing.assert_allclose(dice["dice"].get_ydata(), 0.4)
    assert "never occurred: er" in texts(figure)
    assert panel(figure, "loss").get_xlim() == panel(figure, "dice").get_xlim()
    assert panel(figure, "loss").get_yscale() == "log"  # from 1 to 1/40
    names = [text.get_text() for text in panel(figure, "dice").texts]
    assert sorted(name.split()[-1] for name in names) == ["mean", "mito", "ves"]


def test_smoothing_is_a_mean_that_stays_within_the_values(tmp_path):
    values = np.random.default_rng(0).uniform(1, 2, 400)
    metrics = write_metrics(tmp_path / "m.csv", [{"step": i, "train/loss": v} for i, v in enumerate(values)])
    smooth = curves(training_curves(metrics), "loss")["smooth"].get_ydata()
    np.testing.assert_allclose(smooth[200], values[190:211].mean())
    assert smooth.std() < values.std() / 3
    np.testing.assert_allclose(smooth[0], values[:11].mean())


def test_mean_is_made_from_the_classes_where_it_is_missing(tmp_path):
    rows = [
        {"step": 1, "val/dice_a": 0.2, "val/dice_b": 0.4},
        {"step": 2, "val/dice_a": 0.6, "val/dice_b": "nan"},
    ]
    dice = curves(training_curves(write_metrics(tmp_path / "m.csv", rows)), "dice")
    np.testing.assert_allclose(dice["dice"].get_ydata(), [0.3, 0.6])


@pytest.mark.parametrize(
    ("rows", "drawn"),
    [
        ([{"step": 1, "val/loss": 0.5}], {"loss": {"val"}, "dice": set()}),
        ([{"step": 1, "train/loss_step": 0.5}, {"step": 2, "train/loss_step": 0.4}], {"loss": {"train", "smooth"}}),
        ([{"epoch": 0, "val/dice": 0.5}], {"loss": set(), "dice": {"dice"}}),
        ([{"val/dice_a": 0.5}], {"dice": {"dice", "dice:a"}}),
        ([{"val/dice": 0.5, "val/dice_step": 0.1, "val/dice_epoch": 0.5}], {"dice": {"dice"}}),
        ([{"step": 1, "train/loss": "nan", "val/loss": "inf", "val/dice_a": ""}], {"loss": set(), "dice": set()}),
        ([{"step": "x", "train/loss": "what"}], {"loss": set(), "dice": set()}),
        ([{"step": "", "other": ""}], {"loss": set(), "dice": set()}),
    ],
)
def test_curves_with_columns_missing(tmp_path, rows, drawn):
    figure = training_curves(write_metrics(tmp_path / "m.csv", rows), tmp_path / "c.png")
    assert len(figure.axes) == 2
    for label, gids in drawn.items():
        assert set(curves(figure, label)) == gids


def test_curves_of_an_empty_file(tmp_path):
    (tmp_path / "m.csv").write_text("")
    assert len(training_curves(tmp_path / "m.csv").axes) == 2


def test_losses_that_are_not_finite_are_counted(tmp_path):
    rows = [{"step": s, "train/loss": "nan" if s in (3, 4) else 1.0} for s in range(10)]
    rows += [{"step": 5, "train/loss": ""}]
    figure = training_curves(write_metrics(tmp_path / "m.csv", rows))
    entries = [text.get_text() for text in panel(figure, "loss").get_legend().get_texts()]
    assert "train (2 not finite)" in entries


def test_names_of_many_classes_do_not_overlap(tmp_path):
    row = {"step": 1, **{f"val/dice_c{i}": 0.5 for i in range(48)}}
    figure = training_curves(write_metrics(tmp_path / "m.csv", [row]), tmp_path / "c.png")
    axes = panel(figure, "dice")
    places = sorted(text.get_position()[1] for text in axes.texts)
    inches = np.diff(places) * axes.get_position().height * figure.get_size_inches()[1]
    assert len(places) == 49
    assert inches.min() > 8 / 72
    assert places[0] >= 0
    assert places[-1] <= 1.001


def test_colors_of_curves_follow_the_given_classes(tmp_path):
    metrics = write_metrics(tmp_path / "m.csv", [{"step": 1, "val/dice_er": 0.5, "val/dice_mito": 0.6}])
    mine, other = (curves(training_curves(metrics, classes=c), "dice") for c in (["mito", "er"], ["er", "mito"]))
    assert mine["dice:er"].get_color() == other["dice:mito"].get_color() != mine["dice:mito"].get_color()


def test_missing_file():
    with pytest.raises(CellMapFileNotFoundError, match=r"no metrics file nowhere\.csv"):
        training_curves("nowhere.csv")
