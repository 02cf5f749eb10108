"""Marks of the crops that were trained on, in tables, files and pictures, and how crops are recognized."""

import csv
import shutil

import numpy as np
import pytest

from cellmap_lightning.commands.segment import segment
from cellmap_lightning.errors import CellMapFileNotFoundError
from cellmap_lightning.evaluation.crop_parts import is_trained, matching_notes, trained_crops
from cellmap_lightning.evaluation.csc_evaluation import Predicted, csc_table, evaluate_csc, write_csc_csv
from cellmap_lightning.evaluation.evaluate import CropScore
from cellmap_lightning.evaluation.score_files import draw, table
from cellmap_lightning.evaluation.voxel_scores import Score
from cellmap_lightning.io.writer import write_multiscale
from tests.commands.test_cli import run_forked

STEP = (8, 8, 8)
SEMANTIC = {"type": "semantic_segmentation", "encoding": {"absent": 0, "present": 1, "unknown": 255}}


@pytest.fixture
def folder(tmp_path):
    """Two crops of a dataset, a prediction of both, and the CSV of a training on the first."""
    truth = np.zeros((4, 8, 16), np.uint8)
    truth[1:3, 2:6] = 1
    for number, x in ((1, 0), (2, 8)):
        crop = tmp_path / "data" / "jrc_a.zarr" / "crops" / f"crop{number}"
        crop.mkdir(parents=True)
        attributes = {"cellmap": {"annotation": {"class_name": "er", "annotation_type": SEMANTIC}}}
        write_multiscale(
            crop / "er", truth[:, :, x : x + 8], scale=STEP, translation=(0, 0, 8 * x), levels=1, attributes=attributes
        )
    about = {"cellmap": {"prediction": {"class_name": "er", "values": "mask"}}}
    write_multiscale(
        tmp_path / "pred.zarr" / "er", truth, scale=STEP, translation=(0, 0, 0), levels=1, attributes=about
    )
    trained_on(tmp_path, "data/jrc_a.zarr/crops/crop1")
    return tmp_path


def trained_on(folder, *crops, usage="train"):
    lines = [f'{usage},raw.zarr/em,"{folder}/{crop}/[er]"' for crop in crops]
    (folder / "split.csv").write_text("\n".join(lines))


def score(folder, crops="data/jrc_a.zarr/crops"):
    return evaluate_csc([Predicted(folder / "pred.zarr", folder / crops, ("er",))], None, trained_crops(folder))


@pytest.mark.parametrize(
    ("trained", "usage", "note"),
    [
        ([1], ["train", "held out"], "* with crops that were trained on, 1 of 2: crop1"),
        ([1, 2], ["train", "train"], "* with crops that were trained on, 2 of 2: crop1, crop2"),
        ([2], ["held out", "train"], "* with crops that were trained on, 1 of 2: crop2"),
        ([3], ["held out", "held out"], None),
        (None, ["", ""], None),
    ],
)
def test_the_challenge_score_marks_trained_crops(folder, trained, usage, note):
    if trained is None:
        result = evaluate_csc([Predicted(folder / "pred.zarr", folder / "data/jrc_a.zarr/crops", ("er",))])
    else:
        trained_on(folder, *(f"data/jrc_a.zarr/crops/crop{n}" for n in trained))
        result = score(folder)
    write_csc_csv(result, folder / "csc.csv")
    rows = list(csv.DictReader((folder / "csc.csv").read_text().splitlines()))
    assert [row["usage"] for row in rows if row["crop"].startswith("crop")] == usage
    assert {row["usage"] for row in rows if not row["crop"].startswith("crop")} == {""}
    assert all(None not in row and None not in row.values() for row in rows)
    text = csc_table(result)
    assert ("er *" in text) == (note is not None)
    assert note is None or note in text.splitlines()


def linked_crops(folder):
    (folder / "link").symlink_to(folder / "data" / "jrc_a.zarr" / "crops")
    return "link"


def linked_dataset(folder):
    (folder / "data" / "jrc_a.zarr").rename(folder / "storage7")
    (folder / "data" / "jrc_a.zarr").symlink_to(folder / "storage7")
    return "storage7/crops"


def copy(folder):
    shutil.copytree(folder / "data" / "jrc_a.zarr", folder / "copy" / "jrc_a.zarr")
    return "copy/jrc_a.zarr/crops"


def moved(folder):
    (folder / "data").rename(folder / "elsewhere")
    return "elsewhere/jrc_a.zarr/crops"


def copy_of_a_link(folder):
    """The training read a link, whose target has another name, and a copy is scored."""
    linked_dataset(folder)
    shutil.copytree(folder / "storage7", folder / "copy" / "jrc_a.zarr")
    return "copy/jrc_a.zarr/crops"


def other_dataset(folder):
    shutil.copytree(folder / "data" / "jrc_a.zarr", folder / "copy" / "jrc_b.zarr")
    return "copy/jrc_b.zarr/crops"


def plain(folder):
    shutil.copytree(folder / "data" / "jrc_a.zarr" / "crops", folder / "crops")
    return "crops"


@pytest.mark.parametrize(
    ("place", "expected", "note"),
    [
        (lambda _: "data/jrc_a.zarr/crops", True, None),
        (linked_crops, True, None),
        (linked_dataset, True, None),
        (copy, True, "at another path than in the training, and matched by dataset and name: crop1"),
        (moved, True, "at another path than in the training, and matched by dataset and name: crop1"),
        (copy_of_a_link, True, "at another path than in the training, and matched by dataset and name: crop1"),
        (other_dataset, False, "is among those trained on"),
        (plain, False, "by path or by dataset and name: all count as held out"),
    ],
)
def test_crops_are_recognized_at_other_paths(folder, place, expected, note):
    crops = folder / place(folder)
    trained = trained_crops(folder)
    folders = [crops / "crop1", crops / "crop2"]
    assert [is_trained(trained, crop) for crop in folders] == [expected, False]
    notes = matching_notes(trained, [*folders, *folders])
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]
    assert [row.trained for row in score(folder, str(crops)).crops] == [expected, False]


def test_notes_without_a_training_or_crops(folder):
    crop = folder / "data/jrc_a.zarr/crops/crop1"
    assert matching_notes(None, [crop]) == []
    assert matching_notes(trained_crops(folder), []) == []
    trained_on(folder, "data/jrc_a.zarr/crops/crop1", usage="validate")
    (note,) = matching_notes(trained_crops(folder), [crop])
    assert "trained on (none)" in note
    assert is_trained(None, crop) is None


@pytest.mark.parametrize(
    ("place", "note"),
    [
        (lambda _: "data/jrc_a.zarr/crops", "none of the crops that were scored was trained on"),
        (copy, "none of the crops that were scored was trained on"),
        (linked_dataset, "none of the crops that were scored was trained on"),
        (other_dataset, "by path or by dataset and name: all count as held out"),
        (plain, "by path or by dataset and name: all count as held out"),
    ],
)
def test_a_crop_beside_those_trained_on_needs_no_doubt(folder, place, note):
    crop = folder / place(folder) / "crop2"
    (line,) = matching_notes(trained_crops(folder), [crop])
    assert line.endswith(note)


def test_the_training_of_a_checkpoint_is_found(folder):
    crops = trained_crops(folder)
    (folder / "checkpoints").mkdir()
    for file in (folder / "checkpoints" / "best.ckpt", folder / "best.ckpt"):
        file.write_bytes(b"PK")
        assert trained_crops(file) == crops
    (folder / "split.csv").unlink()
    with pytest.raises(CellMapFileNotFoundError, match=r"best.ckpt: no .*split.csv; give the folder of a run"):
        trained_crops(folder / "checkpoints" / "best.ckpt")


@pytest.mark.parametrize("metric", ["csc", "voxels"])
def test_the_command_marks_and_notes(folder, metric):
    given = ["prediction=pred.zarr", "trained=split.csv", f"metric={metric}", "overwrite=true"]
    code, text = run_forked("truth=data/jrc_a.zarr/crops", *given, cwd=folder, command="evaluate")
    assert code == 0, text
    assert "er *" in text if metric == "csc" else "crop1 *" in text
    assert "held out" not in text
    code, text = run_forked(f"truth={copy(folder)}/crop1", *given, cwd=folder, command="evaluate")
    assert code == 0, text
    assert "matched by dataset and name: crop1" in text
    code, text = run_forked(f"truth={plain(folder)}", *given, cwd=folder, command="evaluate")
    assert code == 0, text
    assert text.count("none of the crops that were scored (crops) is among those trained on") == 1
    assert " *" not in text


@pytest.mark.parametrize(
    ("marks", "labels"),
    [
        ((True, False), ["crop1 *", "crop2", "* trained on"]),
        ((False, True), ["crop1", "crop2 *", "* trained on"]),
        ((None, None), ["crop1", "crop2"]),
    ],
)
def test_the_heat_map_marks_trained_crops(tmp_path, marks, labels):
    scores = [
        CropScore(f"crop{n}", name, Score(f"crop{n}", name, known=100, tp=9, fp=1, fn=1), trained=mark)
        for n, mark in enumerate(marks, 1)
        for name in ("mito", "er")
    ]
    draw(scores, tmp_path / "scores.svg")  # an SVG has each text in a comment
    drawn = (tmp_path / "scores.svg").read_text()
    for label in ("crop1", "crop1 *", "crop2", "crop2 *", "* trained on"):
        assert (f"<!-- {label} -->" in drawn) == (label in labels)
    assert drawn.count("<!-- 0.90 -->") == 12  # of Dice, precision and recall, in two crops and classes each
    assert all(label in table(scores) for label in labels)


@pytest.mark.parametrize(
    ("number", "place", "expected", "note"),
    [
        (1, lambda _: "data", True, "obj.zarr: objects numbered from "),
        (1, linked_crops, True, "obj.zarr: objects numbered from "),
        (1, moved, True, "obj.zarr: objects numbered from "),
        (2, lambda _: "data", False, "none of the crops that were scored (obj.zarr) is among those trained on ("),
    ],
)
def test_objects_numbered_from_a_crop_are_that_crop(folder, monkeypatch, number, place, expected, note):
    """They are recognized by the mask that they record, also where it has been moved since the training."""
    data = place(folder)
    crops = "link" if data == "link" else f"{data.split('/')[0]}/jrc_a.zarr/crops"
    monkeypatch.chdir(folder)
    segment(f"{crops}/crop{number}", "obj.zarr", "er", method="components", picture=False)
    assert is_trained(trained_crops(folder), folder / "obj.zarr") is expected
    code, text = run_forked(
        "prediction=pred.zarr", "truth=obj.zarr", "trained=split.csv", "metric=voxels", cwd=folder, command="evaluate"
    )
    assert code == 0, text
    assert ("obj.zarr *" in text) is expected
    assert text.count(note) == 1
    assert "(.)" not in text


def test_a_crop_in_the_working_directory_has_a_name(folder):
    crop = folder / "data" / "jrc_a.zarr" / "crops" / "crop1"
    code, text = run_forked(
        f"prediction={folder}/pred.zarr", "truth=.", f"trained={folder}", "metric=voxels", "out=s", cwd=crop,
        command="evaluate",
    )  # fmt: skip
    assert code == 0, text
    assert "crop1 *" in text
