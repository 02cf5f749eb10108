"""Voxel sizes that are set and probably not in nm are warned of; calibrations of ImageJ in any unit are read."""

import logging

import numpy as np
import pytest
import tifffile
import zarr

from cellmap_lightning.conversion.convert import convert
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.errors import MetadataError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Overrides, read_multiscale
from cellmap_lightning.io.writer import write_multiscale
from tests.io.formats import writers

VOXELS = np.random.default_rng(0).integers(0, 255, (8, 16, 16)).astype(np.uint8)


def plain_zarr(folder, voxels):
    zarr.create_array(folder / "plain.zarr", data=voxels, chunks=(8, 8, 8))
    return folder / "plain.zarr"


def ngff(folder, voxels):
    write_multiscale(folder / "image.zarr", voxels, scale=(8, 8, 8), translation=(0, 0, 0))
    return folder / "image.zarr"


def doubts(caplog):
    """Warnings but that of a stored size that is replaced."""
    return [record.getMessage() for record in caplog.records if "the file says" not in record.getMessage()]


@pytest.mark.parametrize("write", [writers.tiff, writers.npy, plain_zarr, ngff])
@pytest.mark.parametrize(
    ("size", "text"),
    [
        ([0.05, 0.008, 0.008], "is implausible; if it is in micrometers, set voxel_size=[50,8,8]"),
        ([0.1, 0.06, 0.06], "if it is in micrometers, set voxel_size=[100,60,60]"),
        ([0.05, 8, 8], "differs 160-fold between axes: is each in nm?"),
        ([50000, 8000, 8000], "is implausible: lengths are nm"),
        ([5000, 8, 8], "differs 625-fold between axes"),
    ],
)
def test_a_size_that_is_not_in_nm_is_warned_of(tmp_path, caplog, write, size, text):
    path = write(tmp_path, VOXELS)
    with caplog.at_level(logging.WARNING):
        out = convert(
            ConversionOptions(input=str(path), output=str(tmp_path / "out.zarr"), voxel_size=size, pyramid="none")
        )
    (message,) = doubts(caplog)
    assert f"voxel_size=[{','.join(f'{s:g}' for s in size)}] (nm, z, y, x) " in message
    assert text in message
    assert "entr" not in message  # the command has none
    assert read_multiscale(out).finest.scale == tuple(size)  # nothing is changed
    report = inspect({"datasets": {"predict": [{"raw": str(path), "voxel_size": size}]}}, {}, None)
    (problem,) = [problem for problem in report.problems if problem.kind == "scale"]
    assert text in problem.text
    assert "for its entries" in problem.text


@pytest.mark.parametrize("write", [writers.tiff, plain_zarr, ngff])
@pytest.mark.parametrize("size", [[50, 8, 8], [1, 1, 1], [0.135, 0.135, 0.135], [0.3, 0.12, 0.12], [2e4, 2e4, 2e4]])
def test_sizes_of_microscopes_are_not(tmp_path, caplog, write, size):
    path = write(tmp_path, VOXELS)
    with caplog.at_level(logging.WARNING):
        convert(ConversionOptions(input=str(path), output=str(tmp_path / "out.zarr"), voxel_size=size, pyramid="none"))
    assert not doubts(caplog)


def imagej(folder, unit, per_unit, spacing, **units):
    """A stack with a calibration: pixels per unit along x and y, and the distance of sections."""
    path = folder / "stack.tif"
    metadata = {"axes": "ZYX", "unit": unit, "spacing": spacing, **units}
    tifffile.imwrite(path, VOXELS, imagej=True, resolution=(per_unit[1], per_unit[0]), metadata=metadata)
    return path


@pytest.mark.parametrize(
    ("unit", "nm"),
    [
        ("nm", 1), ("um", 1e3), ("micron", 1e3), ("microns", 1e3), ("micrometer", 1e3), ("\\u00B5m", 1e3),
        ("mm", 1e6), ("cm", 1e7), ("inch", 2.54e7), ("inches", 2.54e7),
    ],
)  # fmt: skip
def test_calibrations_of_imagej_are_read_in_their_unit(tmp_path, unit, nm):
    path = imagej(tmp_path, unit, (nm / 8, nm / 4), 50 / nm)
    np.testing.assert_allclose(read_image(path).finest.scale, (50, 8, 4), rtol=1e-5)
    out = convert(ConversionOptions(input=str(path), output=str(tmp_path / "out.zarr"), pyramid="none"))
    np.testing.assert_allclose(read_multiscale(out).finest.scale, (50, 8, 4), rtol=1e-5)


@pytest.mark.parametrize(
    ("units", "scale"),
    [
        ({"unit": "micron", "zunit": "nm"}, (50, 8000, 4000)),
        ({"unit": "nm", "yunit": "micron"}, (50, 8000, 4)),
        ({"unit": "nm", "yunit": "um", "zunit": "mm"}, (50e6, 8000, 4)),
    ],
)
def test_axes_with_units_of_their_own(tmp_path, units, scale):
    path = imagej(tmp_path, per_unit=(1 / 8, 1 / 4), spacing=50, **units)
    np.testing.assert_allclose(read_image(path).finest.scale, scale, rtol=1e-5)


@pytest.mark.parametrize(("unit", "nm"), [("nm", 1), ("micron", 1e3), ("mm", 1e6)])
def test_known_axes_are_filled_in_where_the_sections_have_no_distance(tmp_path, unit, nm):
    path = tmp_path / "stack.tif"
    metadata = {"axes": "ZYX", "unit": unit}
    tifffile.imwrite(path, VOXELS, imagej=True, resolution=(nm / 4, nm / 8), metadata=metadata)
    with pytest.raises(MetadataError) as info:
        read_image(path)
    text = "no voxel size along z is stored in this TIFF volume (y 8, x 4 nm are); set voxel_size=[Z,8,4]"
    assert text in str(info.value)


@pytest.mark.parametrize(
    ("unit", "axes", "reason"),
    [
        ("nm", "TYX", f"; its {len(VOXELS)} planes are stored as frames (time), as Fiji"),
        ("nm", "CYX", f"; its {len(VOXELS)} planes are stored as channels, as Fiji"),
        ("micron", "TYX", f"; its {len(VOXELS)} planes are stored as frames (time), as Fiji"),
    ],
)
def test_planes_that_are_no_sections_have_a_reason(tmp_path, unit, axes, reason):
    path = tmp_path / "stack.tif"
    metadata = {"axes": axes, "unit": unit, "spacing": 50}
    tifffile.imwrite(path, VOXELS, imagej=True, resolution=(1 / 4, 1 / 8), metadata=metadata)
    with pytest.raises(MetadataError) as info:
        read_image(path)
    assert reason in str(info.value)
    read_image(path, Overrides.parse(axes="zyx", voxel_size=[50, 8, 4]))


@pytest.mark.parametrize("units", [{"zunit": "pixel"}, {"yunit": "sec"}, {"yunit": "", "zunit": ""}])
def test_an_axis_without_a_length_is_refused(tmp_path, units):
    path = imagej(tmp_path, "nm", (1 / 8, 1 / 4), 50, **units)
    with pytest.raises(MetadataError, match="no voxel size is stored in this TIFF volume"):
        read_image(path)
