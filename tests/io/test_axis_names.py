"""Names of axes and voxel sizes in several places: each counts, and contradictions are an error."""

import json

import h5py
import numpy as np
import pytest
import zarr

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader
from tests.foreign import write_image
from tests.io.formats import writers

VOXELS = np.random.default_rng(0).integers(1, 255, (10, 12, 14)).astype(np.uint8)


def read(path, **overrides):
    level = read_image(str(path), Overrides.parse(**overrides)).finest
    return open_reader(level).read((0, 0, 0), level.lattice.shape), level.scale


def array(path, stored, zarr_format=2, names=None, **attributes):
    options = {"dimension_names": names} if names is not None else {}
    node = zarr.create_array(
        str(path), shape=stored.shape, dtype="u1", chunks=(8,) * stored.ndim, zarr_format=zarr_format,
        attributes=attributes, **options,
    )  # fmt: skip
    node[...] = stored
    return path


@pytest.mark.parametrize("axes", ["xyz", list("xyz"), ["X", "Y", "Z"], [{"name": a, "type": "space"} for a in "xyz"]])
def test_axes_of_a_plain_array(tmp_path, axes):
    path = array(tmp_path / "raw", VOXELS.T, axes=axes, resolution=[4, 8, 16])
    voxels, scale = read(path)
    np.testing.assert_array_equal(voxels, VOXELS)
    assert scale == (16, 8, 4)


@pytest.mark.parametrize("axes", [["x", "y"], ["a", "b", ""], [1, 2, 3], {}, None, ""])
def test_axes_without_names_are_ignored(tmp_path, axes):
    voxels, _ = read(array(tmp_path / "raw", VOXELS, axes=axes, resolution=[16, 8, 4]))
    np.testing.assert_array_equal(voxels, VOXELS)


UNREAD = [
    ("dims", list("xyz")), ("dimension_names", list("xyz")), ("axis_labels", list("xyz")), ("axis_order", "XYZ"),
    ("axes_order", "x, y, z"), ("Axes", ["X", "Y", "Z"]), ("dimensions", [{"name": a} for a in "yxz"]),
    ("axes", "x,y,z"), ("axes", "cxyz"), ("array_dimensions", "xyz"), ("order", "XYZ"),
]  # fmt: skip


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(("key", "value"), UNREAD)
def test_attributes_that_are_nearly_names_of_axes(tmp_path, key, value, zarr_format):
    path = array(tmp_path / "raw", VOXELS, zarr_format, resolution=[16, 8, 4], **{key: value})
    with pytest.raises(MetadataError) as caught:
        read(path)
    assert f"raw: the attribute {key}={value!r} is not read, and contradicts the order that is, z, y, x" in str(
        caught.value
    )
    assert (
        f"the right key is axes, with a letter for each of the 3 stored axes: rename or remove {key}, or set axes="
        in (str(caught.value))
    )
    np.testing.assert_array_equal(read(path, axes="zyx")[0], VOXELS)


@pytest.mark.parametrize(
    "attributes",
    [{key: "zyx"} for key, _ in UNREAD] + [
        {"axes": "xyz", "dims": ["X", "Y", "Z"]}, {"axis_order": ["t", "c", "z", "y", "x"]}, {"axis_order": "c^ z y x"},
        {"dimension_order": "XYZCT"}, {"DimensionOrder": "XYCZT"},
        {"order": "C", "dims": [14, 12, 10], "dimensions": {"x": 14}, "layout": "zy", "axis_labels": ["a", "b", "c"]},
        {"orientation": "LPS", "coordinates": "x y", "axis_order": None, "dims": ["x", "y", "z", "lambda"]},
    ],
)  # fmt: skip
def test_the_same_order_and_other_meanings_are_read(tmp_path, attributes):
    stored = VOXELS.T if attributes.get("axes") == "xyz" else VOXELS
    size = [4, 8, 16] if attributes.get("axes") == "xyz" else [16, 8, 4]
    voxels, _ = read(array(tmp_path / "raw", stored, resolution=size, **attributes))
    np.testing.assert_array_equal(voxels, VOXELS)


@pytest.mark.parametrize(
    ("key", "order"), [("dims", "cxyz"), ("axis_labels", ["c", "z", "x", "y"]), ("Axes", "ZYXC"), ("dims", "zxy")]
)
def test_a_channel_axis_beside_them(tmp_path, key, order):
    path = array(tmp_path / "raw", VOXELS[None], resolution=[16, 8, 4], **{key: order})
    with pytest.raises(MetadataError, match=f"{key}=.* contradicts .* the 4 stored axes"):
        read(path)
    same = array(tmp_path / "same", VOXELS[None], resolution=[1, 16, 8, 4], dims="CZYX")
    np.testing.assert_array_equal(read(same)[0], VOXELS)


@pytest.mark.parametrize(
    ("zarr_format", "names", "attributes"),
    [
        (2, None, {"_ARRAY_DIMENSIONS": list("zyx"), "axes": list("xyz")}),
        (2, None, {"axis_names": list("zyx"), "axes": "xyz"}),
        (3, list("xyz"), {"_ARRAY_DIMENSIONS": list("zyx")}),
        (3, list("xyz"), {"axes": list("yxz")}),
    ],
)
def test_attributes_that_contradict_each_other(tmp_path, zarr_format, names, attributes):
    path = array(tmp_path / "raw", VOXELS, zarr_format, names, resolution=[16, 8, 4], **attributes)
    with pytest.raises(MetadataError, match=r"raw: its axes are .* and .*; set axes"):
        read(path)
    voxels, _ = read(path, axes="zyx")
    np.testing.assert_array_equal(voxels, VOXELS)


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("names", [list("xyz"), list("zxy"), list("zyx"), ["dim_0", "dim_1", "dim_2"], None])
def test_an_image_and_its_arrays(tmp_path, names, zarr_format):
    path = write_image(tmp_path / "em", VOXELS, zarr_format=zarr_format)
    file, key = ("zarr.json", "dimension_names") if zarr_format == 3 else (".zattrs", "_ARRAY_DIMENSIONS")
    file = path / "s0" / file
    content = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps({**content, key: names}))
    if names in (list("xyz"), list("zxy")):
        with pytest.raises(MetadataError, match=r"s0: its axes are \['(x|z)', .*own metadata, and \['z', 'y', 'x'\]"):
            read(path)
        return
    np.testing.assert_array_equal(read(path)[0], VOXELS)


def n5(path, stored, attributes):
    path = writers.n5(path, stored, block=(16, 16, 16))
    file = path / "attributes.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in (content | attributes).items() if v is not None}))
    return path


@pytest.mark.parametrize("axes", ["xyz", "zyx", "yxz"])
@pytest.mark.parametrize("key", ["resolution", "pixelResolution"])
def test_axes_of_n5(tmp_path, axes, key):
    """They list the fastest axis first, and so does the voxel size."""
    stored = VOXELS.transpose(["zyx".index(axis) for axis in reversed(axes)])
    size = [{"z": 16, "y": 8, "x": 4}[axis] for axis in axes]
    attributes = {"axes": list(axes), "resolution": None, key: size, "offset": [10 * s for s in size]}
    path = n5(tmp_path, stored, attributes)
    voxels, scale = read(path)
    np.testing.assert_array_equal(voxels, VOXELS)
    assert scale == (16, 8, 4)
    assert read_image(str(path)).finest.translation == (160, 80, 40)


@pytest.mark.parametrize("axes", [["c", "x", "y", "z"], ["z", "c", "y", "x"]])
def test_axes_of_n5_after_another(tmp_path, axes):
    stored = VOXELS[..., None] if axes[0] == "c" else VOXELS[:, :, None]
    attributes = {"axes": axes, "units": None, "resolution": [1, 4, 8, 16]}
    path = tmp_path / "volume.n5"
    path.mkdir()
    about = {
        "dimensions": stored.shape[::-1],
        "blockSize": [16] * 4,
        "dataType": "uint8",
        "compression": {"type": "raw"},
    }
    (path / "attributes.json").write_text(json.dumps(about | attributes))
    with pytest.raises(MetadataError, match="axes should list x, y and z first"):
        read(path)


@pytest.mark.parametrize(
    ("kind", "attributes"),
    [
        ("zarr", {"voxel_size": [16, 8, 4], "resolution": [4, 8, 16]}),
        ("zarr", {"voxel_size": [16, 8, 4], "resolution": [16, 8, 8]}),
        ("hdf5", {"voxel_size": [16, 8, 4], "resolution": [16, 8, 8]}),
        ("hdf5", {"resolution": [16, 8, 4], "element_size_um": [0.016, 0.008, 0.016]}),
        ("hdf5", {"voxel_size": [16, 8, 4], "element_size_um": [16.0, 8.0, 4.0]}),
    ],
)
def test_voxel_sizes_that_contradict_each_other(tmp_path, attributes, kind):
    if kind == "zarr":
        path = array(tmp_path / "raw", VOXELS, **attributes)
    else:
        with h5py.File(tmp_path / "v.h5", "w") as file:
            file["raw"] = VOXELS
            file["raw"].attrs.update(attributes)
        path = tmp_path / "v.h5" / "raw"
    with pytest.raises(MetadataError, match=r"raw: .*contradict each other; set voxel_size"):
        read(path)
    assert read(path, voxel_size=[16, 8, 4])[1] == (16, 8, 4)


@pytest.mark.parametrize("attributes", [{"resolution": [4, 8, 16]}, {"pixelResolution": [4, 8, 16]}])
def test_voxel_sizes_that_agree(tmp_path, attributes):
    _, scale = read(n5(tmp_path, VOXELS, {"resolution": [4, 8, 16]} | attributes))
    assert scale == (16, 8, 4)
    other = {"dimensions": [0.004, 0.008, 0.032], "unit": "um"}
    with pytest.raises(MetadataError, match="contradict each other"):
        read(n5(tmp_path / "other", VOXELS, {"resolution": [4, 8, 16], "pixelResolution": other}))
