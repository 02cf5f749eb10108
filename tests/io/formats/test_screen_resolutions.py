"""TIFF files whose resolution is that of a screen or a printer, or has no unit."""

import logging

import numpy as np
import pytest
import tifffile

from cellmap_lightning.conversion.convert import convert
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.errors import MetadataError
from cellmap_lightning.inspection.report import inspect
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import read_multiscale

VOXELS = np.random.default_rng(0).integers(0, 255, (16, 32, 32)).astype(np.uint8)
IMAGEJ = {"imagej": True}


def write(folder, resolution, unit=None, spacing=None, **options):
    metadata = {"axes": "ZYX", **({"unit": unit} if unit else {}), **({"spacing": spacing} if spacing else {})}
    path = folder / "stack.tif"
    tifffile.imwrite(path, VOXELS, resolution=resolution, metadata=metadata, **options)
    return path


def ome(folder, unit):
    sizes = {f"PhysicalSize{axis}": 1 / 72 for axis in "XYZ"} | {f"PhysicalSize{axis}Unit": unit for axis in "XYZ"}
    path = folder / "stack.ome.tif"
    tifffile.imwrite(path, VOXELS, metadata={"axes": "ZYX", **sizes})
    return path


def options(path, **values):
    output = str(path.parent / f"out{len(values)}.zarr")
    return ConversionOptions(input=str(path), output=output, chunks=16, **values)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda folder: write(folder, (72, 72), "inch", 1 / 72, **IMAGEJ), "72 dots per inch"),
        (lambda folder: write(folder, (96, 96), "inches", 1.0, **IMAGEJ), "96 dots per inch"),
        (lambda folder: write(folder, (118.11, 118.11), "cm", 1.0, **IMAGEJ), "300 dots per inch"),
        (lambda folder: write(folder, (11.811, 11.811), "mm", 1.0, **IMAGEJ), "300 dots per inch"),
        (lambda folder: ome(folder, "inch"), "72 dots per inch"),
        (lambda folder: write(folder, (1, 1), "micron", 1.0, **IMAGEJ), "its voxel size is 1 x 1 x 1 (1000 x"),
        (lambda folder: write(folder, (20, 20), "mm", 0.05, **IMAGEJ), "50000 x 50000 x 50000 nm is implausible"),
    ],
    ids=["72-inch", "96-inch", "300-cm", "300-mm", "ome", "one-micron", "large"],
)
def test_a_resolution_of_no_microscope_is_reported(tmp_path, caplog, make, text):
    path = make(tmp_path)
    with caplog.at_level(logging.WARNING):
        convert(options(path))
    (record,) = caplog.records
    assert text in record.getMessage()
    assert "voxel_size=[z, y, x] in nm" in record.getMessage()
    assert "entr" not in record.getMessage()  # the command has none
    report = inspect({"datasets": {"predict": [{"raw": str(path)}]}}, {}, None)
    assert any(text in problem.text and "for its entries" in problem.text for problem in report.problems)
    # With the voxel size that was meant, nothing but its replacement is left to report.
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        out = convert(options(path, voxel_size=[8, 4, 4]))
    assert all("the file says" in record.getMessage() for record in caplog.records)
    assert len(caplog.records) <= 1
    assert read_multiscale(out).finest.scale == (8, 4, 4)


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: write(folder, (72, 72), resolutionunit="INCH"),
        lambda folder: write(folder, (118.11, 118.11), resolutionunit="CENTIMETER"),
        lambda folder: write(folder, (1, 1), resolutionunit="NONE"),
        lambda folder: write(folder, (1, 1), None, 1.0, **IMAGEJ),
        lambda folder: write(folder, (1, 1), "pixel", 1.0, **IMAGEJ),
        lambda folder: write(folder, (72, 72), "inch", None, **IMAGEJ),  # no distance of the sections
        lambda folder: write(folder, (72, 72), resolutionunit="INCH", bigtiff=True),
        lambda folder: ome(folder, "pixel"),
    ],
    ids=["inch", "cm", "no-unit", "imagej-no-unit", "imagej-pixel", "no-spacing", "bigtiff", "ome-pixel"],
)
def test_a_resolution_without_a_voxel_size_is_refused(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(MetadataError) as info:
        convert(options(path))
    assert str(info.value).endswith("no voxel size is stored in this TIFF volume; set voxel_size=[z, y, x] in nm")
    with pytest.raises(MetadataError, match=r"in nm for its entry \(for cellmap-predict: metadata.voxel_size\)"):
        read_image(path)
    assert read_multiscale(convert(options(path, voxel_size=[8, 4, 4]))).finest.scale == (8, 4, 4)
