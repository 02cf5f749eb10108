"""Boxes of crops in the record of a checkpoint, and their comparison on resuming."""

import pytest

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.checkpointing.data_match import check_data, data_record
from tests.boxed import CLASSES, write_crops

SPEC = {"shape": [16] * 3, "scale": [8] * 3}


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write_crops(tmp_path_factory.mktemp("v"))


def record(crops, **options):
    entry = {"raw": crops[0], "gt": crops[1]}
    given = {"datasets": {"train": [entry]}} | options
    return data_record(CellMapDataModule(CLASSES, {"raw": SPEC}, {"labels": SPEC}, **given))


def test_boxes_are_recorded_by_the_names_of_crops(crops):
    boxes = record(crops, split={"blocks": {"axis": "z", "gap_nm": 0}})["boxes"]
    assert boxes == {
        "train": [["jrc_a/crop1", "128:640 128:704 128:832 nm"]],
        "val": [["jrc_a/crop1", "640:768 128:704 128:832 nm"]],
    }
    assert record(crops)["boxes"] == {}


def test_other_boxes_are_a_warning_when_a_training_resumes(crops):
    saved, now = record(crops, split="blocks"), record(crops, split={"blocks": {"position": "start"}})
    assert check_data(saved, saved, "resume", "last.ckpt") == []
    (warning,) = check_data(saved, now, "resume", "last.ckpt")
    assert "give those of the checkpoint, or validation may show what was trained on" in warning
    assert check_data(saved, now, "evaluate", "last.ckpt") == []
    older = {key: value for key, value in saved.items() if key != "boxes"}
    assert check_data(older, now, "resume", "last.ckpt") == []
