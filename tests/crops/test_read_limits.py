"""Voxel sizes that are not in nm are refused at setup, before a sample takes gigabytes."""

import h5py
import numpy as np
import pytest
import zarr

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.options import ReadOptions
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.interpolation import linear_weights
from cellmap_lightning.inspection.report import inspect
from tests.foreign import cube, dataset, multiscale, ramp, write_group, write_image, write_pair

ARRAY = {"shape": [16] * 3, "scale": [8] * 3}


def pair(folder, size, hdf5=False):
    """Raw with a voxel size, and labels of 8 nm."""
    raw, target = write_pair(folder, cube())
    if hdf5:
        raw = f"{folder}/raw.h5/raw"
        with h5py.File(folder / "raw.h5", "w") as file:
            file["raw"] = ramp()
            file["raw"].attrs["voxel_size"] = [size] * 3
    else:
        raw = str(write_image(folder / "v.zarr" / "wrong", ramp(), scale=(size,) * 3))
    return raw, target


@pytest.mark.parametrize("hdf5", [True, False])
@pytest.mark.parametrize(
    ("size", "unit", "meant"),
    [(8e-9, "meters", "8, 8, 8"), (8e-6, "millimeters", "8, 8, 8"), (0.008, "micrometers", "8, 8, 8"),
     (0.08, "micrometers", "80, 80, 80")],
)  # fmt: skip
@pytest.mark.parametrize("pad", [True, False])
def test_raw_that_is_not_in_nm(tmp_path, size, unit, meant, hdf5, pad):
    raw, target = pair(tmp_path, size, hdf5)
    with pytest.raises(CellMapValueError) as caught:
        dataset(raw, target, 16, pad=pad)
    text = str(caught.value)
    assert text.startswith("v/crop1: the labels (z [-4, 252], ")
    assert f"lie outside the raw volume {raw} (z [" in text
    assert text.endswith(f"is probably one in {unit}: set voxel_size=[{meant}] for its entry")


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("size", [8e-9, 0.008, 0.08])
def test_the_inspection_ends_with_the_same_sentence(tmp_path, size, deep):
    raw, target = pair(tmp_path, size)
    settings = {"datasets": {"train": [{"raw": raw, "gt": target}]}, "classes": ["mito"]}
    report = inspect(settings, ARRAY, None, deep=deep)
    assert f"set voxel_size=[{size * 1e9 if size < 1e-6 else size * 1000:g}, " in report.refused
    assert "scale" in [problem.kind for problem in report.problems]


@pytest.mark.parametrize(("size", "unit"), [(8e-9, "meters"), (8e-6, "millimeters"), (0.004, "micrometers")])
def test_a_patch_of_raw_alone(tmp_path, size, unit):
    raw, _ = pair(tmp_path, size)
    with pytest.raises(CellMapValueError, match=rf"raw: voxels of 8 x 8 x 8 nm .* 1000 are allowed; .* in {unit}: set"):
        CellMapDataset(raw, None, None, {"raw": ARRAY}, None, read=ReadOptions(pad=True, cache="none"))


@pytest.mark.parametrize("size", [8e-9, 8e-6, 0.004])
def test_labels_that_are_not_in_nm(tmp_path, size):
    raw, _ = write_pair(tmp_path, cube())
    write_image(tmp_path / "v.zarr" / "wrong" / "mito", cube(), scale=(size,) * 3)
    with pytest.raises(CellMapValueError, match=r"wrong: labels: voxels of 8 x 8 x 8 nm .* is probably one in m"):
        dataset(raw, f"{tmp_path}/v.zarr/wrong/[mito]", 16, pad=True)


@pytest.mark.parametrize(("scale", "gigabytes"), [(64, 0), (128, 32), (2048, 256)])
def test_a_limit_in_bytes(tmp_path, scale, gigabytes):
    """A large volume without coarser levels; its chunks are not stored, so that the file is small."""
    path = tmp_path / "v.zarr" / "em"
    write_group(path, {"multiscales": [multiscale({"s0": ([4] * 3, None)})]})
    zarr.create_array(f"{path}/s0", shape=(4096,) * 3, chunks=(512,) * 3, dtype="u1", zarr_format=2)
    arrays = {"raw": {"shape": [64] * 3, "scale": [scale] * 3}}
    read = ReadOptions(pad=True, cache="none", missing_raw="fill")
    if not gigabytes:
        with CellMapDataset(str(path), None, None, arrays, None, read=read) as data:
            assert len(data) > 1
        return
    with pytest.raises(CellMapValueError, match=rf"need {gigabytes}(\.\d+)? GiB of the array .* 16 GiB are allowed"):
        CellMapDataset(str(path), None, None, arrays, None, read=read)


@pytest.mark.parametrize("shift", [(0, 0, 0), (124, 0, 0), (248, 248, 248)])
def test_a_small_part_of_raw_of_the_right_size_stays(tmp_path, shift):
    """A piece of raw under large labels is a warning, and so is one section."""
    raw = write_image(tmp_path / "v.zarr" / "em", ramp((2, 2, 2)), translation=shift)
    _, target = write_pair(tmp_path, cube())
    with dataset(str(raw), target, 16, pad=True) as data:
        assert not np.isnan(data.get_center(0)["z"])


@pytest.mark.parametrize("width", [3.5, 31, 33, 1e9])
def test_weights_are_bounded_by_the_array(width):
    """Windows longer than the array average all of it, without memory in proportion to their length."""
    centers = np.array([0.0, 7.25, 15.5])
    index, weight = linear_weights(centers, width, 16)
    assert index.shape[1] <= 2 * 17
    np.testing.assert_allclose(weight.sum(axis=1), 1)
    values = np.random.default_rng(0).random(16)
    expected = []
    for lower, upper in zip(np.maximum(centers - width / 2, -0.5), np.minimum(centers + width / 2, 15.5), strict=True):
        points = lower + (np.arange(20000) + 0.5) * (upper - lower) / 20000
        left = np.clip(np.floor(points), 0, 14).astype(int)
        expected.append(np.mean(values[left] + (points - left) * (values[left + 1] - values[left])))
    np.testing.assert_allclose((values[index] * weight).sum(axis=1), expected, atol=1e-4)
