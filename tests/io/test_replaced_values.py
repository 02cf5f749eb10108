"""Voxel sizes and translations of files that settings replace: reported, above all in the order x, y, z."""

import logging

import numpy as np
import pytest
import tifffile
import zarr

from cellmap_lightning import CellMapDataset
from cellmap_lightning.conversion.convert import convert
from cellmap_lightning.conversion.options import ConversionOptions
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.io.images import replaced_values
from cellmap_lightning.io.ngff import Overrides
from cellmap_lightning.io.writer import write_multiscale
from tests.io.formats import writers

RAW = np.random.default_rng(0).integers(1, 255, (16, 24, 32)).astype(np.uint8)
ORDER = " and is probably in the order x, y, z; the order is z, y, x"


def ngff(folder):
    return write_multiscale(folder / "a.zarr" / "em", RAW, scale=(50, 8, 4), translation=(100, 0, 20)) or (
        folder / "a.zarr" / "em"
    )


def plain(folder):
    array = zarr.create_array(store=folder / "b.zarr", data=RAW, zarr_format=2)
    array.attrs.update(voxel_size=[50, 8, 4], offset=[75, -4, 18], units=["nm"] * 3)  # the corner of voxel 0
    return folder / "b.zarr"


def imagej(folder):
    tifffile.imwrite(
        folder / "c.tif", RAW, imagej=True, resolution=(1 / 4, 1 / 8),
        metadata={"axes": "ZYX", "unit": "nm", "spacing": 50},
    )  # fmt: skip
    return folder / "c.tif"


@pytest.mark.parametrize("write", [ngff, plain, imagej])
@pytest.mark.parametrize(
    ("size", "end"),
    [([4, 8, 50], ORDER), ([50, 4, 4], ""), ([8, 8, 8], ""), ([50, 8, 4], None), ([50.01, 8, 4], None)],
)
def test_a_voxel_size(tmp_path, write, size, end):
    path = write(tmp_path)
    listed = f"[{', '.join(f'{n:g}' for n in size)}]"
    texts = [] if end is None else [f"the file says voxel_size=[50, 8, 4] nm; voxel_size={listed} replaces it{end}"]
    assert replaced_values(path, Overrides.parse(voxel_size=size)) == texts
    assert replaced_values(path, Overrides.parse(voxel_size=size), reversed_only=True) == (texts if end else [])


@pytest.mark.parametrize("write", [ngff, plain])
def test_a_translation(tmp_path, write):
    path, start = write(tmp_path), "the file says translation=[100, 0, 20] nm; translation="
    for value, end in (([20, 0, 100], ORDER), ([0, 0, 0], "")):
        assert replaced_values(path, Overrides.parse(translation=value)) == [f"{start}{value} replaces it{end}"]
    assert replaced_values(path, Overrides.parse(translation=[100, 0, 20])) == []


@pytest.mark.parametrize("write", [writers.tiff, writers.npy])
def test_a_file_without_a_voxel_size_says_nothing(tmp_path, write):
    path = write(tmp_path, RAW)
    assert replaced_values(path, Overrides.parse(voxel_size=[50, 8, 8], translation=[1, 2, 3])) == []


@pytest.mark.parametrize("write", [ngff, plain, imagej])
@pytest.mark.parametrize(("size", "end"), [([4, 8, 50], ORDER), ([50, 8, 8], ""), ([50, 8, 4], None)])
def test_a_conversion_reports_it(tmp_path, caplog, write, size, end):
    path = write(tmp_path)
    with caplog.at_level(logging.WARNING):
        convert(ConversionOptions(input=str(path), output=str(tmp_path / "out.zarr"), voxel_size=size))
    expected = f"{path}: the file says voxel_size=[50, 8, 4] nm; voxel_size={size} replaces it{end}"
    assert [text for text in caplog.messages if "the file says" in text] == ([] if end is None else [expected])


@pytest.mark.parametrize("write", [ngff, plain, imagej])
@pytest.mark.parametrize(("size", "reported"), [([4, 8, 50], True), ([50, 8, 8], False), ([50, 8, 4], False)])
def test_a_crop_reports_the_reversed_order(tmp_path, caplog, write, size, reported):
    path, patch = write(tmp_path), {"shape": [4, 4, 4], "scale": size}
    with caplog.at_level(logging.WARNING):
        CellMapDataset(str(path), None, None, {"raw": patch}, read=ReadOptions(voxel_size=size)).close()
    assert any(f"voxel_size={size} replaces it{ORDER}" in text for text in caplog.messages) is reported
