"""``cellmap-evaluate`` from the command line."""

import csv
import json
import shutil
import sys

import numpy as np
import pytest

from cellmap_lightning.io.writer import write_multiscale
from tests.commands.test_cli import run_forked

POSITION = {"scale": (8, 4, 4), "translation": (0, 0, 0)}


@pytest.fixture
def folder(tmp_path):
    """Two crops with instances of a class, and a prediction that is right in the first and empty in the second."""
    truth = np.zeros((8, 16, 40), np.uint8)
    truth[2:6, 2:8, 2:8], truth[2:6, 8:14, 8:14], truth[1:4, 1:4, 25:30], truth[2:6, 8:14, 30:36] = 1, 2, 3, 4
    annotation = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": 255}}
    for name, part in (("crop1", slice(0, 20)), ("crop2", slice(20, 40))):
        (tmp_path / "crops" / name).mkdir(parents=True)
        write_multiscale(
            tmp_path / "crops" / name / "mito", truth[:, :, part], scale=(8, 4, 4), translation=(0, 0, 4 * part.start),
            attributes={"cellmap": {"annotation": {"class_name": "mito", "annotation_type": annotation}}},
        )  # fmt: skip
    predicted = np.where(np.arange(40) < 20, truth, 0).astype(np.uint8)
    attributes = {"cellmap": {"prediction": {"class_name": "mito", "values": "ids"}}}
    write_multiscale(tmp_path / "pred.zarr" / "mito", predicted, **POSITION, attributes=attributes)
    (tmp_path / "split.csv").write_text(f'train,raw.zarr/em,"{tmp_path}/crops/crop1/[mito]"\n')
    return tmp_path


def evaluate(folder, *arguments, truth="crops"):
    return run_forked(f"truth={truth}", *arguments, cwd=folder, command="evaluate")


def test_scores_are_printed_and_written(folder):
    code, text = evaluate(folder, "prediction=pred.zarr", "trained=split.csv")
    assert code == 0, text
    assert "crop1 *" in text
    assert "* trained on" in text
    rows = list(csv.DictReader((folder / "pred-evaluation.csv").read_text().splitlines()))
    assert [row["crop"] for row in rows] == ["crop1", "crop2"]
    assert [row["usage"] for row in rows] == ["train", "held out"]
    assert [float(row["dice"]) for row in rows] == [1, 0]
    assert [float(row["f1_50"]) for row in rows] == [1, 0]
    assert float(rows[0]["hausdorff_nm"]) == 0
    assert rows[1]["hausdorff_nm"] == "inf"
    first, second = json.loads((folder / "pred-evaluation.json").read_text())
    assert (first["panoptic_quality"], second["hausdorff_nm"], second["trained"]) == (1, None, False)
    for name in ("pred-evaluation.png", "pred-evaluation-worst.png"):
        assert (folder / name).stat().st_size > 5000
    code, text = evaluate(folder, "prediction=pred.zarr")
    assert code == 1
    assert "pred-evaluation.csv exists; set overwrite=true to replace it, or another out=..." in text


def test_a_single_crop_and_the_challenge_score(folder):
    code, text = evaluate(folder, "prediction=pred.zarr", "metric=csc", "out=csc", truth="crops/crop1")
    assert code == 0, text
    assert (folder / "csc.csv").is_file()
    assert "overall" in text


def test_a_list_of_crops_is_scored_in_one_table(folder):
    shutil.copytree(folder / "crops" / "crop2", folder / "more" / "crop3")
    truth = "[crops/crop1,more]"
    code, text = evaluate(folder, "prediction=pred.zarr", "trained=split.csv", truth=truth)
    assert code == 0, text
    rows = list(csv.DictReader((folder / "pred-evaluation.csv").read_text().splitlines()))
    assert [(row["crop"], row["usage"]) for row in rows] == [("crop1", "train"), ("crop3", "held out")]
    code, text = evaluate(folder, "prediction=pred.zarr", "metric=csc", "out=csc", truth=truth)
    assert code == 0, text
    assert {"crop1", "crop3"} <= {row["crop"] for row in csv.DictReader((folder / "csc.csv").read_text().splitlines())}
    code, text = evaluate(folder, "prediction=pred.zarr", "out=other", truth="[crops,crops/crop1]")
    assert code == 1, text
    assert "truth: the crop crop1 is given twice, as crops/crop1 and crops/crop1; give it once" in text


def test_scores_of_the_prediction_are_no_obstacle(folder):
    """`cellmap-predict truth=...` writes <out>-scores.csv and .png."""
    for ending in (".csv", ".png"):
        (folder / f"pred-scores{ending}").write_text("of the prediction")
    code, text = evaluate(folder, "prediction=pred.zarr", "metric=voxels")
    assert code == 0, text
    assert (folder / "pred-scores.csv").read_text() == "of the prediction"


def test_an_output_that_exists_is_an_error_before_anything_is_read(folder):
    (folder / "pred-evaluation.json").write_text("[]")
    for file in [*folder.glob("pred.zarr/mito/s0/*/*/*"), *folder.glob("crops/*/mito/s0/*/*/*")]:
        file.write_bytes(b"damaged")
    code, text = evaluate(folder, "prediction=pred.zarr")
    assert code == 1
    assert "pred-evaluation.json exists; set overwrite=true" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prediction=[pred.zarr,pred.zarr]"], "prediction must be one path, got ['pred.zarr', 'pred.zarr']"),
        (["prediction=pred.zarr", "truth={a: crops}"], "truth must be a path or a list of paths, got {'a': 'crops'}"),
        (["prediction=pred.zarr", "truth=[]"], "truth must be a path or a list of paths, got []"),
        (["prediction=pred.zarr", "truth=5"], "got 5; of a folder with that name give truth=./5"),
        (["prediction=pred.zarr", "trained=[split.csv]"], "trained must be one path, got ['split.csv']"),
        (["prediction=pred.zarr", "out=[a]"], "out must be one path, got ['a']"),
        (["prediction=pred.zarr", "raw={a: b}"], "raw must be one path, got {'a': 'b'}"),
        (["prediction=nothing.zarr"], "the prediction nothing.zarr does not exist"),
        (["prediction=predictions"], "of 1 crop; give that of one, as predictions/jrc_a.zarr/crop1; cellmap-predict"),
        (["prediction=predictions/jrc_a.zarr"], "give that of one, as predictions/jrc_a.zarr/crop1"),
        (["prediction=pred.zarr", "classes=[mitto]"], "has no class 'mitto'; it has mito; did you mean 'mito'?"),
        (["prediction=pred.zarr", "truth=nothing"], "truth=nothing does not exist"),
        (["prediction=pred.zarr", "metric=dise"], "metric must be one of voxels, surface, instances, all, csc"),
        (["prediction=pred.zarr", "metric=[all,voxels]"], "metric=all stands alone"),
        (["prediction=pred.zarr", "threshold=0"], "threshold must be a probability above 0"),
        (["prediction=pred.zarr", "trained=nothing.csv"], "nothing.csv"),
        (["prediction=pred.zarr", "truth=pred.zarr"], "is the prediction itself"),
        (["prediction=pred.zarr", "box='0:8 0:8 voxels'"], "box must be min:max along z, y and x and the unit"),
        (["prediction=pred.zarr", "box={min_nm: [0, 0, 0]}"], "box needs a minimum and a maximum in one unit"),
        (["prediction=pred.zarr", "box='0:9 0:8 0:8 voxels'"], "crop1: the box 0:9 0:8 0:8 voxels reaches outside"),
        (["prediction=pred.zarr", "box='0:8 0:8 0:8 voxels'", "metric=csc"], "metric=csc scores whole crops"),
    ],
)  # fmt: skip
def test_wrong_arguments(folder, arguments, message):
    shutil.copytree(folder / "pred.zarr", folder / "predictions" / "jrc_a.zarr" / "crop1")
    truth = [] if any("truth" in argument for argument in arguments) else ["truth=crops"]
    code, text = run_forked(*truth, *arguments, cwd=folder, command="evaluate")
    assert code == 1, text
    assert message in text
    assert "Traceback" not in text


# -- without scipy


@pytest.mark.parametrize(
    ("metric", "values", "what"),
    [
        ([], "ids", "metric=all: surface distances need scipy"),
        (["metric=surface"], "ids", "metric=surface: surface distances need scipy"),
        (["metric=[voxels,surface]"], "ids", "metric=['voxels', 'surface']: surface distances need scipy"),
        (["metric=instances"], "mask", "scores of objects need scipy for a prediction without ids"),
        (["metric=instances"], "ids", None),
        (["metric=voxels"], "mask", None),
    ],
)
def test_metrics_that_need_scipy_name_one_that_does_not(folder, monkeypatch, metric, values, what):
    for name in [name for name in sys.modules if name == "scipy" or name.startswith("scipy.")]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "scipy", None)
    code, text = evaluate(folder, "prediction=pred.zarr", f"values={values}", *metric)
    if what is None:
        assert code == 0, text
        return
    assert code == 1, text
    assert f"Error: {what}, which is not installed; in a clone: pip install -e " in text
    assert ", or set metric=voxels" in text
    assert not (folder / "pred-evaluation.csv").exists()


@pytest.mark.parametrize("recorded", ["there", "missing", "none"])
def test_the_picture_shows_the_raw_volume_that_the_prediction_records(folder, recorded):
    grey = np.random.default_rng(0).integers(0, 256, (8, 16, 40)).astype(np.uint8)
    write_multiscale(folder / "raw.zarr" / "em", grey, **POSITION)
    if recorded != "none":
        raw = folder / ("raw.zarr" if recorded == "there" else "gone.zarr") / "em"
        attributes = json.dumps({"cellmap": {"prediction": {"settings": {"raw": str(raw)}}}})
        (folder / "pred.zarr" / ".zattrs").write_text(attributes)
        (folder / "pred.zarr" / ".zgroup").write_text('{"zarr_format": 2}')
    code, text = evaluate(folder, "prediction=pred.zarr", "out=scores")
    assert code == 0, text
    assert ("scores-worst.png is drawn without raw, which cannot be read (" in text) == (recorded == "missing")
    code, text = evaluate(folder, "prediction=pred.zarr", "out=shown", "raw=raw.zarr/em")
    assert code == 0, text
    same = (folder / "scores-worst.png").read_bytes() == (folder / "shown-worst.png").read_bytes()
    assert same == (recorded == "there")
