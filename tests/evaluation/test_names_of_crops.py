"""Crops of one name in several folders of annotations: their names, their scores and parameters tuned on them."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.evaluation.crop_names import crop_names
from cellmap_lightning.evaluation.held_out import split_crops
from cellmap_lightning.evaluation.predicted_crops import predicted_crops
from cellmap_lightning.io.writer import write_multiscale
from tests.commands.test_cli import run_forked

STEP = (8, 8, 8)
ANNOTATION = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": 255}}


@pytest.mark.parametrize(
    ("folders", "names"),
    [
        (["a.zarr/gt/crop1", "a.zarr/gt/crop2"], ["crop1", "crop2"]),
        (["a.zarr/gt/crop1", "b.zarr/gt/crop1", "b.zarr/gt/crop2"], ["a/crop1", "b/crop1", "crop2"]),
        (["x/a.zarr/r1/crop1", "x/a.zarr/r2/crop1", "b.zarr/crop1"], ["r1/crop1", "r2/crop1", "b/crop1"]),
        (["first/crops/crop1", "second/crops/crop1"], ["first/crops/crop1", "second/crops/crop1"]),
        (["a.zarr/crop1", "plain/crop1", "other/crop1"], ["a/crop1", "plain/crop1", "other/crop1"]),
        ([], []),
    ],
)
def test_names_are_as_long_as_needed(folders, names):
    assert list(crop_names(map(Path, folders)).values()) == names


def test_a_crop_that_is_given_twice_is_an_error(tmp_path):
    (tmp_path / "a.zarr" / "crop1").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "a.zarr" / "crop1")
    for second in ("link", "a.zarr/../a.zarr/crop1"):
        with pytest.raises(CellMapValueError, match=r"is given twice, as .*; give it once"):
            crop_names([tmp_path / "a.zarr" / "crop1", tmp_path / second])
    assert crop_names([tmp_path / "link"] * 2) == {tmp_path / "link": "link"}


def truth_of(*boxes):
    values = np.zeros((8, 16, 16), np.uint8)
    for number, (z, y, x) in enumerate(boxes, 1):
        values[z : z + 3, y : y + 4, x : x + 4] = number
    return values


@pytest.fixture(params=[("jrc_a.zarr/gt", "jrc_b.zarr/gt"), ("jrc_a.zarr/first", "jrc_a.zarr/second"), ("one", "two")])
def folder(request, tmp_path):
    """One prediction, and two crops of one name in it that two folders annotate; return both, and the crops' names."""
    first, second = truth_of((1, 1, 1), (1, 8, 8)), truth_of((4, 2, 2))
    for place, values, origin in zip(request.param, (first, second), (0, 128), strict=True):
        write_multiscale(
            tmp_path / place / "crop1" / "mito", values, scale=STEP, translation=(0, 0, origin),
            attributes={"cellmap": {"annotation": {"class_name": "mito", "annotation_type": ANNOTATION}}},
        )  # fmt: skip
    predicted = np.concatenate([first > 0, np.zeros_like(second)], axis=2) * np.uint8(255)
    attributes = {"cellmap": {"prediction": {"class_name": "mito", "values": "scaled", "probability_1": 255}}}
    write_multiscale(
        tmp_path / "pred.zarr" / "mito", predicted, scale=STEP, translation=(0, 0, 0), attributes=attributes
    )
    same = request.param[0].startswith("jrc") and request.param[1].startswith("jrc_b")
    names = ["jrc_a/crop1", "jrc_b/crop1"] if same else [f"{Path(p).name}/crop1" for p in request.param]
    return tmp_path, list(request.param), names


def test_each_crop_has_its_scores(folder):
    path, places, names = folder
    given = ["prediction=pred.zarr", f"truth=[{','.join(places)}]"]
    (path / "split.csv").write_text(f'train,raw.zarr/em,"{path}/{places[1]}/crop1/[mito]"\n')
    code, text = run_forked(*given, "trained=split.csv", cwd=path, command="evaluate")
    assert code == 0, text
    rows = list(csv.DictReader((path / "pred-evaluation.csv").read_text().splitlines()))
    assert {row["crop"]: (float(row["dice"]), row["usage"]) for row in rows} == {
        names[0]: (1, "held out"), names[1]: (0, "train"),
    }  # fmt: skip
    assert {row["crop"] for row in json.loads((path / "pred-evaluation.json").read_text())} == set(names)
    assert (path / "pred-evaluation-worst.png").stat().st_size > 5000
    code, text = run_forked(*given, "metric=csc", "out=csc", cwd=path, command="evaluate")
    assert code == 0, text
    assert set(names) <= {row["crop"] for row in csv.DictReader((path / "csc.csv").read_text().splitlines())}
    code, text = run_forked(
        *given[:1], f"truth=[{places[0]},{places[0]}/crop1]", "out=no", cwd=path, command="evaluate"
    )
    assert code == 1
    assert "the crop crop1 is given twice" in text


def test_parameters_are_tuned_on_both(folder):
    path, places, names = folder
    crops = predicted_crops(str(path / "pred.zarr"), [str(path / place) for place in places], "mito")
    assert [(crop.name, crop.annotation) for crop in crops] == sorted(
        (name, path / place / "crop1") for name, place in zip(names, places, strict=True)
    )
    assert split_crops([crop.name for crop in crops], None, [names[0]]) == ([names[1]], [names[0]])
    with pytest.raises(CellMapValueError, match="'crop1' is the name of several crops; give one of"):
        split_crops(names, ["crop1"], None)


@pytest.mark.parametrize("name", ["jrc_a/crop1", "jrc_a.zarr/crop1"])
@pytest.mark.parametrize("form", ["jrc_{}/crop1", "jrc_{}.zarr/crop1"])
def test_a_crop_is_chosen_with_or_without_the_suffix(name, form):
    names = [form.format("a"), form.format("b")]
    assert split_crops(names, [name], None) == ([names[0]], [])
    with pytest.raises(CellMapKeyError, match="no crop 'jrc_c/crop1'"):
        split_crops(names, ["jrc_c/crop1"], None)
