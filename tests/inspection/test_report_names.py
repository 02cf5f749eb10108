"""Crops of one name in a report are told apart by the end of their path, or by raw."""

import pytest

from cellmap_lightning.inspection.report_names import report_names
from cellmap_lightning.splits.entries import CropRecord


def labels(*pairs):
    return report_names([CropRecord(f"row {n}", raw, f"{crop}/[mito]") for n, (raw, crop) in enumerate(pairs)])


@pytest.mark.parametrize(
    ("pairs", "names"),
    [
        ([("a.zarr/em", "a.zarr/crop1"), ("a.zarr/em", "a.zarr/crop2")], ["a/crop1", "a/crop2"]),
        ([("x/em", "x/a.zarr/crop1"), ("y/em", "y/a.zarr/crop1")], ["x/a.zarr/crop1", "y/a.zarr/crop1"]),
        ([("a.zarr/em", "a.zarr/p/crop1"), ("a.zarr/em", "a.zarr/q/crop1")], ["p/crop1", "q/crop1"]),
        ([("a/em", "a.zarr/crop1"), ("b/em", "a.zarr/crop1")], ["a/crop1 (a/em)", "a/crop1 (b/em)"]),
        ([("u/em1", "a.zarr/crop1"), ("u/em2", "a.zarr/crop1")], ["a/crop1 (em1)", "a/crop1 (em2)"]),
        ([("a.zarr/em", "a.zarr/crop1"), ("a.zarr/em", "a.zarr/crop1")], ["a/crop1", "a/crop1"]),
        ([("em", "x/two"), ("em", "y/two"), ("em", "z/three")], ["x/two", "y/two", "three"]),
    ],
)  # fmt: skip
def test_names(pairs, names):
    assert labels(*pairs) == names


def test_a_malformed_target_is_named_by_its_place():
    assert report_names([CropRecord("crops.csv, line 3", "em", "a.zarr/[")]) == ["crops.csv, line 3"]
