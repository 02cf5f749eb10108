"""Headers, separators and repeated rows of a CSV of crops."""

import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.splits.entries import read_csv

CROP = "a.zarr/crop1/[mito,er]"


@pytest.fixture
def read(tmp_path):
    """A function that reads the lines of a CSV, and returns the only crop for training."""

    def read(*lines):
        (tmp_path / "crops.csv").write_text("\n".join(lines))
        (entry,) = read_csv(tmp_path / "crops.csv")["train"]
        assert entry.input_path == str(tmp_path / "a.zarr/em")
        assert entry.target_path == str(tmp_path / CROP)
        return entry

    return read


@pytest.mark.parametrize("separator", [";", "\t", "; "], ids=repr)
@pytest.mark.parametrize("target", [CROP, f'"{CROP}"'], ids=["bare", "quoted"])
@pytest.mark.parametrize("head", [(), ("usage{}raw{}target",), ("# [mito;er]",)], ids=len)
def test_commas_between_classes_separate_no_cells(read, separator, target, head):
    read(*(line.replace("{}", separator) for line in head), separator.join(("train", "a.zarr/em", target)))


def test_label_maps_between_semicolons_need_no_quotes(tmp_path):
    (tmp_path / "crops.csv").write_text("train;a.zarr/em;a.zarr/all/{1:mito,2:er}\n")
    assert read_csv(tmp_path / "crops.csv")["train"][0].target.names == ("mito", "er")


@pytest.mark.parametrize(
    ("header", "row", "weight", "metadata"),
    [
        ("target,usage,raw", f'"{CROP}",train,a.zarr/em', None, {}),
        ("Target,RAW,usage,unit", f'"{CROP}",a.zarr/em,train,nm', None, {"unit": "nm"}),
        ("usage,weight,raw,unknown,target", f'train,2,a.zarr/em,255,"{CROP}"', 2, {"unknown": 255}),
        ("raw,target,usage,weight", f'a.zarr/em,"{CROP}",train', None, {}),
        ("usage,raw,target,weight,unknown", f'train,a.zarr/em,"{CROP}"', None, {}),
        ("usage,raw,target,weight,unknown", f'train,a.zarr/em,"{CROP}",3', 3, {}),
        ("usage,raw,target,,", f'train,a.zarr/em,"{CROP}",,', None, {}),
        ("usage,raw,target", f'train,a.zarr/em,"{CROP}",,,', None, {}),
        # Names that stand for themselves; the columns are in the usual order.
        ("usage,em,ground truth", f'train,a.zarr/em,"{CROP}"', None, {}),
        ("usage,zarr,raw,zarr,target,weight", 'train,a.zarr,em,a.zarr,"crop1/[mito,er]",4', 4, {}),
        ("usage,raw,target", 'train,a.zarr,em,a.zarr,"crop1/[mito,er]"', None, {}),
    ],
)
def test_columns_are_read_by_their_names(read, header, row, weight, metadata):
    entry = read(header, row)
    assert (entry.weight, entry.metadata) == (weight, metadata)


@pytest.mark.parametrize("row", ["predict,a.zarr/em", "predict,a.zarr/em,", 'predict,a.zarr/em,,"[8, 8, 8]"'])
@pytest.mark.parametrize("header", ["usage,raw,target,voxel_size"])
def test_rows_for_prediction_may_leave_out_cells(tmp_path, header, row):
    (tmp_path / "crops.csv").write_text(f"{header}\n{row}\n")
    (entry,) = read_csv(tmp_path / "crops.csv")["predict"]
    assert (entry.input_path, entry.target_path) == (str(tmp_path / "a.zarr/em"), None)
    assert entry.metadata == ({"voxel_size": [8, 8, 8]} if "8" in row else {})


@pytest.mark.parametrize(
    ("header", "cells", "message"),
    [
        (
            "usage,raw,target,weigth,voxelsize",
            ',2,"[4,4,4]"',
            "columns 'weigth', 'voxelsize'; did you mean 'weight'",
        ),
        ("usage,raw,target,voxelsize", ',"[4,4,4]"', "unknown column 'voxelsize'; did you mean 'voxel_size'"),
        ("usage,raw,target,weight,boxes", ",2,", "unknown column 'boxes'; did you mean 'box'"),
        (
            "usage,raw,target,,note",
            ",,x",
            "unknown columns number 4 without a name, 'note'; columns are usage",
        ),
        ("split,raw_path,gt_path", "", "line 1: the header has unknown columns 'split', 'raw_path', 'gt_path'; "),
        ("split,raw,target", "", "unknown column 'split'; columns are usage, raw, target, weight"),
        ("target,usage,input", "", "unknown column 'input'"),
        ("target,usage", "", "the header has no column 'raw'"),
        ("usage,raw,target,weight,weight", ",1,2", "names the column 'weight' twice"),
        ("usage,raw,target,,", ",,2", "line 2  5 cells, and the header names 3 columns"),
    ],
)
def test_columns_that_mean_nothing_are_named(read, header, cells, message):
    with pytest.raises(CellMapValueError, match=message):
        read(header, f'train,a.zarr/em,"{CROP}"{cells}')
