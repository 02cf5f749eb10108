"""Log lines and errors of ``cellmap-submit``."""

import json
import logging
import zipfile

import numpy as np
import pytest

from cellmap_lightning.commands.submit import submit
from cellmap_lightning.errors import (
    CellMapError,
    CellMapFileExistsError,
    CellMapFileNotFoundError,
    CellMapTypeError,
    CellMapValueError,
)
from tests.commands.test_cli import run_forked
from tests.evaluation.test_challenge import manifest, predicted, row

STEP, SHAPE = (8, 8, 8), (8, 8, 8)


@pytest.fixture
def folder(tmp_path):
    """A crop with two objects of 8 and 1 voxels, a mask of half of its voxels, and an empty one."""
    mito, er = np.zeros(SHAPE, np.uint8), np.zeros(SHAPE, np.uint8)
    mito[1:3, 1:3, 1:3] = mito[6, 6, 6] = er[:4] = 1
    for name, values in (("mito", mito), ("er", er), ("pm", 0 * er), ("ves", 0 * er)):
        about = {"cellmap": {"prediction": {"class_name": name, "values": "mask"}}}
        predicted(tmp_path, name, values, (4, 4, 4), STEP, attributes=about)
    manifest(tmp_path, *(row(7, name, STEP, (4, 4, 4), SHAPE) for name in ("mito", "er", "pm", "ves")))
    return tmp_path


def submitted(folder, caplog, **options):
    caplog.clear()
    with caplog.at_level(logging.INFO):
        submit(folder / "predictions", folder / "test_crop_manifest.csv", folder / "s.zarr", overwrite=True, **options)
    return [record.getMessage() for record in caplog.records if record.name.endswith("commands.submit")]


def test_the_content_of_each_class_is_logged(folder, caplog):
    lines = submitted(folder, caplog)
    assert lines[:4] == [
        "crop7/mito: 1.76% of [8, 8, 8] voxels, 2 objects, uint8",
        "crop7/er: 50.00% of [8, 8, 8] voxels, uint8",
        "crop7/pm: 0.00% of [8, 8, 8] voxels, uint8",
        "crop7/ves: 0.00% of [8, 8, 8] voxels, 0 objects, uint8",
    ]
    (line,) = lines[4:]
    assert line.startswith("2 of 4 classes of crops are EMPTY, all their voxels are 0: crop7/pm, crop7/ves;")
    assert [record.levelno for record in caplog.records if "EMPTY" in record.getMessage()] == [logging.WARNING]


@pytest.mark.parametrize(
    ("options", "line", "empty"),
    [
        (
            {"min_volume": 2 * 512},
            "1.56% of [8, 8, 8] voxels, 1 object, uint8 (1 below 2 voxels, removed by min_volume",
            2,
        ),
        ({"min_volume": {"mito": 9 * 512}}, "0 objects, uint8 (2 below 9 voxels, removed by min_volume)", 3),
        ({"min_volume": {"ves": 9 * 512}}, "1.76% of [8, 8, 8] voxels, 2 objects, uint8", 2),
        ({"instance_classes": ["er"]}, "crop7/mito: 1.76% of [8, 8, 8] voxels, uint8", 2),
    ],
)
def test_objects_that_are_removed_are_counted(folder, caplog, options, line, empty):
    lines = submitted(folder, caplog, **options)
    assert lines[0].startswith("crop7/mito: ")
    assert line in lines[0]
    assert lines[-1].startswith(f"{empty} of 4 classes of crops are EMPTY")


def test_nothing_is_warned_of_where_nothing_is_empty(folder, caplog):
    manifest(folder, *(row(7, name, STEP, (4, 4, 4), SHAPE) for name in ("mito", "er")))
    assert len(submitted(folder, caplog)) == 2


@pytest.mark.parametrize(
    ("place", "hint"),
    [
        ("predictions/jrc_a.zarr", "give the folder above jrc_a.zarr, predictions={}/predictions"),
        ("predictions/jrc_a.zarr/crop7", "give the folder above jrc_a.zarr, predictions={}/predictions"),
        (".", "give the folder above <dataset>.zarr; {} holds predictions"),
        ("nowhere", "{}/nowhere does not exist"),
    ],
)
def test_a_wrong_folder_of_predictions(folder, place, hint):
    with pytest.raises(CellMapFileNotFoundError) as caught:
        submit(folder / place, folder / "test_crop_manifest.csv", folder / "s.zarr")
    assert "4 of 4 classes of crops" in str(caught.value)
    assert "they are looked for in <predictions>/<dataset>.zarr/<crop>/<class>" in str(caught.value)
    assert str(caught.value).endswith(hint.format(folder))


@pytest.mark.parametrize(
    ("name", "hint"),
    [("er", "add it with instance_classes=[...,er]"), ("pm", "or leave pm out"), ("mitto", "did you mean 'mito'?")],
)
def test_methods_of_classes_without_objects(folder, name, hint):
    with pytest.raises(CellMapValueError, match=f"{name!r} is not among instance_classes \\(nuc, vim,") as caught:
        submit(
            folder / "predictions", folder / "test_crop_manifest.csv", folder / "s.zarr",
            instances={name: {"method": "components"}},
        )  # fmt: skip
    assert hint in str(caught.value)
    assert isinstance(caught.value, CellMapError)


def test_an_added_class_has_a_method(folder, caplog):
    settings = {"instances": {"er": {"method": "components"}}, "instance_classes": ["mito", "er"]}
    assert "crop7/er: 50.00% of [8, 8, 8] voxels, 1 object, uint8" in submitted(folder, caplog, **settings)


def test_the_command_prints_the_lines(folder):
    code, text = run_forked("manifest=test_crop_manifest.csv", cwd=folder, command="submit")
    assert code == 0, text
    assert "crop7/mito: 1.76% of [8, 8, 8] voxels, 2 objects" in text
    assert "classes of crops are EMPTY" in text
    code, text = run_forked(
        "manifest=test_crop_manifest.csv", "instances={er: {method: components}}", cwd=folder, command="submit"
    )
    assert code == 1
    assert "'er' is not among instance_classes" in text


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_zip_file_that_exists_is_not_replaced(folder, kind):
    file = folder / "s.zip"
    if kind == "folder":
        (file / "within").mkdir(parents=True)
    elif kind == "link":
        (folder / "other.zip").write_text("results of a year")
        file.symlink_to("other.zip")
    else:
        file.write_text("results of a year")
    for predictions in ("predictions", "nowhere"):  # the error comes before any work
        with pytest.raises(CellMapFileExistsError, match=r"s\.zip, the zip file beside out=.*exists already"):
            submit(folder / predictions, folder / "test_crop_manifest.csv", folder / "s.zarr")
    assert (file / "within").is_dir() if kind == "folder" else file.read_text() == "results of a year"
    assert not (folder / "s.zarr").exists()


def test_a_zip_file_is_replaced_with_overwrite(folder):
    (folder / "s.zip").write_text("an earlier one")
    submit(folder / "predictions", folder / "test_crop_manifest.csv", folder / "s.zarr", overwrite=True)
    assert zipfile.is_zipfile(folder / "s.zip")


@pytest.mark.parametrize(("name", "overwrite"), [("s.zarr", False), ("s.zarr", True), ("s.zip", True)])
def test_what_is_no_submission_stays_with_overwrite(folder, name, overwrite):
    (folder / name).mkdir()
    (folder / name / "notes.txt").write_text("mine")
    with pytest.raises(CellMapFileExistsError, match=name):
        submit(folder / "nowhere", folder / "test_crop_manifest.csv", folder / "s.zarr", overwrite=overwrite)
    assert (folder / name / "notes.txt").read_text() == "mine"


def test_the_command_names_overwrite(folder):
    (folder / "submission.zip").write_text("mine")
    code, text = run_forked("manifest=test_crop_manifest.csv", cwd=folder, command="submit")
    assert code == 1
    assert "overwrite=true" in text
    assert (folder / "submission.zip").read_text() == "mine"


@pytest.mark.parametrize(
    ("step", "shape", "count"), [((8, 8, 8), (8, 8, 8), 0), ((16, 8, 8), (4, 8, 8), 1), ((4, 4, 4), (16, 16, 16), 1)]
)
def test_other_voxel_sizes_are_reported_once_per_crop(folder, caplog, step, shape, count):
    origin = tuple(s / 2 for s in step)
    manifest(folder, *(row(7, name, step, origin, shape) for name in ("mito", "er", "pm", "ves")))
    lines = [line for line in submitted(folder, caplog) if "the manifest asks for" in line]
    assert len(lines) == count
    for line in lines:
        assert line.startswith("crop7: predictions of mito, er, pm and 1 more have voxels of [8.0, 8.0, 8.0] nm")
        assert f"asks for {[float(n) for n in step]} nm" in line


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["er"], "er"), (["pm", "mito"], "mito, pm"), ([], None), (["ves", "er", "pm"], "er, pm, ves")],
)
def test_classes_that_the_training_did_not_annotate(folder, caplog, names, expected):
    for name in names:
        file = folder / "predictions" / "jrc_a.zarr" / "crop7" / name / ".zattrs"
        content = json.loads(file.read_text())
        content["cellmap"]["untrained"] = True
        file.write_text(json.dumps(content))
    submitted(folder, caplog)
    lines = [r for r in caplog.records if "no crop of the training annotated" in r.getMessage()]
    assert [r.levelno for r in lines] == [logging.WARNING] * (expected is not None)
    assert all(r.getMessage().startswith(f"no crop of the training annotated {expected}: ") for r in lines)


@pytest.mark.parametrize("place", ["crop7", "crop7/er", "crop7/mito"])
def test_a_prediction_that_was_interrupted(folder, place):
    """Its journal is still there; groups of classes exist already, without metadata."""
    group = folder / "predictions" / "jrc_a.zarr" / place
    (group / ".cellmap-prediction").mkdir()
    (group / ".cellmap-prediction" / "settings.json").write_text("{}")
    (folder / "predictions" / "jrc_a.zarr" / "crop7" / "er" / ".zattrs").write_text("{}")
    with pytest.raises(CellMapValueError, match=rf"{place}: the prediction is not finished; run the same cellmap-pred"):
        submit(folder / "predictions", folder / "test_crop_manifest.csv", folder / "s.zarr")
    assert not (folder / "s.zarr").exists()


@pytest.mark.parametrize(("dataset", "allow"), [("jrc_A", False), ("other", False), ("jrc_a-2", False)])
def test_a_crop_under_another_dataset(folder, dataset, allow):
    manifest(folder, *(row(7, name, STEP, (4, 4, 4), SHAPE, dataset) for name in ("mito", "er")))
    with pytest.raises(CellMapFileNotFoundError) as caught:
        submit(folder / "predictions", folder / "test_crop_manifest.csv", folder / "s.zarr", allow_missing=allow)
    place = folder / "predictions" / "jrc_a.zarr" / "crop7"
    assert f"; there is {place} for {dataset}.zarr/crop7: is the dataset right in the manifest?" in str(caught.value)


@pytest.mark.parametrize("place", ["my_numbers.py", "my_numbers/__init__.py", None])
def test_a_function_in_the_working_directory(folder, monkeypatch, place):
    monkeypatch.chdir(folder)
    if place is not None:
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / place).write_text("def run(present):\n    return present\n")
    with pytest.raises(CellMapTypeError, match=r"instances=my_numbers\.run: there is no such function") as caught:
        submit(folder / "predictions", folder / "test_crop_manifest.csv", folder / "s.zarr", instances="my_numbers.run")
    assert ("put PYTHONPATH=. before the command" in str(caught.value)) == (place is not None)
