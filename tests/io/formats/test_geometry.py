"""Voxel sizes, translations, levels and axes of each format, as other programs write them."""

import json

import h5py
import mrcfile
import numpy as np
import pytest
import tensorstore
import zarr

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader
from tests.io.formats import writers

VOXELS = np.random.default_rng(0).integers(1, 255, (20, 64, 48)).astype(np.uint8)


def levels(path, **overrides):
    return [
        (level.name, level.lattice.shape, level.scale, level.translation)
        for level in read_image(str(path), Overrides.parse(**overrides)).present
    ]


def attributes(path, values):
    path.mkdir(parents=True, exist_ok=True)
    file = path / "attributes.json"
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def n5_level(path, voxels):
    """An N5 dataset without metadata besides its own."""
    writers.n5(path, voxels).rename(path / "level")
    content = json.loads((path / "level" / "attributes.json").read_text())
    for key in ("axes", "units", "resolution"):
        del content[key]
    (path / "level" / "attributes.json").write_text(json.dumps(content))
    return path / "level"


@pytest.fixture
def pyramid(tmp_path):
    """An N5 group with two levels and no metadata."""
    group = tmp_path / "volume.n5" / "em"
    group.mkdir(parents=True)
    for name, voxels in (("a", VOXELS), ("b", VOXELS[::2, ::2, ::2])):
        (tmp_path / name).mkdir()
        n5_level(tmp_path / name, voxels)
    (tmp_path / "a" / "level").rename(group / "s0")
    (tmp_path / "b" / "level").rename(group / "s1")
    return group


def test_n5_of_cosem(pyramid):
    """A transform in each level: the first axis is the slowest, and translate is the centre of voxel 0."""
    for number, size in enumerate(([10.0, 4.0, 4.0], [20.0, 8.0, 8.0])):
        transform = {
            "axes": ["z", "y", "x"],
            "units": ["nm"] * 3,
            "scale": size,
            "translate": [5.0 * number, 2.0 * number, 1.0],
        }
        attributes(pyramid / f"s{number}", {"transform": transform})
    expected = [("s0", (20, 64, 48), (10, 4, 4), (0, 0, 1)), ("s1", (10, 32, 24), (20, 8, 8), (5, 2, 1))]
    assert levels(pyramid) == expected
    assert levels(pyramid / "s1")[0][1:] == expected[1][1:]


def test_n5_of_cosem_in_the_group(pyramid):
    entries = [
        {"path": f"s{number}", "transform": {"axes": ["z", "y", "x"], "units": ["um"] * 3, "scale": [0.01 * size] * 3}}
        for number, size in enumerate((1, 2))
    ]
    attributes(pyramid, {"multiscales": [{"datasets": entries}]})
    assert [level[2] for level in levels(pyramid)] == [(10, 10, 10), (20, 20, 20)]


def test_n5_of_bigdataviewer(pyramid):
    """Factors and resolution in the order x, y, z; coarser voxels are means, half a voxel further."""
    attributes(pyramid, {"pixelResolution": {"dimensions": [4, 5, 10], "unit": "nm"}})
    attributes(pyramid / "s1", {"downsamplingFactors": [2, 2, 2]})
    assert levels(pyramid) == [
        ("s0", (20, 64, 48), (10, 5, 4), (0, 0, 0)),
        ("s1", (10, 32, 24), (20, 10, 8), (5, 2.5, 2)),
    ]
    attributes(pyramid, {"pixelResolution": [4, 5, 10], "scales": [[1, 1, 1], [2, 2, 2]]})
    assert [level[2] for level in levels(pyramid)] == [(10, 5, 4), (20, 10, 8)]


def test_n5_of_paintera(pyramid):
    attributes(pyramid / "s0", {"resolution": [4, 4, 10], "offset": [40, 80, 100]})
    attributes(pyramid / "s1", {"downsamplingFactors": [2, 2, 2]})
    assert [level[3] for level in levels(pyramid)] == [(100, 80, 40), (105, 82, 42)]


def test_n5_without_voxel_sizes(pyramid):
    attributes(pyramid / "s1", {"downsamplingFactors": [2, 2, 2]})
    with pytest.raises(MetadataError, match="set voxel_size"):
        levels(pyramid)
    assert [level[2] for level in levels(pyramid, voxel_size=[10, 4, 4])] == [(10, 4, 4), (20, 8, 8)]


@pytest.mark.parametrize(
    "change", [{"axes": ["a", "b", "c"]}, {"scale": [1, 2]}, {"units": ["s"] * 3}, {"scale": None}]
)
def test_bad_transforms_of_n5(pyramid, change):
    transform = {"axes": ["z", "y", "x"], "units": ["nm"] * 3, "scale": [8, 8, 8]}
    attributes(pyramid / "s0", {"transform": transform | change})
    with pytest.raises(MetadataError, match="transform"):
        levels(pyramid / "s0")


def test_missing_blocks_of_n5_are_reported(pyramid):
    """A block that is not stored reads as 0, and counts as missing."""
    (pyramid / "s0" / "0" / "1" / "0").unlink()
    reader = open_reader(read_image(str(pyramid / "s0"), Overrides(voxel_size=(8, 4, 4))).finest)
    assert reader.missing_chunks((0, 0, 0), reader.shape) == [(0, 1, 0)]
    expected = VOXELS.copy()
    expected[:16, 32:64, :32] = 0
    np.testing.assert_array_equal(reader.read((0, 0, 0), reader.shape), expected)
    assert len(reader.stored()) == 7


def test_scales_of_precomputed(tmp_path):
    """The offset counts voxels to the corner of voxel 0, as Neuroglancer draws it."""
    path = writers.precomputed(tmp_path, VOXELS, (10, 4, 4), offset=(3, 2, 1))
    store = tensorstore.open(
        {
            "driver": "neuroglancer_precomputed", "kvstore": {"driver": "file", "path": str(path)},
            "scale_metadata": {
                "size": [24, 32, 10], "resolution": [8, 8, 20], "voxel_offset": [0, 1, 1], "chunk_size": [32, 32, 16],
                "encoding": "raw",
            },
        },
        create=True,
    ).result()  # fmt: skip
    store[..., 0] = VOXELS[::2, ::2, ::2].T
    (_, _, size, translation), (_, shape, coarse, start) = levels(path)
    assert (size, translation) == ((10, 4, 4), (35, 10, 6))
    assert (shape, coarse, start) == ((10, 32, 24), (20, 8, 8), (30, 12, 4))
    image = read_image(str(path))
    for level, expected in zip(image.present, (VOXELS, VOXELS[::2, ::2, ::2]), strict=True):
        np.testing.assert_array_equal(open_reader(level).read((0, 0, 0), level.lattice.shape), expected)


def test_pyramid_of_ome_tiff(tmp_path):
    path = writers.ome_pyramid(tmp_path, VOXELS, (10, 4, 4))
    assert [level[1:] for level in levels(path)] == [
        ((20, 64, 48), (10, 4, 4), (0, 0, 0)),
        ((20, 32, 24), (10, 8, 8), (0, 2, 2)),
    ]
    level = read_image(str(path)).present[1]
    half = VOXELS.reshape(20, 32, 2, 24, 2).mean((2, 4)).astype(np.uint8)
    np.testing.assert_array_equal(open_reader(level).read((0, 0, 0), half.shape), half)


@pytest.mark.parametrize(
    ("values", "size", "translation"),
    [
        ({"element_size_um": [0.01, 0.004, 0.004]}, (10, 4, 4), (0, 0, 0)),
        ({"resolution": [10, 4, 4]}, (10, 4, 4), (5, 2, 2)),
        ({"resolution": [40, 4, 4], "offset": [1520, 3644, 3648]}, (40, 4, 4), (1540, 3646, 3650)),
        ({"voxel_size": [1, 2, 3], "units": "um"}, (1000, 2000, 3000), (500, 1000, 1500)),
    ],
)
def test_attributes_of_hdf5(tmp_path, values, size, translation):
    with h5py.File(tmp_path / "volume.h5", "w") as file:
        file["raw"] = VOXELS
        file["raw"].attrs.update(values)
    [level] = levels(tmp_path / "volume.h5" / "raw")
    np.testing.assert_allclose(level[2:], (size, translation))


def test_axes_of_hdf5(tmp_path):
    with h5py.File(tmp_path / "volume.h5", "w") as file:
        dataset = file.create_dataset("raw", data=VOXELS.T[..., None])
        for dimension, label in zip(dataset.dims, "xyzc", strict=True):
            dimension.label = label
        dataset.attrs["resolution"] = [4, 5, 10]
    level = read_image(str(tmp_path / "volume.h5" / "raw")).finest
    assert (level.lattice.shape, level.scale) == (VOXELS.shape, (10, 5, 4))
    np.testing.assert_array_equal(open_reader(level).read((1, 2, 3), (9, 8, 7)), VOXELS[1:10, 2:10, 3:10])


@pytest.mark.parametrize(
    ("values", "size", "translation"),
    [
        ({"resolution": [10, 4, 4], "offset": [100, 0, 40]}, (10, 4, 4), (105, 2, 42)),
        ({"voxel_size": [0.01, 0.004, 0.004], "units": ["um"] * 3}, (10, 4, 4), (5, 2, 2)),
        ({"voxel_size": [10, 4, 4], "axis_names": ["z", "y", "x"]}, (10, 4, 4), (5, 2, 2)),
    ],
)
@pytest.mark.parametrize("zarr_format", [2, 3])
def test_attributes_of_zarr(tmp_path, values, size, translation, zarr_format):
    """As funlib.persistence and gunpowder write them: the offset is the corner of voxel 0."""
    array = zarr.create_array(tmp_path / "a.zarr", data=VOXELS, zarr_format=zarr_format)
    array.attrs.update(values)
    [level] = levels(tmp_path / "a.zarr")
    np.testing.assert_allclose(level[2:], (size, translation))


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"resolution": 8},
        {"resolution": [8, 8]},
        {"voxel_size": [8, 0, 8]},
        {"voxel_size": [8, 8, 8], "units": ["s"] * 3},
    ],
)
def test_bad_attributes_of_zarr(tmp_path, values):
    zarr.create_array(tmp_path / "a.zarr", data=VOXELS).attrs.update(values)
    with pytest.raises(MetadataError, match="voxel_size"):
        levels(tmp_path / "a.zarr")


def test_origin_of_mrc(tmp_path):
    path = writers.mrc(tmp_path, VOXELS, (10, 4, 4))
    with mrcfile.open(path, mode="r+") as file:
        file.header.origin = (100, 200, 300)
    [level] = levels(path)
    np.testing.assert_allclose(level[2:], ((10, 4, 4), (30, 20, 10)))


@pytest.mark.parametrize(
    "settings", [{"voxel_size": [1, 2, 3], "translation": [7, 8, 9]}, {"unit": "um"}, {"translation": [7, 8, 9]}]
)
def test_settings_replace_metadata(tmp_path, settings):
    [level] = levels(writers.hdf5(tmp_path, VOXELS, (10, 4, 4)), **settings)
    size = settings.get("voxel_size", (10_000, 4000, 4000) if "unit" in settings else (10, 4, 4))
    assert level[2] == tuple(size)
    assert level[3] == tuple(settings.get("translation", (5000, 2000, 2000)))


def test_another_package_can_add_a_format(tmp_path, monkeypatch):
    """An entry point of an installed distribution."""
    package = tmp_path / "other_format-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: other-format\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[cellmap_lightning.formats]\nraw = other_format:RawFormat\n")
    (tmp_path / "other_format.py").write_text(
        "from cellmap_lightning.io.formats.npy import NpyFormat\n"
        "class RawFormat(NpyFormat):\n    name = 'other'\n    suffixes = ('.other',)\n"
    )
    from cellmap_lightning.io.formats import registry

    monkeypatch.syspath_prepend(str(tmp_path))
    registry.formats.cache_clear()
    try:
        writers.npy(tmp_path, VOXELS).rename(tmp_path / "volume.other")
        assert levels(tmp_path / "volume.other", voxel_size=[1, 1, 1])[0][1] == VOXELS.shape
        assert levels(tmp_path / "volume", voxel_size=[1, 1, 1])[0][1] == VOXELS.shape
    finally:
        registry.formats.cache_clear()
