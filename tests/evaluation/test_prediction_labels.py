"""Predictions on voxels of a manifest that reach to the border of the prediction, as crops at the edge of a volume."""

import numpy as np
import pytest

from cellmap_lightning.errors import CellMapError
from cellmap_lightning.evaluation.prediction_labels import prediction_labels, stored_meaning
from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.io.writer import write_multiscale
from cellmap_lightning.splits.manifests import ManifestRow

#: Voxels of 2 nm that fill the box of 6³ predicted voxels of 8 nm.
ROW = ManifestRow("jrc_a", "crop7", "er", Lattice((-3, -3, -3), (2, 2, 2), (24, 24, 24)))


def labels(folder, values, kind, threshold=0.5):
    path = folder / "er"
    one = 255 if kind == "scaled" else 1
    about = {"cellmap": {"prediction": {"class_name": "er", "values": kind, "probability_1": one}}}
    write_multiscale(path, values, scale=(8, 8, 8), translation=(0, 0, 0), levels=1, attributes=about)
    return prediction_labels(ROW, path, threshold, None, stored_meaning(ROW, path))


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("border", [0, -1])
@pytest.mark.parametrize(
    ("dtype", "kind"), [("uint8", "scaled"), ("float32", "probability"), ("float16", "probability")]
)
def test_a_slope_that_ends_at_the_border_is_no_error(tmp_path, axis, border, dtype, kind):
    """The interpolant continues to below 0 in the last half voxel, and to above 1 at the other border."""
    one = 255 if dtype == "uint8" else 1
    values = np.zeros((6, 6, 6))
    view = np.moveaxis(values, axis, 0)
    view[border], view[1 if border == 0 else -2], view[2 if border == 0 else -3] = 0, 0.4 * one, 0.4 * one
    view[-1 if border == 0 else 0] = one
    result = np.moveaxis(labels(tmp_path, values.astype(dtype), kind), axis, 0)
    assert not result[:4].any() if border == 0 else not result[-4:].any()
    assert result[-4:].all() if border == 0 else result[:4].all()


@pytest.mark.parametrize("place", [(0, 0, 0), (5, 5, 5), (2, 3, 2), (0, 5, 3)])
@pytest.mark.parametrize(("value", "kind"), [(-0.5, "probability"), (4, "probability"), (600, "scaled")])
def test_a_stored_value_out_of_range_is_an_error(tmp_path, place, value, kind):
    values = np.zeros((6, 6, 6), np.uint16 if kind == "scaled" else np.float32)
    values[place] = value
    with pytest.raises(CellMapError, match="jrc_a/crop7/er: its metadata record values="):
        labels(tmp_path, values, kind)


def test_a_single_plane_is_checked(tmp_path):
    values = np.full((1, 6, 6), -1, np.float32)
    with pytest.raises(CellMapError, match="its metadata record values="):
        labels(tmp_path, values, "probability")
