"""Scores of boxes of crops against those of smaller crops of the same place."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.crops.crop_box import CropBox
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.evaluation import score_files
from cellmap_lightning.evaluation.crop_parts import CropPart, trained_crops
from cellmap_lightning.evaluation.error_picture import draw_worst
from cellmap_lightning.evaluation.evaluate import evaluate
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from tests.boxed import CLASSES, CROP, END, START, labels, nm, voxels, write_crops


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A folder with a prediction, the crop and the smaller crop."""
    folder = tmp_path_factory.mktemp("v")
    raw, whole, part = write_crops(folder)
    write_group(folder / "pred.zarr")
    for name, stored in labels().items():
        moved = np.roll((stored > 0) & (stored != 255), 2, 1).astype(np.uint8)
        write_multiscale(
            folder / "pred.zarr" / name, moved, scale=(8, 8, 8), translation=(8 * CROP + 4,) * 3, levels=1,
            storage=ArrayOptions(chunks=(32, 32, 32)), mode="mode",
        )  # fmt: skip
    return folder, raw, Path(whole).parent, Path(part).parent


def unboxed(scores):
    return [replace(s, crop="", box=None, trained=None, folder=None, voxels=replace(s.voxels, crop="")) for s in scores]


def test_scores_of_a_box_are_those_of_a_smaller_crop(scene):
    folder, _, whole, part = scene
    for box in (nm(START, END), voxels(START, END)):
        boxed = evaluate(
            folder / "pred.zarr", whole, CLASSES, scores=("voxels", "surface"), box=CropBox.parse(box)
        )  # fmt: skip
        assert [score.label for score in boxed] == ["crop1 [z y x 288:688 224:608 192:752 nm]"] * 2
        small = evaluate(folder / "pred.zarr", part, CLASSES, scores=("voxels", "surface"))
        assert unboxed(boxed) == unboxed(small)
        assert 0 < boxed[0].voxels.dice < 1
    everything = evaluate(folder / "pred.zarr", whole, CLASSES)
    assert everything[0].voxels.known > boxed[0].voxels.known
    assert everything[0].box is None


def test_crops_that_were_cut_are_scored_in_their_boxes(scene, tmp_path):
    folder, raw, whole, _ = scene
    lines = ["usage,raw,target,box"]
    lines += [f'train,{raw},"{whole}/[mito,nuc]",0:40 0:72 0:88 voxels', f'validate,{raw},"{whole}/[mito,nuc]",']
    lines[2] += '"{min_nm: [512, 128, 128], max_nm: [768, 704, 832]}"'
    (tmp_path / "split.csv").write_text("\n".join(lines))
    trained = trained_crops(tmp_path)
    first, second = CropBox((128, 128, 128), (448, 704, 832)), CropBox((512, 128, 128), (768, 704, 832))
    assert trained == {whole.resolve(): [CropPart(first, True), CropPart(second, False)]}
    scores = evaluate(folder / "pred.zarr", whole, ["mito"], trained=trained)
    assert [(score.trained, score.box) for score in scores] == [(True, first), (False, second)]
    assert scores[0].voxels.known == (labels()["mito"][:40] != 255).sum()
    assert scores[1].voxels.known == (labels()["mito"][48:] != 255).sum()
    (inside,) = evaluate(
        folder / "pred.zarr", whole, ["mito"], trained=trained, box=CropBox.parse("0:9 0:9 0:9 voxels")
    )
    (outside,) = evaluate(folder / "pred.zarr", whole, ["mito"], trained=trained, box=second)
    assert (inside.trained, outside.trained) == (True, False)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["train,"], [CropPart(None, True)]),
        (["train,", "train,0:9 0:9 0:9 nm"], [CropPart(None, True)]),
        (["validate,"], None),
        (["test,0:9 0:9 0:9 nm"], [CropPart(CropBox((0, 0, 0), (9, 9, 9)), False)]),
    ],
)
def test_parts_of_a_csv(tmp_path, rows, expected):
    lines = [f"{row.partition(',')[0]},raw.zarr/em,a.zarr/crop1/mito,{row.partition(',')[2]}" for row in rows]
    (tmp_path / "split.csv").write_text("\n".join(["usage,raw,target,box", *lines]))
    assert trained_crops(tmp_path).get((tmp_path / "a.zarr/crop1").resolve()) == expected


def test_a_prediction_of_the_box_alone_is_scored(scene, tmp_path):
    whole = scene[2]
    write_group(tmp_path / "pred.zarr")
    stored = (labels()["mito"][tuple(map(slice, START, END))] == 1).astype(np.uint8)
    at = [8 * (CROP + first) + 4 for first in START]
    write_multiscale(tmp_path / "pred.zarr/mito", stored, scale=(8, 8, 8), translation=at, levels=1, mode="mode")
    (score,) = evaluate(tmp_path / "pred.zarr", whole, ["mito"], box=CropBox.parse(nm(START, END)))
    assert score.voxels.dice == 1
    with pytest.raises(CellMapError, match="nothing to evaluate"):
        evaluate(tmp_path / "pred.zarr", whole, ["mito"])


def test_files_name_the_box(scene, tmp_path):
    folder, raw, whole, _ = scene
    scores = evaluate(folder / "pred.zarr", whole, CLASSES, box=CropBox.parse(nm(START, END)))
    score_files.write_csv(scores, tmp_path / "s.csv")
    score_files.write_json(scores, tmp_path / "s.json")
    score_files.draw(scores, tmp_path / "s.png")
    draw_worst(scores, folder / "pred.zarr", whole, tmp_path / "worst.png", raw=raw)
    with (tmp_path / "s.csv").open() as file:
        assert [row["box"] for row in csv.DictReader(file)] == ["288:688 224:608 192:752 nm"] * 2
    assert json.loads((tmp_path / "s.json").read_text())[0]["box"] == "288:688 224:608 192:752 nm"
    assert "crop1 [z y x 288:688 224:608 192:752 nm]" in score_files.table(scores)
    assert (tmp_path / "worst.png").stat().st_size > 10_000


@pytest.mark.parametrize("box", ["0:81 0:8 0:8 voxels", "0:8 0:8 0:8 nm", "130:200 128:256 128:256 nm"])
def test_boxes_that_do_not_fit_are_refused(scene, box):
    folder, _, whole, _ = scene
    with pytest.raises(CellMapError, match="crop1"):
        evaluate(folder / "pred.zarr", whole, CLASSES, box=CropBox.parse(box))
