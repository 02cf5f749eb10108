"""Foreground indices: content, reads, and invalidation."""

import logging
import os

import numpy as np
import pytest

from cellmap_lightning.crops import class_index as module
from cellmap_lightning.crops.class_index import foreground_index
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import Encoding, read_multiscale
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale
from cellmap_lightning.runtime.thread_pool import ReadPool

CODE = Encoding(0, 255)


@pytest.fixture
def pool():
    pool = ReadPool(2)
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "kept"))


@pytest.fixture
def reads(monkeypatch):
    """The boxes that are read, of the real reader."""
    seen = []
    read = ChunkReader.read

    def counted(self, start, shape, begun=None):
        seen.append((start, shape))
        return read(self, start, shape, begun)

    monkeypatch.setattr(ChunkReader, "read", counted)
    return seen


def write(tmp_path, stored, name="a", levels=1, zarr_format=2, shards=None, **kwargs):
    root = tmp_path / "v.zarr"
    if not root.exists():
        write_group(root, zarr_format=zarr_format)
    write_multiscale(
        root / name, stored, scale=(2, 2, 2), translation=(0, 0, 0), levels=levels, mode="mode",
        storage=ArrayOptions(chunks=(32, 32, 32), zarr_format=zarr_format, shards=shards), **kwargs,
    )  # fmt: skip
    return read_multiscale(root / name)


def blob(shape=(64, 128, 64)):
    stored = np.zeros(shape, np.uint8)
    stored[3:9, 5:8, 60:66] = 1
    stored[3:9, 70:80, 2] = 255  # unknown
    stored[40, 100:103, 33] = 7
    return stored


@pytest.mark.parametrize("how", [{}, {"zarr_format": 3}, {"zarr_format": 3, "shards": (64, 64, 64)}], ids=str)
def test_every_voxel_of_a_small_class_and_no_unknown_one(tmp_path, pool, how):
    stored = blob((80, 130, 70))
    found = foreground_index(write(tmp_path, stored, **how).present, CODE, pool, "a")
    truth = np.argwhere((stored != 0) & (stored != 255))
    assert len(found) == len(truth) == found.weights.sum()
    np.testing.assert_array_equal(np.array(sorted(found.voxels.tolist())), truth)
    picked = {found.pick(u) for u in np.linspace(0, 1, 1000, endpoint=False)}
    assert picked == set(map(tuple, truth.tolist()))


def test_a_large_class_is_picked_evenly_from_a_bounded_index(tmp_path, pool):
    stored = np.zeros((128, 128, 128), np.uint8)
    stored[:, :, :70] = 1
    found = foreground_index(write(tmp_path, stored).present, CODE, pool, "a")
    assert len(found) == 128 * 128 * 70
    assert len(found.voxels) == 8 * module.MOST_OF_A_BLOCK
    assert all(stored[tuple(v)] == 1 for v in found.voxels.tolist())
    rng = np.random.default_rng(0)
    picked = np.array([found.pick(u) for u in rng.random(20_000)])
    for axis, length in enumerate((128, 128, 70)):
        # The mean of a uniform choice, within four standard deviations of the draws and of the choice of the sample.
        error = 4 * length / 12**0.5 * (20_000**-0.5 + len(found.voxels) ** -0.5)
        assert abs(picked[:, axis].mean() - (length - 1) / 2) < error
    assert (
        abs((picked[:, 2] >= 64).mean() - 6 / 70) < 0.01
    )  # blocks with few voxels are met as rarely as they should be


def test_chunks_that_do_not_exist_are_not_read(tmp_path, pool, reads):
    empty = write(tmp_path, np.zeros((256, 256, 256), np.uint8), "empty")
    reads.clear()
    assert len(foreground_index(empty.present, CODE, pool, "empty")) == 0
    assert [shape for _, shape in reads] == [(1, 1, 1)]  # it tells what a missing chunk stands for
    one = np.zeros((256, 256, 256), np.uint8)
    one[100, 200, 3] = 1
    some = write(tmp_path, one, "one")
    reads.clear()
    assert foreground_index(some.present, CODE, pool, "one").voxels.tolist() == [[100, 200, 3]]
    assert reads == [((0, 0, 0), (1, 1, 1)), ((64, 192, 0), (64, 64, 64))]


def test_of_very_many_chunks_some_are_read_unless_these_have_nothing(tmp_path, pool, reads, monkeypatch):
    monkeypatch.setattr(module, "MOST_BLOCKS", 4)
    everywhere = np.ones((256, 256, 128), np.uint8)
    found = foreground_index(write(tmp_path, everywhere).present, CODE, pool, "a")
    assert len(reads) == len(found.counts) == 4
    assert np.ptp(found.voxels, axis=0).min() > 64  # of the whole image
    for corner in (0, 192):  # wherever it is
        rare = np.full((256, 256, 128), 255, np.uint8)
        rare[corner, corner, 5] = 1
        image = write(tmp_path, rare, f"rare{corner}")
        assert foreground_index(image.present, CODE, pool, "a").voxels.tolist() == [[corner, corner, 5]]


def test_a_fill_value_that_is_foreground_counts(tmp_path, pool):
    image = write(tmp_path, np.zeros((64, 64, 64), np.uint8))
    code = Encoding(3, 255)  # what is stored nowhere: everything is foreground
    assert len(foreground_index(image.present, code, pool, "a")) == 64**3


def test_a_changed_chunk_makes_the_cached_index_stale(tmp_path, pool, reads):
    image = write(tmp_path, blob())
    first = foreground_index(image.present, CODE, pool, "a")
    assert len(reads) == 2
    again = foreground_index(image.present, CODE, pool, "a")
    assert len(reads) == 2
    np.testing.assert_array_equal(first.voxels, again.voxels)
    assert not any(f.name.endswith(".json") for f in image.path.rglob("*"))  # nothing is written to the data
    chunk = next(f for f in (image.path / "s0").rglob("*") if f.is_file() and not f.name.startswith("."))
    os.utime(chunk, ns=(1, 1))  # the metadata are as before
    foreground_index(image.present, CODE, pool, "a")
    assert len(reads) == 4


def test_a_structure_that_the_coarse_level_lost_is_found_in_a_finer_one(tmp_path, pool):
    stored = np.zeros((64, 64, 64), np.uint8)
    stored[11, 13, :] = 1  # thin: its majority is background
    image = write(tmp_path, stored, levels=2)
    found = foreground_index(image.present[::-1], CODE, pool, "a")
    assert found.lattice.step == (2, 2, 2)
    assert len(found) == 64


def test_threads_make_the_same_index(tmp_path, monkeypatch):
    stored = (np.random.default_rng(0).random((160, 160, 160)) < 0.3).astype(np.uint8)
    image = write(tmp_path, stored)
    found = []
    for workers in (1, 4):
        monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / f"kept{workers}"))
        pool = ReadPool(workers)
        found.append(foreground_index(image.present, CODE, pool, "a"))
        pool.close()
    np.testing.assert_array_equal(found[0].voxels, found[1].voxels)
    np.testing.assert_array_equal(found[0].counts, found[1].counts)


def test_a_cache_folder_that_cannot_be_written_to_costs_only_time(tmp_path, pool, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        found = foreground_index(write(tmp_path, blob()).present, CODE, pool, "a")
    assert len(found)
    assert "cannot be cached" in caplog.text
