"""The pictures of a training: samples of one sheet differ from each other."""

import csv
from itertools import combinations

import pytest
from matplotlib.colors import to_hex

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.training import report
from cellmap_lightning.visualization.figures import training_curves


@pytest.fixture
def drawn(volume, tmp_path, monkeypatch):
    """A function that returns the headers of the samples that are drawn of validation crops."""

    def headers(targets, patch, count=4):
        spec = {"shape": patch, "scale": [10.48, 8, 8]}
        rows = []
        monkeypatch.setattr(report, "contact_sheet", lambda samples, *_, **__: rows.extend(samples))
        entries = [{"raw": volume.raw_path, "gt": f"{volume.path}/recon-1/labels/groundtruth/{t}"} for t in targets]
        datasets = {"validate": entries}
        data = CellMapDataModule(["mito", "er", "pm"], {"raw": spec}, {"labels": spec}, datasets=datasets)
        with data:
            data.setup("validate")
            report.write_samples(data.val_dataset, None, tmp_path / "samples.png", count=count)
        return rows

    return headers


def centre(row):
    """Crop and centre, nm, of a row."""
    crop, _, text = row.header.partition(", centre ")
    return crop, [float(part.split()[1]) for part in text.split(", ")]


@pytest.mark.parametrize("patch", [[32, 48, 48], [16, 24, 24], [8, 32, 32]], ids=str)
def test_no_sample_repeats_another(drawn, patch):
    rows = drawn(["crop4/[mito,er,pm]"], patch)
    assert 1 <= len(rows) <= 4
    extent = [n * s for n, s in zip(patch, (10.48, 8, 8), strict=True)]
    for (_, one), (_, other) in combinations(map(centre, rows), 2):
        assert any(abs(a - b) >= n / 2 for a, b, n in zip(one, other, extent, strict=True))


def test_every_crop_and_every_class_is_shown_before_one_is_shown_again(drawn):
    rows = drawn(["crop1/[mito,er]", "crop3/[mito,er,pm]", "crop4/[mito,er,pm]"], [16, 24, 24], count=3)
    assert len({centre(row)[0] for row in rows}) == 3
    shown = {number for row in rows for number, mask in enumerate(row.target) if (mask == 1).any()}
    assert shown == {0, 1, 2}


@pytest.mark.parametrize("classes", [["mito", "er", "pm"], ["pm", "er", "mito"], ["er", "mito", "pm"]])
def test_curves_have_the_colors_of_the_samples(tmp_path, monkeypatch, classes):
    with (tmp_path / "metrics.csv").open("w", newline="") as file:
        columns = [f"val/dice_{name}" for name in sorted(classes)]  # as the logger writes them
        csv.writer(file).writerows([["step", *columns], [0, 0.1, 0.2, 0.3], [1, 0.4, 0.5, 0.6]])
    drawn = []
    monkeypatch.setattr(report, "training_curves", lambda *a, **kw: drawn.append(training_curves(*a, **kw)))
    report.write_curves(tmp_path, classes)
    lines = {line.get_gid(): to_hex(line.get_color()) for axes in drawn[0].axes for line in axes.lines}
    # The first three of the palette, as dark as a white ground needs.
    assert [lines[f"dice:{name}"] for name in classes] == ["#438cb5", "#ac7700", "#009b6e"]


def test_the_metrics_of_a_run_are_in_the_order_of_its_starts(tmp_path):
    names = ["metrics.csv", "metrics.10.csv", "metrics.2.csv", "metrics.1.csv", "metrics.old.csv"]
    for name in names:
        (tmp_path / name).write_text("step\n")
    found = [path.name for path in report.metrics_files(tmp_path)]
    assert found == ["metrics.1.csv", "metrics.2.csv", "metrics.10.csv", "metrics.csv"]
    (tmp_path / "metrics.csv").unlink()
    assert [path.name for path in report.metrics_files(tmp_path)] == found[:-1]
    assert report.metrics_files(tmp_path / "none") == []
