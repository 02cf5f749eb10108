"""Training curves: columns, missing values and labels."""

import csv

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.visualization.figures import training_curves
from tests.visualization.drawings import labels, panel, texts

pytest.importorskip("matplotlib")


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


def test_mean_is_computed_from_the_classes_if_it_is_missing(tmp_path):
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
        (
            [{"step": 1, "train_loss": 0.5, "val_loss": 0.5, "val_dice": 0.5, "val_dice_a": 0.5}],
            {"loss": {"train", "smooth", "val"}, "dice": {"dice", "dice:a"}},
        ),
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
    assert "train\n(2 not finite)" in entries


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


def test_colors_of_curves_follow_the_order_of_classes(tmp_path):
    metrics = write_metrics(tmp_path / "m.csv", [{"step": 1, "val/dice_er": 0.5, "val/dice_mito": 0.6}])
    mine, other = (curves(training_curves(metrics, classes=c), "dice") for c in (["mito", "er"], ["er", "mito"]))
    assert mine["dice:er"].get_color() == other["dice:mito"].get_color() != mine["dice:mito"].get_color()


def test_missing_metrics_file():
    with pytest.raises(CellMapFileNotFoundError, match=r"no metrics file nowhere\.csv"):
        training_curves("nowhere.csv")


def losses(steps, value):
    return [{"step": s, "train/loss": value} for s in steps]


@pytest.mark.parametrize(
    ("starts", "expected"),
    [
        ([(range(4), 1.0), (range(4, 6), 2.0)], [1, 1, 1, 1, 2, 2]),
        ([(range(5), 1.0), (range(3, 6), 2.0)], [1, 1, 1, 2, 2, 2]),
        ([(range(5), 1.0), (range(2, 6), 2.0), (range(4, 8), 3.0)], [1, 1, 2, 2, 3, 3, 3, 3]),
        ([(range(2), 1.0), (range(2), 2.0)], [2, 2]),
    ],
)
def test_curves_of_several_starts(tmp_path, starts, expected):
    """Steps that are repeated after a resume are drawn once, with their later values."""
    files = []
    for number, (steps, value) in enumerate(starts):
        files.append(write_metrics(tmp_path / f"{number}.csv", losses(steps, value)))
    line = curves(training_curves(files), "loss")["train"]
    np.testing.assert_array_equal(line.get_xdata(), np.arange(len(expected)))
    np.testing.assert_array_equal(line.get_ydata(), expected)


def test_a_later_start_replaces_only_what_it_has(tmp_path):
    """The untrained network is validated again at step 0; the losses of that step are in the first file."""
    first = write_metrics(tmp_path / "1.csv", [*losses(range(3), 1.0), {"step": 0, "val/loss": 5.0}])
    second = write_metrics(tmp_path / "2.csv", [{"step": 0, "val/loss": 4.0}, *losses(range(3, 5), 2.0)])
    drawn = curves(training_curves([first, second]), "loss")
    np.testing.assert_array_equal(drawn["train"].get_ydata(), [1, 1, 1, 2, 2])
    np.testing.assert_array_equal(drawn["val"].get_ydata(), [4])


@pytest.mark.parametrize("lost", [0, 3])
@pytest.mark.parametrize("kinds", [("train/loss", "val/loss"), ("train/loss",), ("val/loss",)])
def test_the_legend_covers_neither_curves_nor_the_title(tmp_path, kinds, lost):
    rows = [{"step": step, **dict.fromkeys(kinds, 1.0)} for step in range(100)]
    rows += [{"step": 100 + step, **dict.fromkeys(kinds, "nan")} for step in range(lost)]
    figure = training_curves(write_metrics(tmp_path / "m.csv", rows))
    axes = panel(figure, "loss")
    figure.canvas.draw()
    legend = axes.get_legend().get_window_extent()
    assert not legend.overlaps(axes.get_window_extent().shrunk(0.99, 0.99))
    assert not legend.overlaps(axes._left_title.get_window_extent())
    assert figure.bbox.y1 >= legend.y1
    assert len(axes.get_legend().get_texts()) == len(kinds) + ("train/loss" in kinds)
