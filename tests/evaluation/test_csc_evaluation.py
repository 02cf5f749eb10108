"""The challenge's score of stored predictions: counted voxels, pooling, and agreement with the toolbox."""

import csv
import json
import os
import subprocess

import numpy as np
import pytest
import zarr

from cellmap_lightning.commands.submit import submit
from cellmap_lightning.errors import CellMapError, CellMapKeyError
from cellmap_lightning.evaluation.csc_evaluation import Predicted, Scoring, csc_table, evaluate_csc, write_csc_csv
from cellmap_lightning.evaluation.csc_score import Counts, instance_counts, semantic_counts
from cellmap_lightning.io.writer import write_multiscale
from tests.commands.test_cli import run_forked
from tests.commands.test_predict_command import checkpoint  # noqa: F401
from tests.evaluation.test_challenge import layout, manifest, row  # noqa: F401
from tests.evaluation.test_csc_score import perturbed, scattered

pytest.importorskip("cc3d")

STEP = (4.0, 2.0, 2.0)
INSTANCES = {"type": "instance_segmentation", "encoding": {"absent": 0, "unknown": 255}}
SEMANTIC = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": 255}}


def annotate(folder, crop, name, values, kind=None, origin=(0, 0, 0)):
    path = folder / "truth" / crop / name
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {} if kind is None else {"attributes": {"cellmap": {"annotation": {"annotation_type": kind}}}}
    write_multiscale(path, values, scale=STEP, translation=origin, **about)


def predict(folder, crop, name, values, origin=(0, 0, 0), step=STEP, kind="ids"):
    path = folder / "predictions" / "jrc_a.zarr" / crop / name
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"cellmap": {"prediction": {"class_name": name, "values": kind}}}
    write_multiscale(path, values, scale=step, translation=origin, attributes=about)
    return path.parent


def predictions_of(folder, *crops, classes=("mito", "er")):
    there = folder / "predictions" / "jrc_a.zarr"
    return [Predicted(there / crop, folder / "truth", classes, crop) for crop in crops]


@pytest.fixture
def two(tmp_path):
    """Two crops with objects and a mask, and their predictions."""
    volumes = {}
    for number, crop in enumerate(("crop1", "crop2")):
        for name in ("mito", "er"):
            truth = scattered(7 * number + len(name), objects=6).astype(np.uint8)
            truth = truth if name == "mito" else (truth > 0).astype(np.uint8)
            prediction = perturbed(scattered(7 * number + len(name), objects=6), number)
            prediction = prediction if name == "mito" else (prediction > 0).astype(np.uint16)
            annotate(tmp_path, crop, name, truth, INSTANCES if name == "mito" else SEMANTIC)
            predict(tmp_path, crop, name, prediction, kind="ids" if name == "mito" else "mask")
            volumes[crop, name] = prediction, truth
    return volumes


def test_counts_equal_those_of_the_volumes(two, tmp_path):
    score = evaluate_csc(predictions_of(tmp_path, "crop1", "crop2"))
    assert [(r.crop, r.name, r.status) for r in score.crops] == [
        (crop, name, "scored") for crop in ("crop1", "crop2") for name in ("mito", "er")
    ]
    for r in score.crops:
        pair = two[r.crop, r.name]
        assert r.counts == (instance_counts(*pair, STEP) if r.name == "mito" else semantic_counts(*pair))
    by_name = {c.name: c for c in score.classes}
    assert by_name["er"].counts == score.crops[1].counts + score.crops[3].counts
    assert 0 < score.overall < 1
    write_csc_csv(score, tmp_path / "score.csv")
    lines = list(csv.reader((tmp_path / "score.csv").read_text().splitlines()))
    assert lines[1][0] == "overall"
    assert float(lines[1][-1]) == pytest.approx(score.overall, abs=1e-6)
    assert f"{score.overall:.4f}" in csc_table(score)


@pytest.mark.parametrize("crop", ["crop1", None])
def test_one_crop_or_all_covered_crops_are_scored(two, tmp_path, crop):
    (one,) = predictions_of(tmp_path, "crop1")
    score = evaluate_csc([Predicted(one.output, one.crops, one.classes, crop)])
    assert {r.crop for r in score.crops} == ({"crop1"} if crop else {"crop1", "crop2"})


@pytest.mark.parametrize("name", ["mito", "er"])
@pytest.mark.parametrize("part", [slice(0, 12), slice(None)])
def test_unannotated_voxels_are_background(tmp_path, name, part):
    truth, prediction = scattered(3).astype(np.uint8), perturbed(scattered(3), 3)
    if name == "er":
        truth, prediction = (truth > 0).astype(np.uint8), (prediction > 0).astype(np.uint8)
    truth[part] = 255
    annotate(tmp_path, "crop1", name, truth, INSTANCES if name == "mito" else SEMANTIC)
    predict(tmp_path, "crop1", name, prediction)
    (scored,) = evaluate_csc(predictions_of(tmp_path, "crop1")).crops
    known = truth != 255
    pair = prediction * known, truth * known
    assert scored.counts == (instance_counts(*pair, STEP) if name == "mito" else semantic_counts(*pair))
    if part == slice(None):
        assert scored.counts == Counts()


@pytest.mark.parametrize("name", ["mito", "er"])
def test_class_without_prediction_counts_as_missed(two, tmp_path, name):
    import shutil

    shutil.rmtree(tmp_path / "predictions" / "jrc_a.zarr" / "crop2" / name)
    score = evaluate_csc(predictions_of(tmp_path, "crop1", "crop2"))
    (missing,) = [r for r in score.crops if r.status == "missing"]
    assert (missing.crop, missing.name) == ("crop2", name)
    truth = two["crop2", name][1]
    assert missing.counts.fn == (len(np.unique(truth)) - 1 if name == "mito" else truth.size)
    assert f"not predicted, which counts as missed: crop2/{name}" in csc_table(score)
    assert score.overall < evaluate_csc(predictions_of(tmp_path, "crop1")).overall


def test_too_many_objects_are_reported(tmp_path, caplog):
    truth = np.zeros((24, 32, 40), np.uint8)
    truth[:4, :4, :4] = 1
    annotate(tmp_path, "crop1", "mito", truth, INSTANCES)
    predict(tmp_path, "crop1", "mito", (np.random.default_rng(0).random(truth.shape) < 0.05).astype(np.uint8))
    score = evaluate_csc(predictions_of(tmp_path, "crop1"))
    assert score.crops[0].status == "skipped"
    assert "crop1/mito: too many predicted objects" in caplog.text
    assert "skipped for the class: crop1/mito" in csc_table(score)


@pytest.mark.parametrize(
    ("scoring", "tp", "fp"),
    [(Scoring(), 1, 1), (Scoring(min_volume=30 * 16), 1, 0), (Scoring(min_volume={"mito": 1e6}), 0, 0),
     (Scoring(instance_classes=["er"]), 216, 27)],
)  # fmt: skip
def test_scoring_settings(tmp_path, scoring, tp, fp):
    truth = np.zeros((24, 32, 40), np.uint8)
    truth[2:8, 2:8, 2:8] = 1
    prediction = truth.copy()
    prediction[12:15, 12:15, 12:15] = 1
    annotate(tmp_path, "crop1", "mito", truth, INSTANCES)
    predict(tmp_path, "crop1", "mito", prediction, kind="mask")
    (scored,) = evaluate_csc(predictions_of(tmp_path, "crop1"), scoring).crops
    assert (scored.counts.tp, scored.counts.fp) == (tp, fp)


@pytest.mark.parametrize(
    ("origin", "classes", "crop"), [((400, 0, 0), ("er",), "crop1"), ((0, 0, 0), ("pm",), "crop1"),
                                    ((0, 0, 0), ("er",), "crop3")],
)  # fmt: skip
def test_nothing_to_evaluate(tmp_path, origin, classes, crop):
    annotate(tmp_path, "crop1", "er", np.ones((24, 32, 40), np.uint8), SEMANTIC, origin)
    output = predict(tmp_path, "crop1", "er", np.ones((24, 32, 40), np.uint8))
    with pytest.raises(CellMapKeyError, match="nothing to evaluate"):
        evaluate_csc([Predicted(output, tmp_path / "truth", classes, crop)])
    with pytest.raises(CellMapError, match="values must be one of"):
        evaluate_csc([Predicted(output, tmp_path / "truth", ("er",), "crop1")], Scoring(values="all"))


def test_predict_command_reports_the_metric(checkpoint, layout, volume, tmp_path):  # noqa: F811
    """Two crops of the volume, scored together; and by voxels, which is not the challenge's score."""
    from cellmap_lightning.io.ngff import read_multiscale

    folder = layout / "jrc_a" / "jrc_a.zarr" / "recon-1" / "labels" / "groundtruth"
    rows = []
    for crop in ("crop2", "crop4"):
        for name in ("er", "mito", "ves"):
            if (folder / crop / name).is_dir():
                lattice = read_multiscale(str(folder / crop / name)).finest.lattice
                rows.append(row(crop.removeprefix("crop"), name, lattice.step, lattice.origin, lattice.shape))
    listed = manifest(tmp_path, *rows)
    command = [f"ckpt={checkpoint}", f"manifest={listed}", f"search_path={layout}", "trainer=cpu", "evaluate=true"]
    code, errors = run_forked(*command, "crops=[2,4]", "metric=csc", cwd=tmp_path, command="predict")
    assert code == 0, errors
    lines = list(csv.reader((tmp_path / "predictions-challenge.csv").read_text().splitlines()))
    assert [line[0] for line in lines[1:4]] == ["overall", "instance", "semantic"]
    scored = {(line[1], line[0]) for line in lines[4:] if line[1] != "all"}
    assert scored == {(f"crop{r.split(',')[0]}", r.split(",")[2]) for r in rows}
    usage = {
        line[1]: line[3] for line in lines[4:] if line[1] != "all"
    }  # the training read the volume without the link
    assert usage == {c: "train" if volume.usage[c] == "train" else "held out" for c in ("crop2", "crop4")}
    assert set(usage.values()) == {"train", "held out"}
    assert "* with crops that were trained on, 1 of 2: " in errors
    assert {line[2] for line in lines[4:] if line[0] == "ves" and line[1] != "all"} <= {"missing"}
    code, errors = run_forked(*command, "crops=[2]", "metric=dice", cwd=tmp_path, command="predict")
    assert code == 1
    assert "metric must be one of voxels, csc, got 'dice'" in errors


TOOLBOX = """
import json, sys
from cellmap_segmentation_challenge.utils.eval_utils.submission import score_submission
scores = score_submission(sys.argv[1], truth_path=sys.argv[2])
keys = [k for k in scores if k.startswith("overall")] + ["label_scores"]
print("SCORES " + json.dumps({k: scores[k] for k in keys}))
"""


def test_submission_score_equals_the_official_toolbox(two, tmp_path):
    """Set CSC_PYTHON to the Python of an environment that has the challenge's toolbox; it needs zarr < 3."""
    python = os.environ.get("CSC_PYTHON")
    if not python:
        pytest.skip("CSC_PYTHON does not name a Python that has the challenge's toolbox")
    rows = [row(crop[4:], name, STEP, (0, 0, 0), pair[1].shape) for (crop, name), pair in two.items()]
    truth = zarr.open_group(str(tmp_path / "truth.zarr"), mode="w", zarr_format=2)
    for (crop, name), pair in two.items():
        array = truth.require_group(crop).create_array(name, data=pair[1])
        array.attrs.update(voxel_size=list(STEP), translation=[0, 0, 0], shape=list(pair[1].shape))
    import shutil

    shutil.rmtree(tmp_path / "predictions" / "jrc_a.zarr" / "crop2" / "er")
    listed = manifest(tmp_path, *rows)
    submit(tmp_path / "predictions", listed, tmp_path / "submission.zarr", allow_missing=True)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    env |= {"CSC_TEST_CROP_MANIFEST_URL": listed.as_uri(), "MAX_WORKERS": "1", "PER_INSTANCE_THREADS": "1"}
    done = subprocess.run(
        [python, "-c", TOOLBOX, str(tmp_path / "submission.zip"), str(tmp_path / "truth.zarr")],
        capture_output=True, text=True, timeout=600, env=env, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    expected = json.loads(next(x for x in done.stdout.splitlines() if x.startswith("SCORES ")).removeprefix("SCORES "))
    ours = evaluate_csc(predictions_of(tmp_path, "crop1", "crop2"))
    for c in ours.classes:
        scores = expected["label_scores"][c.name]
        assert (scores["tp"], scores["fp"], scores["fn"]) == (c.counts.tp, c.counts.fp, c.counts.fn)
        assert c.score == pytest.approx(scores["combined_score" if c.instances else "iou"], abs=1e-6)
    assert ours.overall == pytest.approx(expected["overall_score"], abs=1e-6)
