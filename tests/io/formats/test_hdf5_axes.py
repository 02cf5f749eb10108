"""Attributes of HDF5 datasets that name axes in another order than the one that is read."""

import json

import h5py
import numpy as np
import pytest

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides


def written(folder, labels=(), **attributes):
    folder.mkdir(exist_ok=True)
    with h5py.File(folder / "raw.h5", "w") as file:
        file["raw"] = np.zeros((4, 5, 6), np.uint8)
        file["raw"].attrs.update({"resolution": [8.0, 8.0, 8.0], **attributes})
        for number, label in enumerate(labels):
            file["raw"].dims[number].label = label
    return str(folder / "raw.h5" / "raw")


@pytest.mark.parametrize(
    ("name", "value"),
    [("dims", ["x", "y", "z"]), ("axis_order", "XYZ"), ("axes", "xyz"), ("axis_names", ["y", "z", "x"])],
)
def test_other_orders_are_refused(tmp_path, name, value):
    path = written(tmp_path, **{name: value})
    with pytest.raises(MetadataError) as caught:
        read_image(path)
    assert f"the attribute {name}={value!r} is not read, and contradicts the order that is, z, y, x" in str(
        caught.value
    )
    letters = "".join(value).lower()
    assert f"dimension labels, or of axistags: rename or remove {name}, or set axes={letters}" in str(caught.value)
    assert read_image(path, Overrides(axes=letters)).finest.lattice.shape == tuple(
        (4, 5, 6)[letters.index(axis)] for axis in "zyx"
    )


@pytest.mark.parametrize("attributes", [{"dims": "zyx"}, {"axes": ["z", "y", "x"]}, {"order": "C"}, {"axes": 3}])
def test_equal_orders_and_other_values_pass(tmp_path, attributes):
    assert read_image(written(tmp_path, **attributes)).finest.lattice.shape == (4, 5, 6)


def test_what_is_read_contradicts_nothing(tmp_path):
    assert read_image(written(tmp_path, "xyz", dims="xyz")).finest.lattice.shape == (6, 5, 4)
    tags = json.dumps({"axes": [{"key": axis} for axis in "xyz"]})
    assert read_image(written(tmp_path / "ilastik", axistags=tags, axes="xyz")).finest.lattice.shape == (6, 5, 4)
