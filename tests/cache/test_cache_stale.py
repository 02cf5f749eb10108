"""Stale and damaged caches: changed data, metadata and options."""

import json
import logging
import os
import re
import shutil
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import zarr

from cellmap_lightning import CellMapError
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.runtime import thread_pool as pool_module
from tests.cache.annotated_volume import (
    NAMES,
    Volume,
    blocks,
    chunks_of,
    digest,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="decoded voxels are shared so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def overwrite(path, box, value):
    """Voxels of an array, as another program would; each file that is written has a new time."""
    before = {p: p.stat().st_mtime_ns for p in path.rglob("*") if p.is_file()}
    zarr.open_array(path, mode="r+")[box] = value
    for p, earlier in before.items():
        stat = p.stat()
        if stat.st_mtime_ns != earlier:
            os.utime(p, ns=(stat.st_atime_ns, max(stat.st_mtime_ns, earlier + 10**7)))


@pytest.fixture
def large(tmp_path):
    """A volume of several chunks that are decoded by themselves."""
    rng = np.random.default_rng(6)
    volume = Volume(tmp_path / "volume.zarr", chunk=32)
    volume.add_raw(rng.integers(0, 256, (130, 70, 100), np.uint8))
    for name in "ab":
        volume.add(name, blocks(rng, (130, 70, 100), [0, 1, 255]).astype(np.uint8))
    return volume


def read_all(volume, step=8.0, classes=("a", "b"), **kwargs):
    """All tiles, checked against a dataset that keeps nothing; how many chunks were decoded."""
    spec = ((32, 48, 40), (step, 8.0, 8.0))
    with volume.dataset(list(classes), *spec, cache="none", **kwargs) as plain:
        reference = plain.read(plain.draw(range(plain.tile_count), False, 0)).tensors
    with volume.dataset(list(classes), *spec, cache="disk", **kwargs) as dataset:
        found = dataset.read(dataset.draw(range(dataset.tile_count), False, 0)).tensors
        assert torch.equal(found["target"], reference["target"])
        assert torch.equal(found["raw"], reference["raw"])
        return dataset._store.decoded, chunks_of(dataset)


@pytest.mark.parametrize("step", [8.0, 8.9])
def test_only_stale_chunks_are_decoded_again(large, step):
    """A chunk of raw, a chunk of one class; where voxels are resampled, the blocks that are made of it."""
    decoded, count = read_all(large, step)
    assert decoded == count > 10
    assert read_all(large, step) == (0, count)
    few = 1 if step == 8.0 else 4
    overwrite(large.root / "raw" / "s0", np.s_[0:16, 0:16, 0:16], 5)
    assert read_all(large, step) == (1, count)
    overwrite(large.root / "crop1" / "b" / "s0", np.s_[64:80, 64:70, 96:100], 1)
    assert 1 <= read_all(large, step)[0] <= few
    overwrite(large.root / "raw" / "s0", np.s_[:], 6)
    assert read_all(large, step) == (count // 2, count)
    assert read_all(large, step) == (0, count)


@pytest.mark.parametrize("at", [0.1, 0.35, 0.6])
def test_regions_that_are_damaged_on_disk_are_repaired(large, at, cache_dir, caplog):
    """Samples are right, one line per region says so."""
    _, count = read_all(large)
    files = list(cache_dir.rglob("*.region"))
    for file in files:
        with file.open("r+b") as out:
            out.seek(int(at * file.stat().st_size))
            content = out.read(3000)
            out.seek(-len(content), os.SEEK_CUR)
            out.write(bytes(b ^ 0xFF for b in content))
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        decoded, _ = read_all(large)
    assert len(files) <= decoded < count
    lines = [record.getMessage() for record in caplog.records if "is damaged in" in record.getMessage()]
    assert {file for file in files for line in lines if str(file) in line} == set(files)
    assert read_all(large) == (0, count)


def slowly(decode, start, shape):
    time.sleep(0.01)
    return decode(start, shape)


@pytest.mark.parametrize("cache", ["disk", "memory", "chunks"])
def test_a_dataset_that_is_closed_while_threads_read(volumes, cache, monkeypatch):
    """Every batch is right, or an error that says so; also where closing does not wait for slow reads."""
    monkeypatch.setattr(pool_module, "PATIENCE", 0.0)
    dataset = volumes["v2 /"].dataset(NAMES[:3], (8, 12, 16), cache=cache)
    for region in [r for c in dataset.crops for r in c.regions]:
        region.decode = partial(slowly, region.decode)
    draws = dataset.draw(range(dataset.tile_count), False, 0)
    reference, stop = digest(dataset.read(draws)), threading.Event()

    def read():
        found = set()
        while not stop.is_set():
            try:
                found.add(digest(dataset.read(draws)) == reference)
            except CellMapError as e:
                found.add(re.sub("^reading was cancelled: ", "", str(e)))
        return found

    with ThreadPoolExecutor(3) as pool:
        reading = [pool.submit(read) for _ in range(3)]
        for _ in range(20):
            time.sleep(0.02)
            dataset.close()
        stop.set()
        found = {result for future in reading for result in future.result(60)}
    assert True in found
    assert found <= {True, "the dataset was closed while it was read"}
    dataset.close()


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_other_classes_are_other_voxels(large):
    """The same crop for another list of classes, in another order, or with other rules."""
    decoded, count = read_all(large)
    assert decoded == count
    half = count // 2  # raw is the same
    for kwargs in (
        {"classes": ("b", "a")},
        {"classes": ("a",)},
        {"classes": ("a", "nobody", "b")},
        {"classes": ("a", "c"), "class_relation_dict": {"c": ["b"]}},
        {"classes": ("a", "c"), "class_relation_dict": {"c": ["a"]}},
        {"classes": ("a", "b"), "annotated": ("a",)},
    ):
        assert read_all(large, **kwargs) == (half, count), kwargs
        assert read_all(large, **kwargs) == (0, count), kwargs
    for unknown in (None, 1, {"a": None}):  # which does not apply: the metadata say what is unknown
        assert read_all(large, unknown=unknown) == (0, count)
    assert read_all(large) == (0, count)


def test_an_encoding_that_was_corrected_is_another_array(large):
    _, count = read_all(large)

    def swap(content):
        content["cellmap"]["annotation"]["annotation_type"]["encoding"] = {"absent": 1, "unknown": 0}

    edit(large.root / "crop1" / "b" / "s0" / ".zattrs", swap)
    assert read_all(large) == (count // 2, count)


@pytest.mark.parametrize("what", ["raw", "crop1/b"])
def test_a_translation_that_was_corrected_moves_resampled_voxels(large, what):
    """By less than a voxel, so that everything else stays as it was."""
    _, count = read_all(large, 8.9)

    def move(content):
        (level,) = content["multiscales"][0]["datasets"]
        level["coordinateTransformations"][1]["translation"][0] = 0.9

    edit(large.root / what / ".zattrs", move)
    decoded, _ = read_all(large, 8.9)
    assert decoded >= count // 2


def test_an_array_that_was_written_again_in_other_chunks(large):
    read_all(large)
    shutil.rmtree(large.root / "raw")
    rng = np.random.default_rng(8)
    write_multiscale(
        large.root / "raw", rng.integers(0, 256, (130, 70, 100), np.uint8), scale=(8, 8, 8), translation=(0, 0, 0),
        storage=ArrayOptions(chunks=(32, 70, 50)),
    )  # fmt: skip
    decoded, count = read_all(large)
    assert 0 < decoded < count


def test_a_removed_source_is_an_error_despite_the_cache(large):
    with large.dataset(["a", "b"], (16, 24, 20), cache="disk") as dataset:
        dataset[0]
    for file in (large.root / "raw" / "s0").rglob("*"):
        if file.is_file() and file.name[0] != ".":
            file.write_bytes(b"no chunk")
    with large.dataset(["a", "b"], (16, 24, 20), cache="disk") as dataset, pytest.raises(CellMapError, match="raw: "):
        dataset[0]
