"""Mistakes of a first day: each message says what to do instead."""

import pytest

from cellmap_lightning import CellMapDataset
from cellmap_lightning.commands.config_values import refuse_csv
from cellmap_lightning.commands.predict_config import region_box
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.prediction.blending import Tiling
from cellmap_lightning.prediction.prediction_writer import make_prediction_writer
from tests.conftest import INPUTS, TARGETS


@pytest.mark.parametrize("path", ["crops.csv", "data/Crops.CSV", "crops.tsv"])
def test_a_list_of_crops_as_a_volume(path):
    with pytest.raises(CellMapError, match=r"is a list of crops; give a raw volume, .* with data.csv_path="):
        refuse_csv(path)


@pytest.mark.parametrize("path", ["raw.zarr/recon-1/em/fibsem-uint8", "csv.zarr/em", None])
def test_volumes_are_no_lists(path):
    refuse_csv(path)


@pytest.mark.parametrize("context", [[8, 8], [8, 8, 8, 8], "8", [1.5, 2, 2], 2.5, True])
def test_a_context_that_is_no_shape(context):
    with pytest.raises(CellMapError, match=r"a whole number of voxels, or three of them \(z, y, x\), got"):
        Tiling((64, 64, 64), (32, 32, 32), "trim", None, context)


@pytest.mark.parametrize("name", ["only", "classes"])
@pytest.mark.parametrize("value", ["mito", "mito,er", ""])
def test_one_name_in_place_of_a_list(name, value):
    with pytest.raises(CellMapError, match=rf"{name} must be a list of names, got '{value}'; give \[{value}\]"):
        make_prediction_writer("out.zarr", **{name: value})


@pytest.mark.parametrize("level", ["s0", "s1", "s2"])
def test_a_crop_beside_a_level_of_raw(volume, level):
    with pytest.raises(CellMapError, match=r"must be the group of raw, .*, not one of its levels; or give"):
        region_box("crop1", f"{volume.raw_path}/{level}")


@pytest.mark.parametrize("below", ["", "recon-1", "recon-1/labels"])
def test_a_folder_above_the_image(volume, below):
    with pytest.raises(CellMapError, match=r"; it holds .*: give the path of an image in it"):
        read_image(f"{volume.path}/{below}".rstrip("/"))


@pytest.mark.parametrize("classes", [["mito"], ["mito", "er"], ["er"]])
def test_a_target_without_its_classes(volume, classes):
    crop = f"{volume.path}/recon-1/labels/groundtruth/crop1"
    with pytest.raises(CellMapError, match=rf'is a folder of classes .*; write ".*crop1/\[{",".join(classes)}\]"'):
        CellMapDataset(volume.raw_path, crop, classes, INPUTS, TARGETS)
