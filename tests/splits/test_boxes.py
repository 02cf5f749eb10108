"""Boxes of crops in a CSV, in entries of ``datasets`` and in the check for leakage."""

import logging

import pytest

from cellmap_lightning import CellMapDataModule, CellMapError
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from cellmap_lightning.splits.entries import read_csv, read_mapping
from cellmap_lightning.splits.options import SplitOptions
from tests.boxed import CLASSES, END, START, nm, voxels, write_crops

SPEC = {"shape": [16] * 3, "scale": [8] * 3}


@pytest.fixture(scope="module")
def crops(tmp_path_factory):
    return write_crops(tmp_path_factory.mktemp("v"))


def module(datasets=None, csv_path=None, classes=CLASSES, **options):
    return CellMapDataModule(classes, {"raw": SPEC}, {"labels": SPEC}, csv_path, datasets, **options)


@pytest.mark.parametrize(
    "cell",
    ["20:70 12:60 8:78 voxels", '"{min_voxels: [20, 12, 8], max_voxels: [70, 60, 78]}"', "288:688 224:608 192:752 nm"],
)
def test_a_csv_has_boxes(tmp_path, crops, cell):
    raw, whole, _ = crops
    lines = ["usage,raw,target,weight,box", f'train,{raw},"{whole}",2,{cell}', f'test,{raw},"{whole}",,']
    (tmp_path / "crops.csv").write_text("\n".join(lines))
    data = module(csv_path=str(tmp_path / "crops.csv"), leakage="ignore")
    data.setup()
    assert [crop.box.as_dict() for crop in data.train_dataset.crops] == [
        {"z": [288, 688], "y": [224, 608], "x": [192, 752]}
    ]
    assert data.test_dataset.crops[0].within is None
    data.splits.write_csv(tmp_path / "again.csv")
    again = read_csv(tmp_path / "again.csv")
    assert [e.crop_box for e in again["train"]] == [e.crop_box for e in read_csv(tmp_path / "crops.csv")["train"]]
    assert again["test"][0].crop_box is None


@pytest.mark.parametrize("box", [nm(START, END), voxels(START, END), "288:688 224:608 192:752 nm"])
def test_entries_have_boxes(crops, box):
    raw, whole, part = crops
    both = {"train": [{"raw": raw, "gt": whole, "box": box}], "test": [{"raw": raw, "gt": part}]}
    data = module(both, leakage="ignore")
    data.setup()
    assert data.train_dataset.crops[0].box == data.test_dataset.crops[0].box
    assert data.splits.table().splitlines()[-1].split() == ["crops", "1", "1"]


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        ("20:70 12:60 voxels", "line 2"),
        ("20:70 12:60 8:78", "min:max along z, y and x and the unit"),
        ('"{min_voxels: [20, 12, 8]}"', "min_voxels and max_voxels"),
        ('"{min_voxels: [20, 12, 8"', "box cannot be read"),
        ("70:20 12:60 8:78 voxels", "the minimum must be below the maximum"),
        ("7", "box must be {min_nm"),
    ],
)
def test_malformed_cells_are_refused(tmp_path, crops, cell, text):
    (tmp_path / "crops.csv").write_text(f'usage,raw,target,box\ntrain,{crops[0]},"{crops[1]}",{cell}\n')
    with pytest.raises(CellMapError) as caught:
        read_csv(tmp_path / "crops.csv")
    assert text in str(caught.value)


@pytest.mark.parametrize("box", [5, {"min_nm": [0, 0, 0]}, "0:8 nm"])
def test_malformed_entries_are_refused(box):
    with pytest.raises(CellMapError, match=r"datasets\.train\[0\]: box"):
        read_mapping({"train": [{"raw": "a.zarr/em", "gt": "a.zarr/crop1/[mito]", "box": box}]})


def test_a_box_outside_of_its_crop_is_refused_with_its_entry(crops):
    raw, whole, _ = crops
    data = module({"train": [{"raw": raw, "gt": whole, "box": voxels((0, 0, 0), (99, 8, 8))}]})
    with pytest.raises(CellMapError, match=r"datasets\.train\[0\].*jrc_a/crop1: the box .* reaches outside"):
        data.setup()


def test_a_box_for_prediction_is_refused(crops):
    data = module({"predict": [{"raw": crops[0], "box": nm(START, END)}]})
    with pytest.raises(CellMapError, match=r"is for 'predict'; leave it out"):
        data.setup("predict")


def both(crops, train, val, part=False):
    raw, whole, small = crops
    return {
        "train": [{"raw": raw, "gt": whole, "box": train}],
        "val": [{"raw": raw, "gt": small if part else whole, "box": val}],
    }


def test_boxes_of_one_crop_that_are_apart_do_not_leak(crops, caplog):
    data = module(both(crops, voxels((0, 0, 0), (40, 72, 88)), voxels((40, 0, 0), (80, 72, 88))))
    with caplog.at_level(logging.WARNING):
        data.setup("fit")
    assert "overlap" not in caplog.text


@pytest.mark.parametrize(
    ("val", "text"),
    [
        (voxels((0, 0, 0), (40, 72, 88)), "'train' and 'val' share 1 crop,"),
        (voxels((39, 0, 0), (80, 72, 88)), "overlaps jrc_a/crop1 [39:80 0:72 0:88 voxels] by 8 x 576 x 704 nm"),
        (None, "overlaps jrc_a/crop1 by 320 x 576 x 704 nm"),
    ],
)
def test_boxes_of_one_crop_that_overlap_leak(crops, val, text):
    data = module(both(crops, voxels((0, 0, 0), (40, 72, 88)), val))
    with pytest.raises(CellMapError) as caught:
        data.setup("fit")
    assert text in str(caught.value)


def test_a_box_that_is_another_crop_leaks(crops):
    with pytest.raises(CellMapError, match=r"'train' and 'val' share"):
        module(both(crops, nm(START, END), None, part=True)).setup("fit")


def test_a_box_is_not_compared_where_it_does_not_reach(crops, caplog):
    with caplog.at_level(logging.WARNING):
        module(both(crops, voxels((0, 0, 0), (20, 72, 88)), None, part=True)).setup("fit")
    assert "overlap" not in caplog.text


def test_rules_keep_the_boxes_of_one_crop_together(crops):
    raw, whole, _ = crops
    entries = [{"raw": raw, "gt": whole, "box": f"{a}:{b} 0:72 0:88 voxels"} for a, b in ((0, 10), (70, 80))]
    split = CellMapDataSplit(
        None, {"train": entries}, None, CLASSES, {"raw": SPEC}, {"labels": SPEC},
        options=SplitOptions(split="random"),
    )  # fmt: skip
    with pytest.raises(CellMapError, match="needs at least 2 crops"):
        _ = split.entries
