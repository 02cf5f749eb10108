"""Rows of a CSV of crops, and entries of a configuration."""

import pytest

from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.splits.entries import read_csv, read_mapping

ROWS = [["train", "a.zarr/em", '"a.zarr/crop1/[mito,er]"'], ["predict", "b.zarr/em"]]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "; "], ids=repr)
@pytest.mark.parametrize("head", [[], ["# crops, of everything", ""], ["usage{}raw{}target"]], ids=len)
def test_cells_may_be_separated_as_spreadsheets_do(tmp_path, delimiter, head):
    lines = [line.replace("{}", delimiter) for line in head] + [delimiter.join(row) for row in ROWS]
    (tmp_path / "crops.csv").write_text("\n".join(lines))
    entries = read_csv(tmp_path / "crops.csv")
    assert [e.target_path for e in entries["train"]] == [str(tmp_path / "a.zarr/crop1/[mito,er]")]
    assert [e.input_path for e in entries["predict"]] == [str(tmp_path / "b.zarr/em")]


@pytest.mark.parametrize("datasets", [[{"raw": "a.zarr/em"}], "crops.csv", [], 3])
def test_datasets_without_splits_are_refused(datasets):
    with pytest.raises(CellMapTypeError, match=r"datasets must be \{train: \[\{raw: path, gt: path\}, ...\]"):
        read_mapping(datasets)
