"""Damaged slices of a folder: the error names the file, at setup where its size shows it, else when it is read."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from cellmap_lightning.errors import ChunkError, MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader

VOXELS = np.random.default_rng(0).integers(1, 255, (8, 64, 64)).astype(np.uint8)
SIZE = Overrides(voxel_size=(8, 8, 8))


def slices(folder, suffix, **options):
    for number, plane in enumerate(VOXELS):
        if suffix == ".png":
            Image.fromarray(plane).save(folder / f"s{number}.png")
        else:
            tifffile.imwrite(folder / f"s{number}.tif", plane, photometric="minisblack", **options)
    return folder


def read(folder):
    level = read_image(str(folder), SIZE).finest
    return open_reader(level).read((0, 0, 0), level.lattice.shape)


KINDS = [(".png", {}), (".tif", {}), (".tif", {"compression": "zlib"}), (".tif", {"tile": (16, 16)})]


@pytest.mark.parametrize("number", [0, 3, 7])
@pytest.mark.parametrize("left", [0.9, 0.5, 0.1])
@pytest.mark.parametrize(("suffix", "options"), KINDS)
def test_a_slice_that_is_cut_off_is_met_at_setup(tmp_path, number, left, suffix, options):
    file = slices(tmp_path, suffix, **options) / f"s{number}{suffix}"
    np.testing.assert_array_equal(read(tmp_path), VOXELS)
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * left)])
    with pytest.raises(MetadataError, match="copy") as e:
        read_image(str(tmp_path), SIZE)
    assert str(file) in str(e.value)


@pytest.mark.parametrize("number", [0, 3, 7])
@pytest.mark.parametrize(("suffix", "options"), [(".png", {}), (".tif", {"compression": "zlib"})])
def test_a_slice_of_garbled_bytes_is_named_by_the_read(tmp_path, number, suffix, options):
    file = slices(tmp_path, suffix, **options) / f"s{number}{suffix}"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = b"\0" * 400
    file.write_bytes(content)
    with pytest.raises(ChunkError, match=r"voxels z\[0:8\]") as e:
        read(tmp_path)
    assert f"(in {file})" in str(e.value)


@pytest.mark.parametrize("number", [0, 3, 7])
@pytest.mark.parametrize(("suffix", "options"), KINDS)
def test_a_slice_that_is_cut_off_after_setup(tmp_path, number, suffix, options):
    file = slices(tmp_path, suffix, **options) / f"s{number}{suffix}"
    level = read_image(str(tmp_path), SIZE).finest
    content = file.read_bytes()
    file.write_bytes(content[: int(len(content) * 0.6)])
    with pytest.raises((ChunkError, MetadataError), match=f"s{number}{suffix}"):
        open_reader(level).read((0, 0, 0), level.lattice.shape)


@pytest.mark.parametrize("more", [b"\0", b"more bytes than a chunk has"])
def test_bytes_after_the_last_chunk_of_a_png_file_are_no_damage(tmp_path, more):
    file = slices(tmp_path, ".png") / "s3.png"
    file.write_bytes(file.read_bytes() + more)
    np.testing.assert_array_equal(read(tmp_path), VOXELS)
