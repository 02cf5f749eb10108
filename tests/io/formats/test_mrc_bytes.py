"""Bytes of MRC files are signed, but unsigned in files of IMOD that do not mark them as signed."""

import mrcfile
import numpy as np
import pytest

from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.readers import open_reader

BYTES = np.random.default_rng(0).integers(0, 256, (8, 12, 16)).astype(np.uint8)
STAMP = 1146047817


def written(path, voxels, stamp=None, flags=0, order="little"):
    with mrcfile.new(path) as file:
        file.set_data(voxels)
        file.voxel_size = 80.0
    if order == "big":
        with mrcfile.open(path, "r+") as file:
            data = file.data.copy()
            header = file.header.byteswap()
        content = header.tobytes() + data.byteswap().tobytes()
        path.write_bytes(content[:212] + b"\x11\x11\0\0" + content[216:])
    if stamp is not None:
        content = bytearray(path.read_bytes())
        content[152:160] = stamp.to_bytes(4, order) + flags.to_bytes(4, order)
        path.write_bytes(content)
    return path


def read(path):
    level = read_image(str(path)).finest
    return open_reader(level).read((0, 0, 0), level.lattice.shape)


@pytest.mark.parametrize("order", ["little", "big"])
@pytest.mark.parametrize("flags", [0, 2, 12])
def test_bytes_of_imod_are_unsigned(tmp_path, flags, order):
    voxels = read(written(tmp_path / "v.mrc", BYTES.view(np.int8), STAMP, flags, order))
    assert voxels.dtype == np.uint8
    np.testing.assert_array_equal(voxels, BYTES)


@pytest.mark.parametrize(("stamp", "flags"), [(None, 0), (STAMP, 1), (STAMP, 3), (STAMP + 1, 0), (0, 0)])
def test_other_bytes_are_signed(tmp_path, stamp, flags):
    voxels = read(written(tmp_path / "v.mrc", BYTES.view(np.int8), stamp, flags))
    assert voxels.dtype == np.int8
    np.testing.assert_array_equal(voxels, BYTES.view(np.int8))


@pytest.mark.parametrize("dtype", [np.int16, np.uint16, np.float32])
def test_other_types_are_as_stored(tmp_path, dtype):
    voxels = read(written(tmp_path / "v.mrc", BYTES.astype(dtype), STAMP))
    assert voxels.dtype == dtype
    np.testing.assert_array_equal(voxels, BYTES)
