"""Predictions of crops matched with annotated crops, by dataset and name, in files as the challenge stores them."""

import logging
import shutil

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, CellMapKeyError, CellMapValueError
from cellmap_lightning.evaluation.predicted_crops import predicted_crops
from cellmap_lightning.evaluation.tuning import check_alike
from cellmap_lightning.io.writer import write_group, write_multiscale
from cellmap_lightning.prediction.journal import SETTINGS, journal_folder
from cellmap_lightning.splits.manifests import GROUNDTRUTH

STEP = (8, 8, 8)
SHAPE = (6, 12, 16)
CROPS = ("jrc_a.zarr/crop1", "jrc_a.zarr/crop12", "jrc_b.zarr/crop1")
SCALED = {"values": "scaled", "probability_1": 255}
INSTANCES = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": 255}}


def objects():
    """Two cuboids with an id each."""
    truth = np.zeros(SHAPE, np.uint8)
    truth[1:5, 2:6, 2:7], truth[1:5, 7:11, 9:14] = 1, 2
    return truth


def predict(folder, crop, name="mito", inside=230, outside=170, step=STEP, origin=(0, 0, 0), **more):
    """Write a prediction of a crop: two probabilities, of which the default threshold is below both."""
    group = folder / "predictions" / crop
    group.mkdir(parents=True, exist_ok=True)
    write_group(group)
    values = np.where(objects() > 0, inside, outside).astype(np.uint8)
    attributes = {"cellmap": {"prediction": {"class_name": name, **SCALED, **more}}}
    write_multiscale(group / name, values, scale=step, translation=origin, levels=1, attributes=attributes)
    return group


def annotate(folder, crop, name="mito", origin=(0, 0, 0)):
    """Annotate a crop in the folders of the challenge."""
    volume, _, crop = crop.partition("/")
    path = folder / "data" / volume.removesuffix(".zarr") / volume / GROUNDTRUTH / crop
    path.mkdir(parents=True, exist_ok=True)
    attributes = {"cellmap": {"annotation": {"class_name": name, "annotation_type": INSTANCES}}}
    write_multiscale(path / name, objects(), scale=STEP, translation=origin, levels=1, attributes=attributes)
    return path


@pytest.fixture
def folder(tmp_path):
    """Three crops of two datasets, predicted and annotated, in a folder of predictions and one of data."""
    for crop in CROPS:
        predict(tmp_path, crop)
        annotate(tmp_path, crop)
    return tmp_path


def names(folder, prediction="predictions", truth="data", name="mito"):
    given = [
        [str(folder / place) for place in value] if isinstance(value, list) else str(folder / value)
        for value in (prediction, truth)
    ]
    return [crop.name for crop in predicted_crops(*given, name)]


A, B = "jrc_a/jrc_a.zarr", "jrc_b/jrc_b.zarr"


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ("predictions", "data", CROPS),
        ("predictions/jrc_a.zarr", "data", CROPS[:2]),
        ("predictions/jrc_a.zarr/crop1", "data", CROPS[:1]),
        (["predictions/jrc_b.zarr/crop1", "predictions/jrc_a.zarr"], "data", CROPS),
        ("predictions", f"data/{A}", CROPS[:2]),
        ("predictions", f"data/{B}/{GROUNDTRUTH}", CROPS[2:]),
        ("predictions", f"data/{B}/{GROUNDTRUTH}/crop1", CROPS[2:]),
        ("predictions", "data/jrc_b", CROPS[2:]),
        ("predictions", [f"data/{B}", f"data/{A}/{GROUNDTRUTH}/crop1"], [CROPS[0], CROPS[2]]),
        ("predictions/jrc_a.zarr/crop1", f"data/{A}/{GROUNDTRUTH}", ["crop1", "crop12"]),  # by position
        ("predictions/jrc_a.zarr/crop1", f"data/{A}", ["crop1", "crop12"]),
    ],
)
def test_crops_of_folders_are_matched(folder, prediction, truth, expected):
    assert names(folder, prediction, truth) == list(expected)


def test_each_crop_has_its_own_prediction_and_annotation(folder):
    for crop in predicted_crops(str(folder / "predictions"), str(folder / "data"), "mito"):
        assert str(crop.source.path) == str(folder / "predictions" / crop.name / "mito")
        volume, _, name = crop.name.partition("/")
        assert crop.annotation == folder / "data" / volume.removesuffix(".zarr") / volume / GROUNDTRUTH / name


def test_linked_datasets_keep_their_names(folder):
    """As where each dataset is a link to a storage with other names."""
    (folder / "storage").mkdir()
    for volume in (A, B):
        (folder / "data" / volume).rename(folder / "storage" / volume.replace("/", "-").removesuffix(".zarr"))
        (folder / "data" / volume).symlink_to(folder / "storage" / volume.replace("/", "-").removesuffix(".zarr"))
    assert names(folder) == list(CROPS)


def test_crops_that_are_left_out_are_named(folder, caplog):
    predict(folder, "jrc_a.zarr/crop2")
    predict(folder, "jrc_c.zarr/crop1")
    annotate(folder, "jrc_b.zarr/crop7")
    annotate(folder, "jrc_b.zarr/crop8")
    predict(folder, "jrc_b.zarr/crop8", "er")
    predict(folder, "jrc_b.zarr/crop9", origin=(80, 0, 0))
    annotate(folder, "jrc_b.zarr/crop9")
    with caplog.at_level(logging.INFO):
        assert names(folder) == list(CROPS)
    assert [record.getMessage() for record in caplog.records] == [
        "left out (annotated with mito, not predicted): jrc_b.zarr/crop7",
        "left out (predicted, not annotated with mito): jrc_a.zarr/crop2, jrc_c.zarr/crop1",
        "left out (annotated with mito, predicted without it): jrc_b.zarr/crop8",
        "left out (annotated, not covered by the prediction): jrc_b.zarr/crop9",
    ]


def test_crops_outside_of_one_prediction_are_named(folder, caplog):
    annotate(folder, "jrc_a.zarr/crop3", origin=(8 * 6, 0, 0))
    with caplog.at_level(logging.INFO):
        crops = names(folder, "predictions/jrc_a.zarr/crop1", f"data/{A}/{GROUNDTRUTH}")
    assert crops == ["crop1", "crop12"]
    assert [r.getMessage() for r in caplog.records] == ["left out (annotated, not covered by the prediction): crop3"]


def test_nothing_is_matched(folder):
    where = "no crop is both predicted and annotated with 'mito'; predicted are"
    shutil.rmtree(folder / "data" / "jrc_a")
    with pytest.raises(CellMapKeyError, match=f"{where} jrc_a.zarr/crop1, jrc_a.zarr/crop12, and .* jrc_b.zarr/crop1"):
        names(folder, "predictions/jrc_a.zarr")
    annotate(folder, "jrc_b.zarr/crop1", "mitto")
    with pytest.raises(CellMapKeyError, match="it has no class 'mitto'; did you mean 'mito'"):
        names(folder, name="mitto")
    with pytest.raises(CellMapKeyError, match="annotated with it none"):
        names(folder, name="er")


@pytest.mark.parametrize(
    ("prediction", "truth", "error", "message"),
    [
        (
            "predictions",
            "nowhere",
            CellMapFileNotFoundError,
            "nowhere does not exist; give the folder of the annotated",
        ),
        ("nowhere", "data", CellMapFileNotFoundError, "nowhere does not exist; give the output of cellmap-predict"),
        ("predictions/jrc_a.zarr/crop1/mito", "data", CellMapValueError, "it holds no <dataset>.zarr/<crop>/<class>"),
        (["predictions", "copy"], "data", CellMapValueError, "jrc_a.zarr/crop1 exists twice"),
        ("predictions", ["data", "other"], CellMapValueError, "truth: jrc_a.zarr/crop1 exists twice"),
        ("predictions", "plain", CellMapValueError, "crop1 may be any of jrc_a.zarr/crop1, jrc_b.zarr/crop1; give the"),
        (
            "predictions",
            "predictions",
            CellMapKeyError,
            "annotated with it none; truth must be the folder of the datasets",
        ),
        ("data/jrc_a", "data", CellMapValueError, "it holds no <dataset>.zarr/<crop>/<class>"),
        ("predictions", [], CellMapValueError, "must name a folder each"),
    ],
)
def test_wrong_folders(folder, prediction, truth, error, message):
    shutil.copytree(folder / "predictions", folder / "copy")
    shutil.copytree(folder / "data", folder / "other")
    shutil.copytree(folder / "data" / A / GROUNDTRUTH, folder / "plain")
    with pytest.raises(error, match=message):
        names(folder, prediction, truth)


def test_an_unfinished_prediction_is_not_left_out(folder):
    journal = folder / "predictions" / "jrc_a.zarr" / "crop1" / journal_folder("prediction")
    journal.mkdir()
    (journal / SETTINGS).write_text("{}")
    shutil.rmtree(journal.parent / "mito")  # no class is written yet
    with pytest.raises(CellMapError, match=r"crop1: the prediction is not finished; run the same cellmap-predict"):
        names(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"step": (8, 8, 9)},
            r"voxel size .* \[8.0, 8.0, 8.0\] in jrc_a.zarr/crop1 and \[8.0, 8.0, 9.0\] in jrc_b.zarr",
        ),
        ({"kind": "boundary"}, "the kind of the predictions must be the same in all crops, got probability in jrc_a"),
        (
            {"kind": "affinities", "offsets": [[-1, 0, 0]]},
            "got probability in jrc_a.zarr/crop1 and affinities in jrc_b",
        ),
    ],
)
def test_predictions_of_several_kinds_are_an_error(folder, changed, message):
    shutil.rmtree(folder / "predictions" / "jrc_b.zarr")
    predict(folder, "jrc_b.zarr/crop1", **changed)
    crops = predicted_crops(str(folder / "predictions"), str(folder / "data"), "mito")
    with pytest.raises(CellMapValueError, match=message):
        check_alike({crop.name: crop.source for crop in crops})
