"""Contact sheets: positions and contents, independent of fonts."""

import builtins
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError, MissingExtraError
from cellmap_lightning.visualization.figures import (
    SheetSample,
    best_row,
    contact_sheet,
    outline_colors,
    outline_paths,
    training_curves,
)
from tests.visualization.drawings import CLASSES, by_gid, labels, nm_per_inch, panel, sample, texts

matplotlib = pytest.importorskip("matplotlib")


def test_sheet_has_four_panels_a_row(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    figure = contact_sheet([sample(), sample(scale=(8, 8, 8))], CLASSES, path=path, title="epoch 3")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert labels(figure) == [f"{r}:{k}" for r in (0, 1) for k in ("raw", "target", "prediction", "xz")]
    assert round(figure.get_size_inches()[0] * figure.dpi) == 1400
    shown = texts(figure)
    assert "epoch 3" in shown
    assert "jrc_x crop 1" in shown
    assert any("xy at z=3 of 0–5" in text for text in shown)
    assert {"mito", "er", "ves", "target", "prediction"} <= set(shown)
    assert not any("absent" in text or "unknown" in text for text in shown)


def test_best_slices_are_drawn():
    chosen = sample()
    figure = contact_sheet([chosen], CLASSES)
    np.testing.assert_array_equal(panel(figure, "0:raw").images[0].get_array(), chosen.raw[3])
    y = best_row(chosen.target[:, 3] > 0.5, chosen.prediction[:, 3] > 0.5, 12)
    np.testing.assert_array_equal(panel(figure, "0:xz").images[0].get_array(), chosen.raw[:, y])
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


def test_tall_xz_is_shrunk_to_scale_with_its_scale_bar():
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


def test_a_prediction_is_outlined_from_one_half_on():
    probability = np.zeros((1, 4, 4))
    probability[0, 0, 0], probability[0, 2, 2] = 0.499, 0.5
    figure = contact_sheet([SheetSample(np.zeros((4, 4)), None, probability, (8, 8))], ["mito"])
    (line,) = by_gid(panel(figure, "0:prediction"), "prediction:mito")
    assert len(line.get_path()) == 5
    assert labels(figure) == ["0:raw", "0:prediction"]


def test_2d_samples_have_no_xz():
    figure = contact_sheet([sample((12, 16), (4.6, 4.6))], CLASSES)
    assert labels(figure) == ["0:raw", "0:target", "0:prediction"]
    assert not any("z=" in text for text in texts(figure))
    assert labels(contact_sheet([sample((12, 16), (50, 4.6, 4.6))], CLASSES)) == labels(figure)
    assert labels(contact_sheet([sample((1, 12, 16), (50, 4.6, 4.6))], CLASSES)) == labels(figure)


def test_samples_without_target_or_prediction():
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
    assert not any(text.startswith("no ") for text in texts(figure))
    # Panels stand side by side: there is no gap in place of a missing one.
    lefts = {axes.get_label(): round(axes.get_position().x0, 6) for axes in figure.axes}
    assert lefts["1:xz"] == lefts["0:prediction"]
    assert lefts["2:prediction"] == lefts["0:target"]


def test_colors_of_a_run_are_those_of_its_classes():
    figure = contact_sheet([sample()], CLASSES, colors=["#ff0000", "#00ff00", "#0000ff"][: len(CLASSES)])
    patches = [patch for patch in figure.axes[1].patches if (patch.get_gid() or "").startswith("target:")]
    assert to_hex(patches[0].get_edgecolor()) in {"#ff0000", "#00ff00", "#0000ff"}


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
    shown = texts(figure)
    assert [n for n in names if n in shown] == [*names[:15], names[30]]
    assert f"{names[20]} (off slice)" in shown
    assert "+ 31 absent" in shown
    (legend,) = figure.legends
    assert len({round(text.get_window_extent(figure.canvas.get_renderer()).x0) for text in legend.get_texts()}) > 1
    (line,) = by_gid(panel(figure, "0:prediction"), f"prediction:{names[30]}")
    assert matplotlib.colors.to_hex(line.get_edgecolor()) == outline_colors(48)[30]
    renderer = figure.canvas.get_renderer()
    assert legend.get_window_extent(renderer).x1 <= figure.bbox.x1
    assert legend.get_window_extent(renderer).y0 > panel(figure, "0:raw").get_window_extent().y1


def test_unknown_for_all_classes_is_hatched_and_for_some_is_named(tmp_path):
    masked = sample((6, 12, 16), (8, 8, 8))
    masked.target[:, :, :, 12:] = np.nan
    masked.target[1] = np.nan
    masked.target[2, :, 9:] = np.nan
    figure = contact_sheet([masked], CLASSES, path=tmp_path / "unknown.png")
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
    tiled = texts(contact_sheet([masked], CLASSES, unknown="scored in another tile"))
    assert "scored in another tile" in tiled
    assert "unknown for every class" not in tiled
    # Of a class that is annotated elsewhere in the sample, in its colour; er is annotated nowhere.
    (partly,) = by_gid(panel(figure, "0:target"), "unknown:ves")
    assert matplotlib.colors.to_hex(partly.get_edgecolor()) == outline_colors(len(CLASSES))[2]
    assert {tuple(v) for v in partly.get_path().vertices} == {(-0.5, 8.5), (11.5, 8.5), (11.5, 11.5), (-0.5, 11.5)}
    assert hatched.get_linewidth() > 0  # a border shows bands that are thinner than the distance of the lines
    assert partly.get_linewidth() > 0
    assert not by_gid(panel(figure, "0:target"), "unknown:er")
    assert not by_gid(panel(figure, "0:prediction"), "unknown:ves")
    assert [text for text in texts(figure) if text.endswith(" unknown")] == ["ves unknown"]


@pytest.mark.parametrize("width", [1, 3, 12])
@pytest.mark.parametrize("side", [40, 160])
@pytest.mark.parametrize("channels", [slice(None), 0])
def test_unknown_voxels_are_visible_in_every_panel(tmp_path, side, width, channels):
    """Many pixels of a hatched band, however thin, differ from those where it is known, and some from each other."""
    known = SheetSample(np.full((side, side), 0.5), np.zeros((2, side, side)), np.zeros((2, side, side)), (8, 8))
    masked = replace(known, target=known.target.copy())
    masked.target[channels, :, :width] = np.nan
    pictures = []
    for number, one in enumerate((known, masked)):
        figure = contact_sheet([one], ["mito", "er"], path=tmp_path / f"{number}.png")
        canvas = figure.canvas
        canvas.draw()
        box = panel(figure, "0:target").get_window_extent()
        pixels = np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(int)
        pictures.append(pixels[round(box.y0) : round(box.y1), round(box.x0) : round(box.x0 + box.width * width / side)])
    differs = np.abs(pictures[0] - pictures[1]).max(axis=2) > 40
    assert differs.mean() > 0.15
    assert np.ptp(pictures[1].max(axis=2)) > 60


def test_unannotated_sample():
    masked = sample()
    masked.target[:] = np.nan
    figure = contact_sheet([masked], CLASSES)
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


def test_tensors_of_any_float_type_are_accepted():
    masked = sample()
    tensors = SheetSample(
        torch.from_numpy(masked.raw).to(torch.bfloat16),
        torch.from_numpy(masked.target),
        torch.from_numpy(masked.prediction).half().requires_grad_(),
        masked.scale,
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
def test_invalid_arguments_are_refused(samples, options, message):
    with pytest.raises(CellMapValueError, match=message):
        contact_sheet(samples, CLASSES, **options)


def test_classes_as_a_single_string_are_refused():
    with pytest.raises(CellMapTypeError, match="single text"):
        contact_sheet([sample()], "mit")


# -- side effects


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
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
        with pytest.raises(MissingExtraError, match=r'pip install -e "\.\[train\]"'):
            call()


def test_pyplot_backend_and_style_are_untouched():
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
