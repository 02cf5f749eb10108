import pytest

from cellmap_lightning.crops.target_path import TargetPath
from cellmap_lightning.splits.crop_names import crop_name, crop_names, dataset_and_crop, target_of
from cellmap_lightning.splits.entries import CropRecord


@pytest.mark.parametrize(
    ("raw", "target", "expected"),
    [
        ("a/jrc_a.zarr/em", "b/jrc_a.zarr/labels/crop1/[mito]", ("jrc_a", "labels/crop1")),
        ("a/jrc_b.zarr/em", "b/jrc_a.n5/crop1/[mito]", ("jrc_a", "crop1")),
        ("a/jrc_a.zarr/em", None, ("jrc_a", "em")),
        ("a/jrc_a.zarr", None, ("jrc_a", ".")),
        ("/x/study/raw", "/x/study/labels/crop1/[mito]", ("study", "crop1")),
        ("/x/study/raw", None, ("raw", "raw")),
    ],
)
def test_dataset_and_path_of_a_crop(raw, target, expected):
    assert dataset_and_crop(raw, TargetPath.parse(target) if target else None) == expected


def test_only_ambiguous_names_are_whole_paths():
    targets = ("jrc_a.zarr/x/crop1/[er]", "jrc_a.zarr/y/crop1/[er]", "jrc_a.zarr/y/crop2/[er]", "jrc_b.zarr/y/crop1/er")
    entries = [CropRecord("", "raw.zarr", target) for target in targets]
    assert [str(name) for name in crop_names(entries)] == [
        "jrc_a/x/crop1", "jrc_a/y/crop1", "jrc_a/crop2", "jrc_b/crop1",
    ]  # fmt: skip
    assert {str(crop_name(entry)) for entry in entries} == {"jrc_a/crop1", "jrc_a/crop2", "jrc_b/crop1"}


def test_a_malformed_target_is_reported_on_opening():
    entry = CropRecord("line 1", "jrc_a.zarr/em", "jrc_a.zarr/crop1/[mito,mito]")
    assert target_of(entry) is None
    assert crop_name(entry) == ("jrc_a", "em")
