"""Partial copies of raw with chunks only around crops, and sparsely stored volumes for prediction."""

import logging
import pickle
import shutil

import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning.cache.chunk_cache import ChunkCache
from cellmap_lightning.compat.patch_writer import CellMapDatasetWriter
from cellmap_lightning.crops.image import StoredImage
from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import ChunkError
from cellmap_lightning.geometry.lattice import LATTICE_TOLERANCE
from cellmap_lightning.geometry.resample import evaluate
from cellmap_lightning.geometry.sample_map import sample_map
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from tests.make import make_dataset

RAW = np.random.default_rng(0).integers(1, 255, (128, 128, 128)).astype(np.uint8)
CHUNK = 16
SCALE = [8.0, 8.0, 8.0]
#: First voxel of the crop of 32³, on chunks or between them.
CROPS = {"on chunks": (48, 48, 48), "between chunks": (40, 56, 44), "at the border": (0, 0, 96)}


def origin(start):
    return [8.0 * a + 4 for a in start]


def fetched(folder, start=(48, 48, 48), size=32, dropped=None):
    """A volume as `csc fetch-data` leaves it: the chunks of raw that touch the crop, and no others."""
    write_group(folder)
    write_multiscale(folder / "raw", RAW, scale=SCALE, translation=(4, 4, 4), storage=ArrayOptions(chunks=(CHUNK,) * 3))
    for file in (folder / "raw" / "s0").glob("*/*/*"):
        index = [int(part) for part in file.parts[-3:]]
        touches = all(i * CHUNK < a + size and (i + 1) * CHUNK > a for i, a in zip(index, start, strict=True))
        if dropped(index, touches) if dropped else not touches:
            file.unlink()
    labels = np.ones((size,) * 3, np.uint8)
    labels[0, 0, 0] = 0  # a class that fills its crop is warned of
    write_multiscale(folder / "crop1" / "mito", labels, scale=SCALE, translation=origin(start))
    return folder


def opened(folder, shape=48, **kwargs):
    spec = {"shape": [shape] * 3, "scale": SCALE}
    return make_dataset(
        folder / "raw",
        f"{folder}/crop1/[mito]",
        ["mito"],
        {"raw": spec},
        {"labels": spec},
        read=ReadOptions(pad=True),
        intensity=IntensityOptions(raw_value_transforms=None),
        **kwargs,
    )


@pytest.mark.parametrize("place", CROPS)
@pytest.mark.parametrize("cache", ["none", "memory"])
def test_a_partial_copy_is_masked(tmp_path, caplog, place, cache):
    start = CROPS[place]
    root = fetched(tmp_path / "v.zarr", start)
    with opened(root, cache=cache) as data:
        assert data.crop.raw.missing == "mask"
        (line,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
        text = line.getMessage()
        assert f"{root}/raw/s0 is a partial copy" in text
        assert int(text.partition("csc fetch-data --raw-padding ")[2].split()[0]) >= 16
        caplog.clear()
        sample = data[0]
        assert not caplog.records, "it was reported"
        low = [int(c / 8) - 24 for c in data.get_center(0).values()]
    box = [slice(max(0, a), a + 48) for a in low]
    stored = zarr.open_array(str(root / "raw" / "s0"), mode="r")[tuple(box)]
    inside = tuple(slice(s.start - a, s.start - a + n) for s, a, n in zip(box, low, stored.shape, strict=True))
    np.testing.assert_array_equal(sample["raw"].squeeze()[inside], stored)
    # Targets are known exactly inside the crop, which was fetched completely.
    known = ~sample["labels"].squeeze().isnan()
    crop = tuple(slice(max(0, a - b), max(0, a - b + 32)) for a, b in zip(start, low, strict=True))
    assert known[crop].all()
    assert known.sum() == known[crop].numel()


@pytest.mark.parametrize("padding", [1, 8, 20])
def test_the_command_fetches_enough(tmp_path, caplog, padding):
    """With the padding of the message nothing is missing; patches larger than the crop need as much."""
    start = (48, 48, 48)
    with opened(fetched(tmp_path / "a.zarr", start), shape=32 + 2 * padding):
        asked = int(caplog.text.rpartition("--raw-padding ")[2].split()[0])
    assert padding <= asked <= 2 * padding
    caplog.clear()

    def untouched(index, touches):
        return not all(
            i * CHUNK < a + 32 + asked and (i + 1) * CHUNK > a - asked for i, a in zip(index, start, strict=True)
        )

    with opened(fetched(tmp_path / "b.zarr", start, dropped=untouched), shape=32 + 2 * padding) as data:
        assert data.crop.raw.missing == "error"
        assert data[0]["raw"].min() > 0
    assert "not stored" not in caplog.text


def test_a_rotated_patch_of_a_partial_copy(tmp_path):
    root = fetched(tmp_path / "v.zarr")
    with opened(root, shape=24, is_train=True, spatial_transforms={"rotate": {"axes": {"z": [-180, 180]}}}) as data:
        assert data.crop.raw.missing == "mask"
        for number in range(0, len(data), len(data) // 8):
            assert (data[number]["labels"] == 1).any()


@pytest.mark.parametrize(
    ("missing", "dropped"),
    [
        ("a chunk of the crop", lambda index, touches: not touches or index == [3, 3, 3]),
        ("chunks near the crop alone", lambda index, touches: not touches and all(2 <= i <= 5 for i in index)),
        ("a chunk near the crop", lambda index, touches: index == [2, 2, 2]),
        ("a third of the others", lambda index, touches: not touches and (index[0] + index[1] + index[2]) % 3 == 0),
    ],
)
def test_other_gaps_stay_errors(tmp_path, caplog, missing, dropped):
    root = fetched(tmp_path / "v.zarr", dropped=dropped)
    with opened(root) as data:
        assert data.crop.raw.missing == "error"
        with pytest.raises(ChunkError, match="are not stored"):
            data[0]
    assert "with missing_raw=error a sample that shows one of them is an error" in caplog.text
    assert "partial copy" not in caplog.text


def test_a_completed_copy_is_probed_again(tmp_path, monkeypatch):
    """Crops that are opened together share what was looked up; later it is looked up again."""
    root = fetched(tmp_path / "v.zarr")
    with opened(root) as data:
        assert data.crop.raw.missing == "mask"
    shutil.rmtree(root / "raw")
    write_multiscale(root / "raw", RAW, scale=SCALE, translation=(4, 4, 4), storage=ArrayOptions(chunks=(CHUNK,) * 3))
    (root / "raw" / "s0" / "2" / "2" / "2").unlink()
    monkeypatch.setattr("cellmap_lightning.crops.missing_raw._PROBE_LIFETIME", -1)
    with opened(root) as data:
        assert data.crop.raw.missing == "error"


@pytest.mark.parametrize("policy", ["error", "warn", "fill", "mask"])
def test_an_explicit_policy_is_not_changed(tmp_path, policy):
    with opened(fetched(tmp_path / "v.zarr"), missing_raw=policy) as data:
        assert data.crop.raw.missing == policy
        if policy == "error":
            with pytest.raises(ChunkError):
                data[0]
        else:
            assert data[0]["labels"].isnan().any()


def test_raw_alone_and_pickled_copies(tmp_path):
    root = fetched(tmp_path / "v.zarr")
    with CellMapDataset(root / "raw", input_arrays={"raw": {"shape": [48] * 3, "scale": SCALE}}) as data:
        assert data.crop.raw.missing == "error", "nothing could be masked"
    with opened(root) as data, pickle.loads(pickle.dumps(data)) as again:
        assert again.crop.raw.missing == "mask"
        torch.testing.assert_close(again[0]["labels"], data[0]["labels"], equal_nan=True)


def test_many_crops_of_a_volume_are_reported_in_full_once(tmp_path, caplog):
    root = fetched(tmp_path / "v.zarr")
    for number in (2, 3):
        shutil.copytree(root / "crop1", root / f"crop{number}")
    crops = [{"raw": str(root / "raw"), "gt": f"{root}/crop{n}/[mito]"} for n in (1, 2, 3)]
    spec = {"shape": [48] * 3, "scale": SCALE}
    split = CellMapDataSplit(
        datasets={"train": crops},
        classes=["mito"],
        input_arrays={"raw": spec},
        target_arrays={"labels": spec},
        read=ReadOptions(pad=True),
    )
    try:
        assert [d.crop.raw.missing for d in split["train"].datasets] == ["mask"] * 3
    finally:
        split.close()
    lines = [r for r in caplog.records if "partial copy" in r.getMessage() and r.levelno == logging.WARNING]
    assert len(lines) == 1


@pytest.mark.parametrize("stored", [0, 1, 5])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_prediction_reads_missing_chunks_as_fill_value(tmp_path, caplog, stored, dtype):
    """A prediction in which most chunks are zeros, which are not stored, is predicted from again."""
    values = np.zeros((48, 48, 48), dtype)
    for number in range(stored):
        values[16 * (number % 3), 16 * (number // 3), 20] = number + 1
    write_group(tmp_path / "v.zarr")
    write_multiscale(
        tmp_path / "v.zarr" / "raw", values, scale=SCALE, translation=(4, 4, 4), storage=ArrayOptions(chunks=(16,) * 3)
    )
    assert len(list((tmp_path / "v.zarr" / "raw" / "s0").glob("*/*/*"))) == stored
    spec = {"shape": (16, 16, 16), "scale": SCALE}
    with CellMapDatasetWriter(
        str(tmp_path / "v.zarr" / "raw"), str(tmp_path / "out.zarr"), ["mito"], spec, {"output": spec}
    ) as writer:
        for batch in writer.loader(batch_size=4):
            writer[batch["idx"]] = {"output": batch["input"]}
    written = zarr.open_array(str(tmp_path / "out.zarr" / "mito" / "s0"), mode="r")[...]
    np.testing.assert_array_equal(written, values)
    (line,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert f"{27 - stored} of the 27 chunks of raw that its patches reach are not stored" in line.getMessage()


def test_a_writer_warns_once_where_chunks_are_not_counted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("cellmap_lightning.crops.image.MOST_COUNTED", 3)
    test_values = np.zeros((48, 48, 48), np.uint8)
    write_multiscale(
        tmp_path / "raw", test_values, scale=SCALE, translation=(4, 4, 4), storage=ArrayOptions(chunks=(16,) * 3)
    )
    spec = {"shape": (16, 16, 16), "scale": SCALE}
    with CellMapDatasetWriter(
        str(tmp_path / "raw"), str(tmp_path / "out.zarr"), ["mito"], spec, {"output": spec}
    ) as writer:
        assert all((batch["input"] == 0).all() for batch in writer.loader(batch_size=4))
    (line,) = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert "are not stored" in line.getMessage()


def turned(angle, axis=0):
    """A rotation of the plane across an axis."""
    turn, others = np.eye(3), [i for i in range(3) if i != axis]
    turn[np.ix_(others, others)] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    return turn


@pytest.mark.cover(2)
@pytest.mark.parametrize("ratio", [1.0, 1.37, 2.0, 3.0, 5.5, 20.0])
@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5, 4.1])
@pytest.mark.parametrize("turn", [None, turned(0.4), turned(1.1, 2) @ turned(0.5)], ids=["straight", "axis", "any"])
def test_every_voxel_that_a_missing_chunk_changes_is_masked(tmp_path, ratio, shift, turn):
    """The truth are the voxels that differ between two volumes that differ in the missing chunk alone."""
    shape = (40, 48, 44)
    path = tmp_path / "v.zarr"
    write_multiscale(
        path, np.ones(shape, np.uint8), scale=SCALE, translation=(4, 4, 4), storage=ArrayOptions(chunks=(8, 8, 8))
    )
    gaps = [(2, 2, 2), (0, 1, 0), (4, 5, 5)]  # the latter two at the border, where the last slope continues
    one, other = (np.random.default_rng(0).random(shape) for _ in range(2))
    for gap in gaps:
        (path / "s0" / "/".join(map(str, gap))).unlink()
        other[tuple(slice(8 * i, 8 * i + 8) for i in gap)] += 1
    image = StoredImage(read_multiscale(path).finest, ChunkCache())
    window = tuple(max(1, int(n / ratio) + 2) for n in shape)
    center = np.array(shape) * 4.0 + shift * 8
    amap = sample_map(center, window, np.array([8.0 * ratio] * 3), image.lattice, turn)
    found = []
    for values in (one, other):
        out = np.zeros(window)
        evaluate(Voxels(values), amap, out, method="linear", fill=0)
        found.append(out)
    changed = found[0] != found[1]
    mask = image.missing_mask(amap)
    mask = np.zeros(window, bool) if mask is None else mask
    assert changed.any()
    # A voxel within the tolerance of the lattice counts as on it.
    assert (mask | (np.abs(found[0] - found[1]) <= 3 * LATTICE_TOLERANCE)).all()
    if turn is None:
        assert (mask == changed).mean() > 0.999 if ratio != int(ratio) else (mask == changed).all()
    else:  # the box around a turned voxel is larger than it
        assert mask.sum() <= 4 * changed.sum() + 50


class Voxels:
    """An array in memory, as a source of resampling."""

    def __init__(self, values):
        self.values, self.shape, self.dtype = values, values.shape, values.dtype

    def read(self, start, shape):
        return self.values[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]

    def read_into(self, start, out):
        out[...] = self.read(start, out.shape)


@pytest.mark.parametrize("gaps", [["0/0/1"], ["0/0/1", "1/0/0"], ["0/1/0", "0/1/1", "1/0/1", "1/1/0", "1/1/1"]])
def test_each_warning_names_a_chunk_that_is_missing(tmp_path, caplog, gaps):
    """A box that is decoded at a time holds several chunks; the first of it is stored here."""
    write_multiscale(
        tmp_path / "raw", RAW[:32, :32, :32], scale=SCALE, translation=(4, 4, 4), storage=ArrayOptions(chunks=(16,) * 3)
    )
    for gap in gaps:
        (tmp_path / "raw" / "s0" / gap).unlink()
    image = StoredImage(read_multiscale(tmp_path / "raw").finest, ChunkCache(), "raw", missing="warn")
    image.region.read((0, 0, 0), (32, 32, 32))
    lines = [record for record in caplog.records if "reads as the fill value" in record.getMessage()]
    assert {record.levelno for record in lines} == {logging.WARNING}
    times = [n for n in (1, 2, 4) if n <= len(gaps)]
    for record, number in zip(lines, times, strict=True):
        assert f"chunk {tmp_path}/raw/s0/{gaps[number - 1]} is missing" in record.getMessage()
        assert record.getMessage().endswith(f"(times that this happened: {number})")
