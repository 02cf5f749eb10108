"""Other files among the slices of a folder: those of systems are ignored, others named with the remedy."""

import imageio.v3 as imageio
import numpy as np
import pytest
import tifffile

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader

VOXELS = np.random.default_rng(0).integers(0, 255, (4, 8, 8)).astype(np.uint8)


def slices(folder, suffix):
    path = folder / "em"
    path.mkdir()
    for number, plane in enumerate(VOXELS):
        write = imageio.imwrite if suffix == ".png" else tifffile.imwrite
        write(path / f"slice_{number:03d}{suffix}", plane)
    return path


def read(path):
    level = read_image(str(path), Overrides.parse(voxel_size=[8, 8, 8])).finest
    return open_reader(level).read((0, 0, 0), level.lattice.shape)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize(
    "stray", ["Thumbs.db", "thumbs.db", "desktop.ini", ".DS_Store", "._slice_001{}", ".hidden/", "@eaDir/", "__MACOSX/"]
)
def test_files_of_systems_are_ignored(tmp_path, suffix, stray):
    path = slices(tmp_path, suffix)
    place = path / stray.format(suffix)
    if stray.endswith("/"):
        place.mkdir()
    else:
        place.write_bytes(b"x")
    np.testing.assert_array_equal(read(path), VOXELS)


@pytest.mark.parametrize("suffix", [".tif", ".png"])
@pytest.mark.parametrize(
    "stray", ["notes.txt", "_thumb.jpg", "slice_004.tiff", "slice_001{}.txt", "slice_001{}~", "info", "old/"]
)
def test_other_files_are_named(tmp_path, suffix, stray):
    path = slices(tmp_path, suffix)
    name = stray.format(suffix).rstrip("/")
    if stray.endswith("/"):
        (path / name).mkdir()
    else:
        (path / name).write_bytes(b"x")
    with pytest.raises(MetadataError) as caught:
        read(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: holds 4 slices ({suffix}) and beside them {name}: ")
    assert "move what is no slice elsewhere" in text
    assert len(text.split(". ")) == 1


@pytest.mark.parametrize("name", ["_thumb", "preview", "slice_thumb", "slice_002_thumb", "slice_002 copy", "0_thumb"])
def test_pictures_of_the_same_suffix_are_named(tmp_path, name):
    path = slices(tmp_path, ".png")
    imageio.imwrite(path / f"{name}.png", VOXELS[0, :4, :4])
    with pytest.raises(MetadataError) as caught:
        read(path)
    assert f"{name}.png" in str(caught.value)
    assert "move what is no slice elsewhere" in str(caught.value)


def test_a_picture_of_another_size_is_named(tmp_path):
    path = slices(tmp_path, ".png")
    imageio.imwrite(path / "slice_004_thumb.png", VOXELS[0, :4, :4])
    with pytest.raises(MetadataError, match=r"slice_004_thumb.png: has 4 x 4 .* move what is no slice elsewhere"):
        read(path)


@pytest.mark.parametrize("names", [["a.png"], ["a.png", "b.png"], ["a1.png", "b.txt", "c.txt", "d.txt"]])
def test_folders_without_slices_have_no_word_of_slices(tmp_path, names):
    for name in (*names, "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MetadataError, match="holds no OME-NGFF multiscale image"):
        read(tmp_path)
