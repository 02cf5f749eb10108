"""Positions and orientations that TIFF files store are not applied, and reported once."""

import numpy as np
import pytest
import tifffile

from cellmap_lightning.errors import MetadataError
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides

VOXELS = np.random.default_rng(0).integers(1, 255, (6, 32, 48)).astype(np.uint8)


def notes(path, **overrides):
    return {note.kind: note.text for note in read_image(str(path), Overrides.parse(**overrides)).notes}


def imagej(path, origins, unit="nm", spacing=8, resolution=(1 / 4, 1 / 2)):
    lines = [f"{axis}origin={origin}" for axis, origin in zip("xyz", origins, strict=True)]
    text = "\n".join(["ImageJ=1.53t", "images=6", "slices=6", f"unit={unit}", f"spacing={spacing}", *lines, ""])
    tifffile.imwrite(path, VOXELS, description=text, resolution=resolution, metadata=None, photometric="minisblack")
    return path


def ome(path, positions, **units):
    """An OME-TIFF whose planes have positions x, y and z."""
    plane = {f"Position{axis}": [p] * len(VOXELS) for axis, p in zip("XYZ", positions, strict=True) if p is not None}
    plane |= {f"Position{axis}Unit": [unit] * len(VOXELS) for axis, unit in units.items()}
    size = {f"PhysicalSize{axis}": 0.008 for axis in "XYZ"}
    tifffile.imwrite(path, VOXELS, ome=True, photometric="minisblack", metadata={"axes": "ZYX", "Plane": plane} | size)
    return path


@pytest.mark.parametrize(
    ("origins", "position"), [((-16, -8, -4), "32, 16, 64"), ((0, 0, 2), "-16, 0, 0"), ((1.5, 0, 0), "0, 0, -6")]
)
def test_an_origin_of_imagej(tmp_path, origins, position):
    """It is the pixel at 0. Voxels have 8, 2 and 4 nm."""
    path = imagej(tmp_path / "v.tif", origins)
    text = notes(path)["position"]
    if "32" in position:
        assert "stores the position [32, 16, 64] nm" in text
    assert f"[{position}] nm (z, y, x), which is not applied" in text
    assert f"set translation=[{position}] for its entry" in text
    for translation in ([0, 0, 0], [float(part) for part in position.split(",")]):
        assert not notes(path, translation=translation)


@pytest.mark.parametrize("origins", [(0, 0, 0), (-0.0, 0, 0), ("none", 0, 0)])
def test_no_origin_of_imagej(tmp_path, origins):
    assert not notes(imagej(tmp_path / "v.tif", origins))


def test_an_origin_of_imagej_without_a_voxel_size(tmp_path):
    text = notes(imagej(tmp_path / "v.tif", (-16, -8, -4), unit="pixel"), voxel_size=[8, 2, 4])["position"]
    assert "the position [4 pixels, 8 pixels, 16 pixels]" in text
    assert "set translation=[z, y, x] in nm" in text


@pytest.mark.parametrize(
    ("positions", "units", "text"),
    [
        ((160, 80, 40), {"X": "nm", "Y": "nm", "Z": "nm"}, "the position [40, 80, 160] nm"),
        ((0.16, 0, None), {"X": "µm", "Y": "µm"}, "the position [0, 0, 160] nm"),
        ((160, 80, 40), {}, "the position [40 reference frame, 80 reference frame, 160 reference frame]"),
    ],
)
def test_a_position_of_ome(tmp_path, positions, units, text):
    path = ome(tmp_path / "v.ome.tif", positions, **units)
    assert text in notes(path)["position"]
    assert "translation=[" in notes(path)["position"]
    assert not notes(path, translation=[0, 0, 0])


@pytest.mark.parametrize("positions", [(0, 0, 0), (None, None, 0), (None, None, None)])
def test_no_position_of_ome(tmp_path, positions):
    assert not notes(ome(tmp_path / "v.ome.tif", positions))


@pytest.mark.parametrize(("orientation", "name"), [(2, "top-right"), (4, "bottom-left"), (6, "right-top"), (1, None)])
@pytest.mark.parametrize("is_folder", [False, True])
def test_an_orientation(tmp_path, orientation, name, is_folder):
    options = {"extratags": [(274, 3, 1, orientation, True)], "photometric": "minisblack", "metadata": None}
    if is_folder:
        for number, plane in enumerate(VOXELS):
            tifffile.imwrite(tmp_path / f"s{number}.tif", plane, **options)
    else:
        tifffile.imwrite(tmp_path / "v.tif", VOXELS, **options)
    found = notes(tmp_path if is_folder else tmp_path / "v.tif", voxel_size=[8, 8, 8])
    assert [*found] == ([] if name is None else ["orientation"])
    assert name is None or f"Orientation {orientation} ({name}), which is not applied" in found["orientation"]


@pytest.mark.parametrize("number", [0, 3, 5])
def test_slices_of_different_orientations(tmp_path, number):
    for n, plane in enumerate(VOXELS):
        tags = [(274, 3, 1, 4, True)] if n == number else []
        tifffile.imwrite(tmp_path / f"s{n}.tif", plane, extratags=tags, photometric="minisblack")
    with pytest.raises(MetadataError, match=r"has 32 x 48 pixels of uint8 with Orientation 4"):
        notes(tmp_path, voxel_size=[8, 8, 8])
