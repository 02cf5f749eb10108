"""Float raw with NaN, infinities and values beyond float32."""

import numpy as np
import pytest
import torch

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.crops import finite_raw
from cellmap_lightning.crops.finite_raw import unusable
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.errors import ChunkError
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale

SCALE = [8.0, 8.0, 8.0]
LARGEST = float(np.finfo(np.float32).max)


def volume(folder, values, crops=1, fill=None):
    """Raw of 24³ voxels in chunks of 8³, and crops of 16³ in its middle."""
    write_group(folder)
    write_multiscale(folder / "raw", values, scale=SCALE, translation=(4, 4, 4), storage=ArrayOptions(chunks=(8,) * 3))
    if fill is not None:
        file = folder / "raw" / "s0" / ".zarray"
        file.write_text(file.read_text().replace('"fill_value": 0.0', f'"fill_value": "{fill}"'))
        assert fill in file.read_text()
    for number in range(crops):
        write_multiscale(
            folder / f"crop{number}" / "mito", np.ones((16,) * 3, np.uint8), scale=SCALE, translation=[36.0] * 3
        )
    return folder


def batches(folder, crops=1, cache="none", **options):
    """The batches of an epoch, read in this process."""
    spec = {"shape": [8] * 3, "scale": SCALE}
    rows = [{"raw": str(folder / "raw"), "gt": f"{folder}/crop{n}/[mito]"} for n in range(crops)]
    with CellMapDataModule(
        datasets={"train": rows}, classes=["mito"], input_arrays={"raw": spec}, target_arrays={"labels": spec},
        batch_size=4, batches_per_epoch=3, cache=cache, raw_value_transforms=None, **options,
    ) as data:  # fmt: skip
        data.setup("fit")
        return list(data.train_dataloader())


def values_with(value, dtype=np.float32, where=np.s_[8:16, :, :]):
    values = np.random.default_rng(0).uniform(1, 2, (24,) * 3).astype(dtype)
    values[where] = value
    return values


def nan_lines(caplog):
    return [r.getMessage() for r in caplog.records if "the value is NaN" in r.getMessage()]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_nan_is_reported_once_per_volume(tmp_path, caplog, dtype, cache):
    folder = volume(tmp_path / "v.zarr", values_with(np.nan, dtype), crops=2)
    read = batches(folder, crops=2, cache=cache)
    assert any((batch["raw"] == 0).any() for batch in read)
    (line,) = nan_lines(caplog)
    assert f"{folder}/raw/s0: voxels z[" in line
    assert f"of chunk {folder}/raw/s0/1/" in line
    assert "NaN of raw reads as 0 in batches" in line


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize(
    ("value", "dtype", "text"),
    [
        (np.inf, "float32", "the value inf is infinite; store a finite value"),
        (-np.inf, "float16", "the value -inf is infinite"),
        (1e300, "float64", r"the value 1e\+300 is too large for float32"),
        (-3.5e38, ">f8", r"the value -3.5e\+38 is too large for float32"),
    ],
)
def test_infinite_and_too_large_values_are_errors(tmp_path, value, dtype, text, cache):
    folder = volume(tmp_path / "v.zarr", values_with(value, dtype))
    with pytest.raises(ChunkError, match=rf"raw/s0: voxels z\[\d+:\d+\].* of chunk .*/raw/s0/1/\d/\d: {text}"):
        batches(folder, cache=cache)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "uint8"])
def test_finite_values_are_read_as_they_are(tmp_path, caplog, dtype):
    largest = {"float16": 65504, "uint8": 255}.get(dtype, LARGEST)
    read = batches(volume(tmp_path / "v.zarr", values_with(largest, dtype)), normalize={"range": [0, 1]})
    assert max(float(batch["raw"].max()) for batch in read) == pytest.approx(largest)
    assert not nan_lines(caplog)


@pytest.mark.parametrize("policy", ["fill", "mask"])
def test_a_fill_value_of_nan_is_no_stored_nan(tmp_path, caplog, policy):
    folder = volume(tmp_path / "v.zarr", values_with(1), fill="NaN")
    for file in (folder / "raw" / "s0" / "1").glob("*/*"):
        file.unlink()
    read = batches(folder, missing_raw=policy)
    assert any((batch["raw"] == 0).any() for batch in read)
    assert not nan_lines(caplog)
    assert "are not stored" in caplog.text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, np.nan, np.nan], ((0, 0, 1), 2)),
        ([np.nan, 1, -np.inf], ((0, 0, 2), 0)),  # the infinity decides
        ([np.nan, 1e39, np.inf], ((0, 0, 1), 0)),
        ([0, LARGEST, -LARGEST], None),
    ],
)
def test_the_first_unusable_voxel(values, expected):
    found = unusable(np.array([[values]], np.float64))
    assert (found and (found.voxel, found.count)) == expected


@pytest.fixture
def later_run(tmp_path, monkeypatch):
    """Return a function that reads batches as a later run does: with the files of the cache, and nothing reported."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))

    def read(folder, caplog, decoded, **options):
        monkeypatch.setattr(finite_raw, "_reported", {})
        caplog.clear()
        if not decoded:  # nothing may be decoded again
            monkeypatch.setattr(StoredImage, "_decode", lambda *_: pytest.fail("decoded although it is cached"))
        return batches(folder, cache="disk", **options)

    return read


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_nan_in_voxels_that_an_earlier_run_cached_is_reported(tmp_path, caplog, later_run, dtype):
    folder = volume(tmp_path / "v.zarr", values_with(np.nan, dtype), crops=2)
    first = later_run(folder, caplog, True, crops=2)
    assert len(nan_lines(caplog)) == 1
    second = later_run(folder, caplog, False, crops=2)
    (line,) = nan_lines(caplog)
    assert f"of chunk {folder}/raw/s0/1/" in line
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one["raw"], other["raw"])


@pytest.mark.parametrize(("value", "dtype"), [(1.5, "float32"), (LARGEST, "float64"), (7, "uint8")])
def test_finite_values_of_an_earlier_run_are_not_reported(tmp_path, caplog, later_run, value, dtype):
    folder = volume(tmp_path / "v.zarr", values_with(value, dtype))
    for decoded in (True, False):
        later_run(folder, caplog, decoded)
        assert not nan_lines(caplog)


@pytest.mark.parametrize("policy", ["fill", "mask"])
def test_a_cached_fill_value_of_nan_is_no_stored_nan(tmp_path, caplog, later_run, policy):
    folder = volume(tmp_path / "v.zarr", values_with(1), fill="NaN")
    for file in (folder / "raw" / "s0" / "1").glob("*/*"):
        file.unlink()
    for decoded in (True, False):
        later_run(folder, caplog, decoded, missing_raw=policy)
        assert not nan_lines(caplog)
