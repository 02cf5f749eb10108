"""TIFF pages that are no gray values, or whose 0 is white, are an error or reported."""

import numpy as np
import pytest
import tifffile

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.readers import open_reader

VOXELS = np.random.default_rng(0).integers(1, 255, (6, 32, 48)).astype(np.uint8)
SIZE = Overrides(voxel_size=(8, 8, 8))


def stack(path, kinds, **options):
    with tifffile.TiffWriter(path) as writer:
        for plane, kind in zip(VOXELS, kinds, strict=True):
            writer.write(plane, photometric=kind, contiguous=False, metadata=None, **options)
    return path


def slices(path, kinds, **options):
    path.mkdir()
    for number, (plane, kind) in enumerate(zip(VOXELS, kinds, strict=True)):
        tifffile.imwrite(path / f"s{number}.tif", plane, photometric=kind, **options)
    return path


def with_kind(number, kind="miniswhite", others="minisblack"):
    return [kind if n == number else others for n in range(len(VOXELS))]


@pytest.mark.parametrize("number", [0, 3, 5])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}, {"tile": (16, 16)}])
def test_pages_that_differ(tmp_path, number, options):
    path = stack(tmp_path / "v.tif", with_kind(number), **options)
    with pytest.raises(MetadataError, match=r"v.tif: page \d has PhotometricInterpretation \d, and page 0 has"):
        read_image(str(path), SIZE)


@pytest.mark.parametrize("other", [VOXELS[0, :16], VOXELS[0].astype(np.uint16), VOXELS[0, :, :16]])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_page_of_another_size_between_others(tmp_path, other, number):
    """It is not left out, which would shift all pages after it, and no last page is but a smaller one."""
    with tifffile.TiffWriter(tmp_path / "v.tif") as writer:
        for plane in (*VOXELS[:number], other, *VOXELS[number:]):
            writer.write(plane, contiguous=False, metadata=None)
    with pytest.raises(MetadataError, match=f"v.tif: page {number} has shape"):
        read_image(str(tmp_path / "v.tif"), SIZE)
    with tifffile.TiffWriter(tmp_path / "w.tif") as writer:
        for plane in (*VOXELS, other):
            writer.write(plane, contiguous=False, metadata=None)
    with pytest.raises(
        MetadataError, match=r"w.tif: page 6 has shape .* and page 0 has shape \[32, 48\] and type uint8"
    ):
        read_image(str(tmp_path / "w.tif"), SIZE)


@pytest.mark.parametrize("number", [0, 3, 5])
def test_slices_that_differ(tmp_path, number):
    path = slices(tmp_path / "v", with_kind(number))
    with pytest.raises(MetadataError, match=r"s\d.tif: has .* in which 0 is white|s0.tif has .* in which 0 is white"):
        read_image(str(path), SIZE)


@pytest.mark.parametrize("write", [stack, slices])
@pytest.mark.parametrize("options", [{}, {"compression": "zlib"}])
def test_white_everywhere_is_a_warning(tmp_path, write, options):
    image = read_image(str(write(tmp_path / "v.tif", ["miniswhite"] * 6, **options)), SIZE)
    assert [note.kind for note in image.notes] == ["white"]
    assert "invert: true" in image.notes[0].text
    np.testing.assert_array_equal(open_reader(image.finest).read((0, 0, 0), VOXELS.shape), VOXELS)
    assert not read_image(str(write(tmp_path / "b.tif", ["minisblack"] * 6, **options)), SIZE).notes


@pytest.mark.parametrize("number", [None, 0, 4])
@pytest.mark.parametrize("write", [stack, slices])
def test_palettes(tmp_path, write, number):
    colours = np.zeros((3, 256), np.uint16)
    kinds = ["palette"] * 6 if number is None else with_kind(number, "palette")
    path = tmp_path / "v.tif"
    if write is stack:
        with tifffile.TiffWriter(path) as writer:
            for plane, kind in zip(VOXELS, kinds, strict=True):
                more = {"colormap": colours} if kind == "palette" else {}
                writer.write(plane, photometric=kind, contiguous=False, metadata=None, **more)
    else:
        path.mkdir()
        for n, (plane, kind) in enumerate(zip(VOXELS, kinds, strict=True)):
            more = {"colormap": colours} if kind == "palette" else {}
            tifffile.imwrite(path / f"s{n}.tif", plane, photometric=kind, **more)
    with pytest.raises(MetadataError, match="palette"):
        read_image(str(path), SIZE)


@pytest.mark.parametrize("depth", [16, 32])
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_tiles_of_several_planes(tmp_path, depth, compression):
    voxels = np.zeros((32, 32, 32), np.uint8)
    tifffile.imwrite(tmp_path / "v.tif", voxels, volumetric=True, tile=(depth, 16, 16), compression=compression)
    with pytest.raises(MetadataError, match=f"v.tif: has tiles of {depth} planes"):
        read_image(str(tmp_path / "v.tif"), SIZE)
