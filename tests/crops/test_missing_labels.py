"""Missing and empty label chunks, and declared voxel counts."""

import logging
import shutil
import zipfile

import numpy as np
import pytest

from cellmap_lightning import CellMapDataModule
from cellmap_lightning.crops.options import LabelOptions, ReadOptions
from cellmap_lightning.errors import CellMapError, CellMapValueError, ChunkError, MetadataError
from cellmap_lightning.inspection.report import inspect
from tests.foreign import (
    INSTANCE,
    SEMANTIC,
    annotated,
    counts_of,
    cube,
    dataset,
    edit,
    ramp,
    remove_chunks,
    sample,
    write_pair,
)

FORMATS = [2, 3]
READERS = ["zarr", "tensorstore"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


# ---------------------------------------------------------------------------------- chunks that are missing, and counts


def lose(level, what):
    if what == "all":
        remove_chunks(level)
    elif what == "half":
        for folder in (level / "0", level / "c" / "0"):
            shutil.rmtree(folder, ignore_errors=True)
    else:
        for file in (level / "1" / "1" / "1", level / "c" / "1" / "1" / "1"):
            file.unlink(missing_ok=True)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("what", ["all", "half", "one"])
def test_missing_chunks_with_declared_voxels(tmp_path, what, zarr_format, reader):
    stored = cube()
    stored[0] = 255
    raw, target = write_pair(
        tmp_path, stored, zarr_format=zarr_format, array_attributes=annotated(SEMANTIC, counts_of(stored))
    )  # fmt: skip
    sample(raw, target, reader=reader)
    level = tmp_path / "v.zarr" / "crop1" / "mito" / "s0"
    lose(level, what)
    left = {"all": 0, "half": 4, "one": 7}[what]
    with pytest.raises(MetadataError, match=f"complement_counts declare 5120 .* {left} of its 8 chunk files") as e:
        dataset(raw, target, reader=reader)
    assert "missing_labels=unknown" in str(e.value)
    found = sample(raw, target, reader=reader, missing_labels="unknown")["labels"]
    gone = {"all": np.s_[:], "half": np.s_[:16], "one": np.s_[16:, 16:, 16:]}[what]
    expected = np.where(stored == 255, np.nan, stored)
    expected[gone] = np.nan
    assert np.array_equal(found, expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["instances", "labels"])
@pytest.mark.parametrize("encoding", [INSTANCE, {"type": "semantic_segmentation", "encoding": {"absent": 0}}])
def test_missing_chunks_are_unknown_in_other_kinds(tmp_path, kind, encoding):
    """Also where the encoding has no code for unknown voxels."""
    from cellmap_lightning import CellMapDataset

    stored = cube(200)
    counts = {"absent": int((stored == 0).sum()), "unknown": 0}
    raw, target = write_pair(tmp_path, stored, array_attributes=annotated(encoding, counts))
    lose(tmp_path / "v.zarr" / "crop1" / "mito" / "s0", "half")
    array = {"shape": [32] * 3, "scale": [8] * 3}
    targets = {"t": {**array, "kind": kind}}
    with CellMapDataset(
        raw,
        target,
        ["mito"],
        {"raw": array},
        targets,
        read=ReadOptions(cache="none"),
        labels=LabelOptions(missing_labels="unknown"),
    ) as data:
        found = data[0]["t"].numpy()[0]
    expected = stored.astype(int) if kind == "instances" else (stored > 0).astype(int)
    expected[:16] = -1 if kind == "instances" else -100
    assert np.array_equal(found, expected)


@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("stored", [np.zeros((32,) * 3, "u1"), cube(), cube(1, "u1", 32) * (ramp() % 2).astype("u1")])
def test_missing_chunks_without_declared_voxels_are_background(tmp_path, stored, zarr_format):
    """Of an array that is sparse: chunks of background are not written, with counts and without."""
    stored = stored.copy()
    stored[16:] = 0
    for number, counts in enumerate((counts_of(stored), None)):
        raw, target = write_pair(
            tmp_path / str(number), stored, zarr_format=zarr_format, array_attributes=annotated(SEMANTIC, counts)
        )  # fmt: skip
        assert np.array_equal(sample(raw, target)["labels"], stored.astype(float))


def test_a_large_array_is_compared_when_its_voxels_are_counted(tmp_path, caplog, monkeypatch):
    from cellmap_lightning.io import declared_counts

    monkeypatch.setattr(declared_counts, "COUNTED_FILES", 4)
    stored = cube()
    raw, target = write_pair(tmp_path, stored, array_attributes=annotated(SEMANTIC, counts_of(stored)))
    lose(tmp_path / "v.zarr" / "crop1" / "mito" / "s0", "half")
    with dataset(raw, target) as data, pytest.raises(MetadataError, match=r"declare 4096 .* hold 2048"):
        data.crop.foreground_index("mito")
    array = {"shape": [16] * 3, "scale": [8] * 3}
    entries = {"train": [{"raw": raw, "gt": target}]}
    with CellMapDataModule(["mito"], array, array, datasets=entries, strategy="foreground") as data:
        data.setup("fit")
        with pytest.raises(MetadataError, match=r"declare 4096 .* hold 2048"):
            next(iter(data.train_dataloader()))
    with dataset(raw, target, missing_labels="unknown") as data:
        assert len(data.crop.foreground_index("mito")) == 2048
    found = inspect({"datasets": {"train": [{"raw": raw, "gt": target}]}}, {}, None, deep=True)
    assert "complement_counts declare 4096" in str(found)


def test_counts_that_are_out_of_date_are_a_warning(tmp_path, caplog):
    """All chunks are there, and hold something else."""
    stored = cube()
    stored[0] = 1
    stored[31, 31] = 1
    raw, target = write_pair(
        tmp_path, stored, array_attributes=annotated(SEMANTIC, {"absent": 30000, "unknown": 0}),
        config={"write_empty_chunks": True},
    )  # fmt: skip
    with dataset(raw, target) as data, caplog.at_level(logging.WARNING):
        assert len(data.crop.foreground_index("mito")) == int(stored.sum())
    assert "complement_counts declare 2768 voxels of the class" in caplog.text
    assert "out of date" in caplog.text


def test_values_of_missing_labels(tmp_path):
    raw, target = write_pair(tmp_path, cube())
    with pytest.raises(CellMapValueError, match="missing_labels must be one of error, unknown, got 'skip'"):
        dataset(raw, target, missing_labels="skip")
    with pytest.raises(CellMapValueError, match="missing_labels must be one of"):
        CellMapDataModule(["mito"], {"shape": [8] * 3, "scale": [8] * 3}, datasets={}, missing_labels="x")


def test_a_foreground_fill_value_declares_no_voxels(tmp_path):
    """Chunks that are not stored are then full of the class, which the counts say too."""
    stored = np.ones((32,) * 3, "u1")
    raw, target = write_pair(
        tmp_path, stored, array_attributes=annotated(SEMANTIC, counts_of(stored)), fill_value=1
    )  # fmt: skip
    assert not (tmp_path / "v.zarr" / "crop1" / "mito" / "s0" / "0").exists()
    assert sample(raw, target)["labels"].min() == 1
    edit(tmp_path / "v.zarr" / "crop1" / "mito" / "s0" / ".zarray", lambda c: c.update(fill_value=None))
    with pytest.raises(MetadataError, match="declare 32768"):
        dataset(raw, target)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("zarr_format", FORMATS)
@pytest.mark.parametrize("attributes", [annotated(SEMANTIC), None])
def test_chunk_files_of_0_bytes(tmp_path, zarr_format, reader, attributes):
    """An error that says what to set; then unknown, while chunks that are missing stay background."""
    stored = cube()
    stored[16:] = 0
    raw, target = write_pair(tmp_path, stored, zarr_format=zarr_format, attributes=attributes)
    level = tmp_path / "v.zarr" / "crop1" / "mito" / "s0"
    (level / ("0/0/0" if zarr_format == 2 else "c/0/0/0")).write_bytes(b"")
    with pytest.raises(ChunkError, match=r"0 bytes are stored.* set missing_labels=unknown"):
        sample(raw, target, reader=reader, read_attempts=1)
    expected = stored.astype(float)
    expected[:16, :16, :16] = np.nan
    found = sample(raw, target, reader=reader, missing_labels="unknown")["labels"]
    assert np.array_equal(found, expected, equal_nan=True)
    with dataset(raw, target, missing_labels="unknown") as data:
        assert len(data.crop.foreground_index("mito")) == int((expected == 1).sum())


@pytest.mark.parametrize("where", ["array", "group"])
@pytest.mark.parametrize("number", [int, float])
def test_counts_in_other_places_and_types(tmp_path, where, number):
    stored = cube()
    counts = {name: number(n) for name, n in counts_of(stored).items()}
    options = {"array_attributes" if where == "array" else "attributes": annotated(SEMANTIC, counts)}
    raw, target = write_pair(tmp_path, stored, **options)
    sample(raw, target)
    lose(tmp_path / "v.zarr" / "crop1" / "mito" / "s0", "half")
    with pytest.raises(MetadataError, match="complement_counts declare 4096"):
        dataset(raw, target)


@pytest.mark.parametrize("lost", ["missing", "empty"])
def test_counts_in_archives_and_of_empty_files(tmp_path, lost):
    stored = cube()
    raw, target = write_pair(tmp_path, stored, array_attributes=annotated(SEMANTIC, counts_of(stored)))
    for file in (tmp_path / "v.zarr" / "crop1" / "mito" / "s0" / "0").rglob("*"):
        if file.is_file():
            file.unlink() if lost == "missing" else file.write_bytes(b"")
    with pytest.raises(MetadataError, match="4 of its 8 chunk files"):
        dataset(raw, target)
    with zipfile.ZipFile(tmp_path / "v.zip", "w") as archive:
        for file in (tmp_path / "v.zarr").rglob("*"):
            archive.write(file, str(file.relative_to(tmp_path)))
    inside = [f"zip://{path.removeprefix(f'{tmp_path}/')}::{tmp_path}/v.zip" for path in (raw, target)]
    with pytest.raises(MetadataError, match="4 of its 8 chunk files"):
        dataset(*inside)
    found = sample(*inside, missing_labels="unknown")["labels"]
    assert np.isnan(found[:16]).all()
    assert np.array_equal(found[16:], stored[16:])


def test_a_shard_without_some_of_its_chunks(tmp_path, caplog):
    """A warning: nothing says whether the counts or the shard are right."""
    stored = cube()
    half = stored.copy()
    half[:16] = 0
    raw, target = write_pair(
        tmp_path, half, zarr_format=3, chunks=8, shards=(32, 32, 32),
        array_attributes=annotated(SEMANTIC, counts_of(stored)),
    )  # fmt: skip
    with caplog.at_level(logging.WARNING), dataset(raw, target):
        pass
    assert "declare 4096 voxels that are not absent, but its shards hold 2048" in caplog.text


def two_levels(folder, stored, other=None):
    """An annotation with two levels, of which only the finest has counts that can be right."""
    levels = {"s0": ([8] * 3, [0] * 3), "s1": ([16] * 3, [4] * 3)}
    return write_pair(
        folder, {"s0": stored, "s1": stored[::2, ::2, ::2].copy() if other is None else other}, levels=levels,
        attributes=annotated(SEMANTIC), array_attributes=annotated(SEMANTIC, counts_of(stored)),
    )  # fmt: skip


def thin(axis, value=1):
    """A sheet of one voxel, which downsampling may lose."""
    stored = np.zeros((32,) * 3, np.uint8)
    stored[(slice(None),) * axis + (9,)] = value
    return stored


@pytest.mark.parametrize("stored", [thin(0), thin(1), thin(2)])
def test_an_empty_level_of_thin_structures_is_a_warning(tmp_path, caplog, stored):
    raw, target = two_levels(tmp_path, stored)
    remove_chunks(tmp_path / "v.zarr" / "crop1" / "mito" / "s1")
    with caplog.at_level(logging.WARNING), dataset(raw, target, size=16, scale=(16, 16, 16)):
        pass
    assert sum("s1, which is read, has no chunk" in r.message for r in caplog.records) == 1


def small(start):
    """A cube of three voxels, which holds one voxel of the coarser level."""
    stored = np.zeros((32,) * 3, np.uint8)
    stored[tuple(slice(a, a + 3) for a in start)] = 1
    return stored


@pytest.mark.parametrize("stored", [cube(), small((7, 15, 20)), small((29, 0, 15))], ids=["cube", "small", "edge"])
def test_a_level_that_was_not_copied_is_an_error(tmp_path, stored, caplog):
    raw, target = two_levels(tmp_path, stored)
    remove_chunks(tmp_path / "v.zarr" / "crop1" / "mito" / "s1")
    given = {"size": 16, "scale": (16, 16, 16)}
    text = f"level s1, which is read, has no chunk, but s0 declares {int(stored.sum())} voxels of the class, more than"
    with pytest.raises(MetadataError, match=text) as caught:
        dataset(raw, target, **given)
    assert "missing_labels=unknown" in str(caught.value)
    found = sample(raw, target, missing_labels="unknown", **given)["labels"]
    assert np.isnan(found).all()
    assert "missing_labels=unknown" in caplog.text


def test_a_misspelled_class_in_unknown(tmp_path):
    raw, target = write_pair(tmp_path, cube())
    array = {"shape": [16] * 3, "scale": [8] * 3}
    entries = {"train": [{"raw": raw, "gt": target}]}
    data = CellMapDataModule(["mito"], array, array, datasets=entries, unknown={"mitoo": None})
    with pytest.raises(CellMapError, match=r"unknown names the class 'mitoo'.*did you mean 'mito'"):
        data.setup("fit")
