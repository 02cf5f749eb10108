"""Volumes that cannot be read: each is an error with one sentence that has the place and the remedy."""

import json
import subprocess
import sys

import h5py
import imageio.v3 as imageio
import mrcfile
import numpy as np
import pytest
import tifffile

from cellmap_lightning.errors import CellMapError, CellMapFileNotFoundError, ChunkError, MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader
from tests.io.formats import writers

SIZE = Overrides(voxel_size=(8, 4, 4))
VOXELS = np.random.default_rng(0).integers(1, 255, (20, 64, 64)).astype(np.uint8)


def message(path, overrides=SIZE, error=MetadataError):
    def read():
        level = read_image(str(path), overrides).finest
        open_reader(level).read((0, 0, 0), level.lattice.shape)

    with pytest.raises(error) as e:
        read()
    text = str(e.value)
    assert str(path).partition(".h5")[0] in text
    assert "\n" not in text
    return text


@pytest.mark.parametrize("write", [writers.npy, writers.tiff, writers.slices], ids=["npy", "tiff", "slices"])
def test_a_missing_voxel_size(tmp_path, write):
    path = write(tmp_path, VOXELS)
    with pytest.raises(MetadataError, match=r"set voxel_size=\[z, y, x\] in nm"):
        read_image(str(path))
    assert read_image(str(path), SIZE).finest.scale == (8, 4, 4)


@pytest.mark.parametrize("part", [0.999, 0.5, 0.001])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_truncated_tiff(tmp_path, part, compression):
    path = writers.tiff(tmp_path, VOXELS, compression=compression)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert "copy" in message(path)


@pytest.mark.parametrize("part", [0.9, 0.5, 0.01])
@pytest.mark.parametrize("write", [writers.npy, writers.mrc], ids=["npy", "mrc"])
def test_a_truncated_file(tmp_path, write, part):
    path = write(tmp_path, VOXELS)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert "write it again" in message(path)


@pytest.mark.parametrize("part", [0.5, 0.1, 0.001])
def test_a_truncated_hdf5_file(tmp_path, part):
    path = writers.hdf5(tmp_path, VOXELS)
    file = path.parents[1]
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * part)])
    assert "HDF5" in message(path)


@pytest.mark.parametrize(
    ("inside", "text"),
    [
        ("", r"needs a dataset; give volume.h5/<dataset>, one of volumes/other, volumes/raw"),
        ("volumes/row", r"has no dataset 'volumes/row'; did you mean 'volumes/raw'\?"),
        ("nothing/at/all", r"has no dataset 'nothing/at/all'.*volumes/other, volumes/raw"),
    ],
)
def test_an_hdf5_path_without_a_dataset(tmp_path, inside, text):
    file = writers.hdf5(tmp_path, VOXELS).parents[1]
    with pytest.raises(CellMapFileNotFoundError, match=text):
        read_image(str(file / inside))


def test_the_only_dataset_needs_no_name(tmp_path):
    with h5py.File(tmp_path / "volume.h5", "w") as file:
        file["deep/raw"] = VOXELS
    assert read_image(str(tmp_path / "volume.h5"), SIZE).finest.lattice.shape == VOXELS.shape


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_slices_of_different_sizes(tmp_path, suffix):
    writers.slices(tmp_path, VOXELS, suffix=suffix)
    file = tmp_path / f"section_15{suffix}"
    (imageio.imwrite if suffix == ".png" else tifffile.imwrite)(file, VOXELS[0, :60])
    text = message(tmp_path)
    assert f"section_15{suffix}: has 60 x 64 pixels of uint8, and section_8{suffix} has 64 x 64" in text


def test_slices_of_different_types(tmp_path):
    writers.slices(tmp_path, VOXELS)
    imageio.imwrite(tmp_path / "section_15.png", VOXELS[0].astype(np.uint16))
    assert "64 x 64 pixels of uint16" in message(tmp_path)


@pytest.mark.parametrize("gone", [(9,), (15, 16), (26,)])
def test_a_gap_in_the_numbers(tmp_path, gone):
    writers.slices(tmp_path, VOXELS)
    for number in gone:
        (tmp_path / f"section_{number}.png").unlink()
    assert f"section_{gone[-1] + 1}.png follows section_{gone[0] - 1}.png" in message(tmp_path)


@pytest.mark.parametrize("names", ["abc", "aabb", ["1a", "1b"]])
def test_slices_without_numbers(tmp_path, names):
    for name in names if isinstance(names, list) else dict.fromkeys(names):
        imageio.imwrite(tmp_path / f"{name}.png", VOXELS[0])
    assert "number" in message(tmp_path)


@pytest.mark.parametrize("compressor", ["lz4", {"type": "jpeg"}, None])
def test_an_unknown_compressor_of_n5(tmp_path, compressor):
    path = writers.n5(tmp_path, VOXELS)
    attributes = json.loads((path / "attributes.json").read_text())
    del attributes["compression"]
    attributes["compressionType" if isinstance(compressor, str) else "compression"] = compressor
    (path / "attributes.json").write_text(json.dumps(attributes))
    assert "raw, gzip, bzip2, xz, blosc, zstd" in message(path)


@pytest.mark.parametrize("content", [b"\0\0\0\3" + b"\xff" * 12, b"\0\7\0\3" + b"\0\0\0\1" * 3, b"\0", None])
def test_a_damaged_block_of_n5(tmp_path, content):
    path = writers.n5(tmp_path, VOXELS)
    block = path / "0" / "0" / "0"
    block.write_bytes(block.read_bytes()[:-9] if content is None else content)
    assert "voxels z[0:20]" in message(path, error=ChunkError)


@pytest.mark.parametrize("key", ["dimensions", "blockSize", "dataType", "resolution"])
@pytest.mark.parametrize("value", [None, [1], "x", [0, 1, 2], {}])
def test_bad_attributes_of_n5(tmp_path, key, value):
    path = writers.n5(tmp_path, VOXELS)
    attributes = json.loads((path / "attributes.json").read_text())
    (path / "attributes.json").write_text(json.dumps(attributes | {key: value}))
    with pytest.raises(CellMapError):
        read_image(str(path))


@pytest.mark.parametrize("value", [None, [], [{}], [{"key": "a", "size": [1, 2]}], "x"])
def test_bad_scales_of_precomputed(tmp_path, value):
    path = writers.precomputed(tmp_path, VOXELS)
    info = json.loads((path / "info").read_text())
    (path / "info").write_text(json.dumps(info | {"scales": value}))
    with pytest.raises(CellMapError, match=str(path)):
        read_image(str(path))


@pytest.mark.parametrize("channels", [2, 3, 7])
def test_several_channels(tmp_path, channels):
    path = tmp_path / "volume.h5"
    with h5py.File(path, "w") as file:
        file["raw"] = np.repeat(VOXELS[None], channels, 0)
    assert f"axis 'c' of length {channels}" in message(path)
    npy = tmp_path / "volume.npy"
    np.save(npy, np.repeat(VOXELS[None], channels, 0))
    assert f"axis 'c' of length {channels}" in message(npy)
    stack = tmp_path / "volume.tif"
    tifffile.imwrite(stack, np.repeat(VOXELS[:, None], channels, 1), imagej=True, metadata={"axes": "ZCYX"})
    assert f"axis 'c' of length {channels}" in message(stack)


@pytest.mark.parametrize("suffix", [".tif", ".png", "slices"])
def test_colours(tmp_path, suffix):
    colours = np.stack([VOXELS] * 3, -1)
    if suffix == ".tif":
        path = tmp_path / "volume.tif"
        tifffile.imwrite(path, colours, photometric="rgb")
        assert "RGB" in message(path)
        return
    for number, plane in enumerate(colours):
        name = tmp_path / f"s{number}{'.tif' if suffix == 'slices' else '.png'}"
        (tifffile.imwrite if suffix == "slices" else imageio.imwrite)(name, plane)
    assert "gray" in message(tmp_path)


@pytest.mark.parametrize("dtype", ["complex64", "S3", "datetime64[s]"])
def test_voxels_that_are_not_numbers(tmp_path, dtype):
    path = tmp_path / "volume.npy"
    np.save(path, np.zeros((4, 4, 4), dtype))
    assert "not a number" in message(path)


@pytest.mark.parametrize("axes", ["zy", "zyxc", "xyzz", 3, ""])
def test_bad_axes(tmp_path, axes):
    with pytest.raises(CellMapError, match="axes"):
        read_image(str(writers.npy(tmp_path, VOXELS)), Overrides.parse(voxel_size=[8, 4, 4], axes=axes))


def test_axes_that_are_set(tmp_path):
    path = writers.npy(tmp_path, VOXELS)
    level = read_image(str(path), Overrides.parse(voxel_size=[8, 4, 4], axes="xyz")).finest
    np.testing.assert_array_equal(open_reader(level).read((3, 2, 1), (5, 6, 7)), VOXELS.T[3:8, 2:8, 1:8])
    stack = writers.tiff(tmp_path, VOXELS, imagej=True, metadata={"axes": "TYX"})
    assert "axis" in message(stack)
    level = read_image(str(stack), Overrides.parse(voxel_size=[8, 4, 4], axes="zyx")).finest
    np.testing.assert_array_equal(open_reader(level).read((0, 0, 0), VOXELS.shape), VOXELS)


def test_an_mrc_file_without_a_voxel_size(tmp_path):
    with mrcfile.new(tmp_path / "volume.mrc") as file:
        file.set_data(VOXELS.astype(np.int16))
    with pytest.raises(MetadataError, match="set voxel_size"):
        read_image(str(tmp_path / "volume.mrc"))


BLOCKED = """
import sys
sys.modules[{module!r}] = None
from cellmap_lightning.io.images import read_image
try:
    read_image({path!r})
except ImportError as e:
    print(type(e).__name__, e)
"""


@pytest.mark.parametrize(
    ("module", "write", "extra"),
    [
        ("h5py", writers.hdf5, "hdf5"), ("tifffile", writers.tiff, "tiff"), ("PIL", writers.slices, "png"),
        ("mrcfile", writers.mrc, "mrc"), ("tensorstore", writers.precomputed, "precomputed"),
    ],
)  # fmt: skip
def test_a_library_that_is_not_installed(tmp_path, module, write, extra):
    program = BLOCKED.format(module=module, path=str(write(tmp_path, VOXELS)))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("MissingExtraError")
    assert f'pip install "cellmap-lightning[{extra}]"' in done.stdout
    assert done.stdout.count("\n") == 1
