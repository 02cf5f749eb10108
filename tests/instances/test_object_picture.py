"""The picture of a segmentation: sections to scale, with scale bars."""

import numpy as np
import pytest

from cellmap_lightning.commands.segment import segment
from cellmap_lightning.instances.picture import draw_objects
from cellmap_lightning.instances.source import open_source
from cellmap_lightning.io.writer import write_multiscale
from tests.visualization.drawings import by_gid


@pytest.fixture
def figure(tmp_path):
    def figure(shape, step, with_raw=False):
        ids = np.zeros(shape, np.uint32)
        ids[:, 4:-4, 4:-4] = 1
        write_multiscale(tmp_path / "labels", ids, scale=step, translation=(0, 0, 0), mode="mode")
        write_multiscale(
            tmp_path / "pred.zarr" / "mito", (255 * (ids > 0)).astype(np.uint8), scale=step, translation=(0, 0, 0)
        )
        write_multiscale(tmp_path / "raw", (200 - 100 * (ids > 0)).astype(np.uint8), scale=step, translation=(0, 0, 0))
        source = open_source(str(tmp_path / "pred.zarr"), "mito")
        raw = str(tmp_path / "raw") if with_raw else None
        return draw_objects(source, tmp_path / "labels", tmp_path / "s.png", 1, raw)

    return figure


def panels(figure):
    return {axes.get_label(): axes for axes in figure.axes}


@pytest.mark.parametrize("with_raw", [False, True])
@pytest.mark.parametrize(
    ("shape", "step", "lengths"),
    [
        ((32, 48, 64), (8.0, 8.0, 8.0), {"xy": "200 nm", "xz": "200 nm", "yz": "100 nm"}),
        ((20, 64, 64), (40.0, 4.0, 4.0), {"xy": "100 nm", "xz": "100 nm", "yz": "100 nm"}),
        ((32, 40, 40), (100.0, 100.0, 100.0), {"xy": "1 µm", "xz": "1 µm", "yz": "1 µm"}),
    ],
)
def test_each_section_has_a_scale_bar_of_its_length(figure, shape, step, lengths, with_raw):
    drawn = figure(shape, step, with_raw)
    axes = panels(drawn)
    assert set(axes) == {f"{plane}{column}" for plane in lengths for column in (0, 1)}
    nm = dict(zip("zyx", step, strict=True))
    for plane, length in lengths.items():
        (bar,) = by_gid(axes[f"{plane}0"], "scale-bar")
        (text,) = axes[f"{plane}0"].texts
        assert text.get_text() == length
        number, unit = length.split()
        expected = float(number) * (1000 if unit == "µm" else 1)
        assert bar.get_width() * nm[plane[0]] == pytest.approx(expected)
        assert not by_gid(axes[f"{plane}1"], "scale-bar")
    titles = [text.get_text() for text in drawn.texts]
    assert [title for title in titles if ", at " in title] == [
        f"{plane}, at {axis} = {n // 2 * s:,.0f} nm"
        for plane, axis, n, s in zip(("xy", "xz", "yz"), "zyx", shape, step, strict=True)
    ]


@pytest.mark.parametrize(("depth", "has_bar"), [(1, False), (4, False), (16, True)])
def test_only_sections_with_room_have_a_scale_bar(figure, depth, has_bar):
    axes = panels(figure((depth, 64, 64), (8.0, 8.0, 8.0)))
    assert by_gid(axes["xy0"], "scale-bar")
    for plane in ("xz0", "yz0"):
        assert bool(by_gid(axes[plane], "scale-bar")) == has_bar
        assert bool(axes[plane].texts) == has_bar


@pytest.mark.parametrize(
    ("boxes", "planes"),
    [
        # the middle has no objects at all; most are at the end, of which the largest come first
        ([((2, 4), (30, 34), (2, 6)), ((3, 8), (32, 36), (20, 30)), ((3, 5), (2, 6), (40, 44))], {"z": (3, 4)}),
        ([((2, 4), (30, 34), (2, 6)), ((9, 12), (31, 36), (20, 30)), ((12, 14), (31, 33), (40, 44))], {"y": (31, 33)}),
        ([((2, 4), (1, 9), (2, 9)), ((9, 12), (11, 19), (4, 7)), ((12, 14), (21, 29), (6, 12))], {"x": (6, 7)}),
        ([((5, 9), (1, 3), (2, 9)), ((1, 3), (11, 39), (41, 47))], {"z": (1, 3), "y": (1, 3), "x": (41, 47)}),
    ],
)
def test_sections_are_in_the_planes_with_the_most_objects(tmp_path, boxes, planes):
    mask = np.zeros((16, 40, 48), np.uint8)
    for box in boxes:
        mask[tuple(slice(*side) for side in box)] = 255
    write_multiscale(tmp_path / "p.zarr" / "mito", mask, scale=(50, 8, 8), translation=(100, 4, 12))
    summary = segment(str(tmp_path / "p.zarr"), tmp_path / "o.zarr", "mito", method="components")
    assert summary.objects == len(boxes)
    assert summary.picture == tmp_path / "o.png"
    assert summary.picture.is_file()
    source = open_source(str(tmp_path / "p.zarr"), "mito")
    drawn = draw_objects(source, summary.labels, tmp_path / "a.png", summary.objects, table=summary.table)
    titles = [text.get_text() for text in drawn.texts]
    for axis, (low, high) in planes.items():
        number = "zyx".index(axis)
        origin, step = (100, 4, 12)[number], (50, 8, 8)[number]
        (nm,) = [float(t.split("= ")[1][:-3].replace(",", "")) for t in titles if f"at {axis} = " in t]
        assert low <= (nm - origin) / step < high
        image = panels(drawn)[f"{'xyz'.replace(axis, '')}1"].get_images()[0].get_array()
        colors = {tuple(c) for c in np.rint(np.asarray(image).reshape(-1, 3) * 1000).astype(int) if len(set(c)) > 1}
        inside = [box for box in boxes if box[number][0] <= (nm - origin) / step < box[number][1]]
        assert len(colors) >= len(inside)
