"""Empty sections inside objects, unknown voxels that are counted, and the text of the report."""

import csv

import numpy as np
import pytest

from cellmap_lightning.inspection import report as report_module
from cellmap_lightning.inspection.formats import wrapped
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.writer import write_multiscale

SCALE = (50, 8, 8)


def ball():
    """Voxels of an object that all of 12 sections cut."""
    z, y, x = np.ogrid[:12, :32, :32]
    return ((y - 16) ** 2 + (x - 16) ** 2 + 0 * z <= 64).astype(np.uint8)


@pytest.fixture
def look(tmp_path, monkeypatch):
    """A function that inspects a raw volume with crops of the class mito, given their voxels."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))

    def report(*crops, deep=True, others=0, **settings):
        base = tmp_path / "jrc_a.zarr" / "recon-1"
        rows = []
        placed = {"scale": SCALE, "translation": (25, 4, 4)}
        write_multiscale(base / "em" / "raw", np.full((24, 32, 32), 7, np.uint8), **placed, overwrite=True)
        for number, labels in enumerate(crops):
            path = base / "labels" / "groundtruth" / f"crop{number}" / "mito"
            write_multiscale(path, labels, scale=SCALE, translation=(25 + 600 * number, 4, 4), overwrite=True)
            rows.append(["validate" if number == 1 else "train", str(base / "em" / "raw"), f"{path.parent}/[mito]"])
        for number in range(others):
            raw = tmp_path / f"other{number}.zarr" / "em"
            write_multiscale(raw, np.full((8, 8, 8), 7, np.uint8), **placed, overwrite=True)
            rows.append(["predict", str(raw), ""])
        with (tmp_path / "crops.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
        data = {"csv_path": str(tmp_path / "crops.csv"), "leakage": "ignore", **settings}
        return inspect(data, {"shape": [4, 16, 16], "scale": list(SCALE)}, None, deep=deep)

    return report


def without(*sections):
    labels = ball()
    labels[list(sections)] = 0
    return labels


@pytest.mark.parametrize(
    ("sections", "text"),
    [
        ((5,), "section 5 (z 250..300 nm)"),
        ((4, 5, 6), "section 4 to 6 (z 200..350 nm)"),
        ((2, 8, 9), "section 2 (z 100..150 nm), 8 to 9 (z 400..500 nm)"),
    ],
)
def test_empty_sections_that_cut_objects_are_named(look, sections, text):
    report = look(without(*sections))
    (problem,) = (problem for problem in report.problems if problem.kind == "gaps")
    assert problem.where == "jrc_a/crop0"
    assert problem.text.startswith(f"mito: no voxel in {text}, counted from 0, though objects continue on both sides")
    assert "mark the sections as unknown: in a mask from Fiji fill them with 128" in problem.text
    assert problem.text.endswith("they have to be annotated")


def ends():
    return without(0, 1, 11)


def apart():
    """Two objects, one above the other and beside it."""
    labels = np.zeros((12, 32, 32), np.uint8)
    labels[:5, :8, :8] = labels[6:, 20:, 20:] = 1
    return labels


@pytest.mark.parametrize("make", [ball, ends, apart])
def test_sections_that_cut_nothing_are_no_problem(look, make):
    assert not [problem for problem in look(make()).problems if problem.kind == "gaps"]


@pytest.mark.parametrize("make", [ball, lambda: np.zeros((12, 32, 32), np.uint8), apart])
def test_deep_leaves_nothing_open(look, monkeypatch, make):
    monkeypatch.setattr(report_module, "COUNTED_AT_ONCE", 0)
    shallow, deep = (look(make(), deep=deep) for deep in (False, True))
    assert "?: not in the metadata" in str(shallow)
    assert "?" not in str(deep)
    assert deep.crops[0].classes["mito"].unknown == 0


@pytest.mark.parametrize("sizes", [1, 2])
@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_small_labels_are_counted_at_once(look, monkeypatch, sizes, extra):
    monkeypatch.setattr(report_module, "COUNTED_AT_ONCE", sizes * ball().size + extra)
    report = look(*[without(5)] * sizes, deep=False)
    is_counted = extra >= 0
    assert report.counted is is_counted
    assert (report.crops[0].classes["mito"].voxels is not None) is is_counted
    assert len([problem for problem in report.problems if problem.kind == "gaps"]) == sizes * is_counted
    assert ("?: not in the metadata" in str(report)) is not is_counted
    assert ("deep=true counts" in " ".join(str(report).split())) is not is_counted


@pytest.mark.parametrize(("limit", "deep"), [(0, False), (0, True), (1 << 26, False)])
def test_no_problems_are_found_where_they_were_looked_for(look, monkeypatch, limit, deep):
    monkeypatch.setattr(report_module, "COUNTED_AT_ONCE", limit)
    lines = str(look(ball(), ball(), deep=deep)).splitlines()
    of_metadata = "No problems found in the metadata; deep=true reads the voxels"
    assert lines.count(of_metadata) == (not deep and not limit)
    assert lines.count("No problems found") == (deep or limit > 0)


@pytest.mark.parametrize("others", [1, 2, 3])
def test_volumes_without_crops_are_listed(look, others):
    text = str(look(ball(), others=others))
    assert f"Raw volumes ({1 + others})" in text
    assert text.count("raw only: no crop annotates it") == others


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({}, "jrc_a/crop1 for validation, as the CSV or data.datasets says"),
        ({"split": "random", "val_fraction": 0.5}, "drawn at random with the seed"),
        ({"split": "kfold", "n_folds": 2, "fold": 1}, "as the part data.fold of data.n_folds"),
    ],
)
def test_crops_of_the_validation_have_a_reason(look, settings, reason):
    text = " ".join(str(look(ball(), ball(), **settings)).split())
    assert reason in text


@pytest.mark.parametrize("columns", [80, 100, 120])
@pytest.mark.parametrize("deep", [False, True])
def test_lines_fit_the_terminal(look, monkeypatch, columns, deep):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = str(look(without(3), ball(), others=1, deep=deep))
    # Paths are not broken.
    long = [line for line in text.splitlines() if len(line) > columns]
    assert [line for line in long if "/" not in line or line.startswith("jrc_a/")] == []
    assert not [line for line in text.splitlines() if line != line.rstrip()]
    rows = [line for line in text.partition("\nClasses\n")[0].splitlines() if line.startswith("jrc_a/crop0 ")]
    assert [row for row in rows if "0..600  0..256  0..256" in row] == rows[-1:]


@pytest.mark.parametrize(("columns", "tables"), [(40, 2), (50, 2), (60, 1), (200, 1)])
def test_boxes_are_a_table_of_their_own_on_narrow_terminals(look, monkeypatch, columns, tables):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = str(look(ball(), ball())).partition("\nClasses\n")[0]
    rows = [line for line in text.splitlines() if line.startswith("jrc_a/crop1 ")]
    assert len(rows) == tables
    assert rows[-1].endswith("600..1200  0..256  0..256")
    assert ("val" in rows[-1].split()) == (tables == 1)


@pytest.mark.parametrize("wrong", ["crop", "class", "raw"])
@pytest.mark.parametrize("deep", [False, True])
def test_what_cannot_be_read_leaves_no_empty_row(look, tmp_path, wrong, deep):
    look(ball(), deep=False)
    base = tmp_path / "jrc_a.zarr" / "recon-1"
    place = {"crop": "labels/groundtruth/crop0", "class": "labels/groundtruth/crop0/mito", "raw": "em/raw"}[wrong]
    (base / place).rename(tmp_path / "elsewhere")
    text = str(inspect({"csv_path": str(tmp_path / "crops.csv")}, {}, None, deep=deep))
    assert "cannot be read" in text
    assert "in all of them: nm (z y x) ," not in text
    lines = text.splitlines()
    headings = [number for number, line in enumerate(lines) if line.split()[:2] == ["class", "crops"]]
    assert all(lines[number + 1] for number in headings), text
    assert not deep or "deep=true counts" not in text


def test_wrapped_lines_keep_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert wrapped("a      bb ccc dddd eeeee", 2, 7) == "  a      bb ccc dddd\n         eeeee"
