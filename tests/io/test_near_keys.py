"""Attributes that are nearly those of a voxel size, a unit or a position: never ignored in silence."""

import json
import logging

import h5py
import numpy as np
import pytest
import zarr

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.ngff.notes import report
from tests.io.formats import writers

VOXELS = np.zeros((4, 6, 8), np.uint8)
SIZE = {"voxel_size": [16, 8, 4]}


def plain(path, **attributes):
    zarr.create_array(
        f"{path}/raw", shape=VOXELS.shape, dtype="u1", chunks=VOXELS.shape, zarr_format=2, attributes=attributes
    )
    return path / "raw"


def hdf5(path, **attributes):
    with h5py.File(path / "v.h5", "w") as file:
        file["raw"] = VOXELS
        file["raw"].attrs.update(attributes)
    return path / "v.h5" / "raw"


def n5(path, **attributes):
    path = writers.n5(path, VOXELS, block=(8, 8, 8))
    content = json.loads((path / "attributes.json").read_text())
    for key in ("axes", "units", "resolution"):
        content.pop(key)
    (path / "attributes.json").write_text(json.dumps(content | attributes))
    return path


def lattice(path, **overrides):
    return read_image(str(path), Overrides.parse(**overrides)).finest.lattice


@pytest.mark.parametrize("write", [plain, hdf5])
@pytest.mark.parametrize(
    ("key", "value", "right"),
    [
        ("unit", "um", "units"),
        ("Units", ["um"] * 3, "units"),
        ("voxel_size_units", "micrometer", "units"),
        ("unit", "pixel", "units"),
        ("Unit", "voxels", "units"),
        ("unit", "micrometr", "units"),
        ("unit", "angstrom", "units"),
        ("translation", [160, 80, 40], "offset"),
        ("translate", [160, 80, 40], "offset"),
        ("Offset", [160, 80, 40], "offset"),
        ("ofset", [160, 80, 40], "offset"),
        ("origin", [160.0, 80.0, 40.0], "offset"),
        ("offset_um", [0.16, 0.08, 0.04], "offset"),
        ("voxel_offset", [10, 10, 10], "offset"),
        ("voxelSize", [16, 8, 8], "voxel_size or resolution"),
        ("pixel_size", [4, 4, 4], "voxel_size or resolution"),
        ("resolutions", [4, 8, 16], "voxel_size or resolution"),
    ],
)
def test_another_value_is_an_error(tmp_path, write, key, value, right):
    path = write(tmp_path, **SIZE, **{key: value})
    with pytest.raises(MetadataError) as caught:
        lattice(path)
    text = str(caught.value)
    assert f"the attribute {key}=" in text
    assert str(np.asarray(value).reshape(-1)[0]) in text
    assert f"the right key is {right}: rename or remove {key}, or set voxel_size=[z, y, x]" in text
    settings = {"voxel_size": [16, 8, 4], "translation": [168, 84, 42]}
    assert lattice(path, **settings).box.lower == (160, 80, 40)


@pytest.mark.parametrize("write", [plain, hdf5])
@pytest.mark.parametrize(
    ("attributes", "lower"),
    [
        ({"units": ["nm"] * 3, "unit": "nanometer"}, (0, 0, 0)),
        ({"unit": "nm"}, (0, 0, 0)),
        ({"translation": [0, 0, 0]}, (0, 0, 0)),
        ({"translation": [8, 4, 2]}, (0, 0, 0)),  # the centre of voxel 0
        ({"offset": [160, 80, 40], "origin": [160, 80, 40]}, (160, 80, 40)),
        ({"offset": [160, 80, 40], "offset_um": [0.16, 0.08, 0.04]}, (160, 80, 40)),
        ({"offset": [160, 80, 40], "voxel_offset": [10, 10, 10]}, (160, 80, 40)),
        ({"offset": [160, 80, 40], "translate": [168, 84, 42]}, (160, 80, 40)),
        ({"resolution": [16, 8, 4], "scale": [16, 8, 4], "pixel_size_um": [0.016, 0.008, 0.004]}, (0, 0, 0)),
        ({"scale": 2.5, "origin": "Janelia", "start": "2020-01-01", "spacing": None}, (0, 0, 0)),  # other meanings
        ({"unit": "HU"}, (0, 0, 0)),
        ({"unit": "counts", "Units": "a.u."}, (0, 0, 0)),
        ({"unit": ["intensity"], "unit_": 7}, (0, 0, 0)),
        ({"solutions": 3, "limits": [0, 255], "description": "x", "uint": 8}, (0, 0, 0)),
    ],
)
def test_the_same_value_and_other_meanings_are_read(tmp_path, write, attributes, lower):
    attributes = {key: "None" if value is None else value for key, value in attributes.items()}
    box = lattice(write(tmp_path, **SIZE, **attributes))
    assert (box.step, box.box.lower) == ((16, 8, 4), lower)


@pytest.mark.parametrize("key", ["voxelsize", "pixelSize", "resolution_nm", "spacing"])
@pytest.mark.parametrize("write", [plain, hdf5])
def test_without_a_voxel_size_the_nearest_key_is_named(tmp_path, write, key):
    path = write(tmp_path, **{key: [16, 8, 4]})
    with pytest.raises(MetadataError, match=rf"{key}=\[16, 8, 4\] is not read: the right key is voxel_size or"):
        lattice(path)
    assert lattice(path, voxel_size=[16, 8, 4]).step == (16, 8, 4)


@pytest.mark.parametrize(
    "transform", [{"translate": [160, 80, 40]}, {"scale": [4, 4, 4]}, {"units": ["um"] * 3}, {"unit": "um"}]
)
def test_a_transform_beside_a_voxel_size(tmp_path, transform):
    """COSEM's attribute in an array that was copied from N5."""
    path = plain(tmp_path, **SIZE, transform=transform)
    with pytest.raises(MetadataError, match=rf"raw: the attribute transform\.{next(iter(transform))}="):
        lattice(path)


@pytest.mark.parametrize(("setting", "key"), [({"unit": "um"}, "unit"), ({"translation": [0, 0, 0]}, "translate")])
def test_a_setting_in_place_of_an_attribute(tmp_path, setting, key):
    path = plain(tmp_path, **SIZE, **{key: "mm" if key == "unit" else [160, 80, 40]})
    with pytest.raises(MetadataError, match=f"the attribute {key}="):
        lattice(path)
    lattice(path, **setting)


@pytest.mark.parametrize("key", ["offset", "translation", "Origin"])
def test_a_position_that_a_set_voxel_size_leaves_out_is_a_warning(tmp_path, caplog, key):
    path = plain(tmp_path, **SIZE, **{key: [160, 80, 40]})
    with caplog.at_level(logging.WARNING):
        image = read_image(str(path), Overrides.parse(voxel_size=[16, 8, 4]))
        report(image.path, image.notes)
        image = read_image(str(path), Overrides.parse(voxel_size=[16, 8, 4], translation=[168, 84, 42]))
        report(image.path, image.notes)
    (line,) = [record.getMessage() for record in caplog.records]
    assert f"its attribute {key}=[160, 80, 40] is not read, and the array begins at 0; set translation" in line


@pytest.mark.parametrize("attributes", [{"offset": [1, 2, 3]}, {"origin": [1, 2, 3]}, {"spacing": [4, 4, 4]}])
def test_attributes_beside_element_size_um(tmp_path, attributes):
    path = hdf5(tmp_path, element_size_um=[0.016, 0.008, 0.004], **attributes)
    with pytest.raises(MetadataError, match=rf"attribute {next(iter(attributes))}=\[.*\] is not read"):
        lattice(path)
    path.parent.unlink()
    same = {"spacing": [16.0, 8.0, 4.0], "offset": [0, 0, 0]}
    assert lattice(hdf5(tmp_path, element_size_um=[0.016, 0.008, 0.004], **same)).step == pytest.approx((16, 8, 4))


COSEM = {"axes": ["z", "y", "x"], "scale": [16, 8, 4]}


@pytest.mark.parametrize(
    ("attributes", "key"),
    [
        ({"transform": COSEM | {"translation": [160, 80, 40]}}, "translation"),
        ({"transform": COSEM | {"offset": [160, 80, 40]}}, "offset"),
        ({"transform": COSEM | {"unit": "um"}}, "unit"),
        ({"resolution": [4, 8, 16], "unit": "um"}, "unit"),
        ({"resolution": [4, 8, 16], "translate": [40, 80, 160]}, "translate"),
        ({"pixelResolution": {"dimensions": [4, 8, 16], "units": "um"}}, "units"),
    ],
)
def test_n5(tmp_path, attributes, key):
    path = n5(tmp_path, **attributes)
    with pytest.raises(MetadataError, match=f"{key}=.* is not read"):
        lattice(path)


@pytest.mark.parametrize(
    ("attributes", "origin"),
    [
        (
            {"transform": COSEM | {"translate": [160, 80, 40], "translation": [160, 80, 40], "unit": "nm"}},
            (160, 80, 40),
        ),
        ({"resolution": [4, 8, 16], "offset": [40, 80, 160], "translate": [40, 80, 160]}, (160, 80, 40)),
        ({"resolution": [0.004, 0.008, 0.016], "units": ["um"] * 3, "offset": [0.04, 0.08, 0.16]}, (160, 80, 40)),
        ({"resolution": [0.004, 0.008, 0.016], "units": "um"}, (0, 0, 0)),
        ({"pixelResolution": {"dimensions": [4, 8, 16], "unit": "nm", "units": "nm"}}, (0, 0, 0)),
    ],
)
def test_n5_that_agrees(tmp_path, attributes, origin):
    placed = lattice(n5(tmp_path, **attributes))
    assert placed.step == pytest.approx((16, 8, 4))
    assert placed.origin == pytest.approx(origin)


def test_units_of_n5_that_are_no_lengths(tmp_path):
    with pytest.raises(MetadataError, match=r"units should be three lengths such as nm \(x, y, z\), got \['px', "):
        lattice(n5(tmp_path, resolution=[4, 8, 16], units=["px", "px", "px"]))


@pytest.mark.parametrize("value", ["0.008 0.008 0.008", [0.008, 0.008], [0.008, -0.008, 0.008], 0.008])
def test_a_wrong_element_size_is_named(tmp_path, value):
    path = hdf5(tmp_path, element_size_um=value)
    with pytest.raises(MetadataError, match=r"v\.h5/raw: element_size_um (should be three numbers|must be positive)"):
        lattice(path)
    assert lattice(path, voxel_size=[8, 8, 8]).step == (8, 8, 8)
