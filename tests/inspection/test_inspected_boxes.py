"""Facts of crops with boxes, and of crops that are cut."""

from dataclasses import replace

import pytest
import yaml

from cellmap_lightning.inspection.facts import read_crop_facts
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.inspection.scale_facts import at_scale
from cellmap_lightning.splits.entries import read_mapping
from tests.boxed import CLASSES, END, START, nm, voxels, write_crops


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write_crops(tmp_path_factory.mktemp("v"))


def facts(raw, target, box=None, scale=(16.0, 16.0, 16.0)):
    entries = read_mapping({"train": [{"raw": raw, "gt": target, **({"box": box} if box else {})}]})
    return at_scale(read_crop_facts([("train", entries["train"][0])]), scale, True)[0]


@pytest.mark.parametrize("box", [nm(START, END), voxels(START, END)])
def test_facts_of_a_box_are_those_of_a_smaller_crop(crops, box):
    raw, whole, part = crops
    boxed, small = facts(raw, whole, box), facts(raw, part)
    assert boxed.box == small.box
    assert (boxed.off, boxed.ratio, boxed.outside, boxed.chunks) == (
        small.off,
        small.ratio,
        small.outside,
        small.chunks,
    )
    for name in CLASSES:
        # The unknown part is in the metadata of the smaller crop alone.
        assert replace(boxed.classes[name], unknown=None) == replace(small.classes[name], unknown=None)
    assert [level.shape for level in boxed.levels] == [level.shape for level in small.levels]


@pytest.mark.parametrize("box", ["0:99 0:9 0:9 voxels", "0:9 0:9 0:9 nm", "130:256 128:256 128:256 nm"])
def test_a_box_that_does_not_fit_is_a_problem(crops, box):
    assert "the box" in facts(crops[0], crops[1], box).wrong


@pytest.mark.parametrize("shape", [None, [16, 16, 16]])
@pytest.mark.parametrize("split", ["blocks", {"blocks": {"axis": "x", "count": 1}}], ids=str)
def test_crops_that_are_cut_are_shown_as_their_boxes(crops, shape, split):
    data = {"datasets": {"train": [{"raw": crops[0], "gt": crops[1]}]}, "split": split, "classes": CLASSES}
    if shape:
        patch = {"shape": shape, "scale": [8, 8, 8]}
        data |= {"input_arrays": {"raw": patch}, "target_arrays": {"labels": patch}}
    report = inspect(data, {"shape": shape, "scale": [8, 8, 8] if shape else None}, None)
    assert [(crop.usage, crop.box["z"] == [128, 768]) for crop in report.crops] == [("train", True), ("val", True)]
    assert report.crops[1].box["x"][1] == 832
    assert report.refused is None
    assert yaml.safe_load(report.proposal.yaml)["data"]["split"] == split
    assert not [problem for problem in report.problems if problem.kind in ("leakage", "validation")]


def test_overlapping_boxes_and_missing_validation_are_problems(crops):
    entry = {"raw": crops[0], "gt": crops[1]}
    both = {"train": [entry | {"box": "0:40 0:72 0:88 voxels"}], "val": [entry | {"box": "30:80 0:72 0:88 voxels"}]}
    (problem,) = [p for p in inspect({"datasets": both}, {}, None).problems if p.kind == "leakage"]
    assert "by 80 x 576 x 704 nm" in problem.text
    (problem,) = [p for p in inspect({"datasets": {"train": [entry]}}, {}, None).problems if p.kind == "validation"]
    assert "the proposal sets data.split to blocks" in problem.text
