"""Regions of a prediction that lie outside raw: an error with both boxes, never a region that is cut in silence."""

import re

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import Box, Lattice
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.prediction.blocks import voxels_of
from tests.prediction.predictions import predict, raw_volume, read

pytestmark = pytest.mark.usefixtures("quiet_lightning", "no_threads_left")

WHOLE = Lattice((4.0, 2.0, 2.0), (8.0, 4.0, 4.0), (100, 50, 50))
INSIDE = {"z": [80, 160], "y": [40, 80], "x": [40, 80]}


def box(**ends):
    pairs = list((INSIDE | ends).values())
    return Box(tuple(float(a) for a, _ in pairs), tuple(float(b) for _, b in pairs))


@pytest.mark.parametrize(
    ("ends", "part", "voxels", "remedy"),
    [
        ({"z": [700, 900]}, "partly outside", "z 87:113", "region={z: [700, 800], y: [40, 80], x: [40, 80]}"),
        ({"y": [-100, 80]}, "partly outside", "y -25:20", "region={z: [80, 160], y: [0, 80], x: [40, 80]}"),
        ({"x": [190, 205]}, "partly outside", "x 47:52", "region={z: [80, 160], y: [40, 80], x: [190, 200]}"),
        ({"z": [5000, 5100]}, "outside", "z 625:638", "such as region={z: [0, 800], y: [0, 200], x: [0, 200]}"),
        ({"z": [800, 808]}, "outside", "z 100:101", "such as region={z: [0, 800], y: [0, 200], x: [0, 200]}"),
        (
            {"z": [0, 100], "x": [300, 700]}, "outside", "x 75:175",
            "or, if its ends are in the order x, y, z, region={z: [300, 700], y: [40, 80], x: [0, 100]}",
        ),
    ],
)  # fmt: skip
def test_the_error_names_both_boxes_and_what_is_right(ends, part, voxels, remedy):
    region = box(**ends)
    with pytest.raises(CellMapValueError) as caught:
        voxels_of(WHOLE, region, WHOLE.box, "/data/raw.zarr")
    text = str(caught.value)
    assert text.startswith(f"/data/raw.zarr: the region {region} (voxels ")
    assert voxels in text
    assert f" lies {part} the volume, {WHOLE.box} (voxels z 0:100, y 0:50, x 0:50)" in text
    assert remedy in text


@pytest.mark.parametrize(
    ("ends", "raw", "found"),
    [
        ({"z": [0, 804]}, WHOLE.box, ((0, 10, 10), (100, 10, 10))),  # half a voxel, as of a box of voxel centres
        ({"z": [-4, 800]}, WHOLE.box, ((0, 10, 10), (100, 10, 10))),
        ({"z": [0, 806]}, Box((0, 0, 0), (806, 200, 200)), ((0, 10, 10), (100, 10, 10))),  # a level cut at the end
        ({"z": [83, 85]}, WHOLE.box, ((10, 10, 10), (1, 10, 10))),
        ({}, WHOLE.box, ((10, 10, 10), (10, 10, 10))),
    ],
)
def test_a_region_inside_is_rounded_to_voxels(ends, raw, found):
    assert voxels_of(WHOLE, box(**ends), raw) == found


@pytest.mark.parametrize("axis", "zyx")
@pytest.mark.parametrize("side", [0, 1])
def test_a_prediction_is_refused_before_anything_is_written(tmp_path, axis, side):
    path, values = raw_volume(tmp_path, (20, 24, 28))
    predict(path, (12, 16, 20), tmp_path / "whole.zarr")
    found = np.asarray(read(tmp_path / "whole.zarr"))
    assert found.shape == values.shape
    whole = read_multiscale(path).finest.lattice
    region = whole.box.as_dict()
    predict(path, (12, 16, 20), tmp_path / "same.zarr", region=region)
    np.testing.assert_array_equal(read(tmp_path / "same.zarr"), found)
    region[axis][side] += (2 * side - 1) * 3 * whole.step["zyx".index(axis)]
    with pytest.raises(CellMapValueError, match=re.escape(f"{path}: the region ") + ".* lies partly outside"):
        predict(path, (12, 16, 20), tmp_path / "out.zarr", region=region)
    assert not (tmp_path / "out.zarr").exists()
