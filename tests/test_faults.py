"""Data as it comes: damaged, incomplete, refused, changing. Each fault is an error, or a line, that says where."""

import itertools
import json
import logging
import os
import re
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from zarr.storage import LocalStore

from cellmap_lightning.crops.options import IntensityOptions, LabelOptions, ReadOptions
from cellmap_lightning.datasets.dataset import CellMapDataset
from cellmap_lightning.errors import CellMapValueError, ChunkError, MetadataError
from cellmap_lightning.io import chunks
from cellmap_lightning.io import retrying as guard
from cellmap_lightning.io.retrying import COUNTS
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from tests import small_volume
from tests.io.faults import FaultyStore, transient
from tests.small_volume import RAW, SCALE, SPEC, chunk, dataset, position

root, own_regions = small_volume.root, small_volume.own_regions

TURNS = {"transpose": {"axes": ["z", "y", "x"]}, "mirror": {"axes": {"z": 0.5, "x": 0.5}}}


# -- a missing chunk


@pytest.mark.parametrize("cache", ["none", "memory", "disk"])
@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_a_missing_chunk_of_raw_is_an_error_when_a_sample_shows_it(root, caplog, cache, reader):
    """In this run and in the next, which reads the cache; other samples are read."""
    chunk(root, "1/1/1").unlink()
    for _ in range(2):
        with dataset(root, cache=cache, reader=reader) as data:
            assert "crop1: 1 of the 8 chunks of raw that its patches reach are not stored" in caplog.text, "at setup"
            assert "with missing_raw=error a sample that shows one of them is an error" in caplog.text
            for _ in range(2):
                with pytest.raises(ChunkError) as caught:
                    data[position(data, (32, 32, 32))]
            text = str(caught.value)
            assert text.startswith(
                f"volume/crop1: raw: {root}/raw/s0: voxels z[32:64], y[32:64], x[32:64] are not stored"
            )
            assert f"chunk {chunk(root, '1/1/1')} is missing" in text
            assert "missing_raw=warn" in text
    chunk(root, "1/1/1").write_bytes(chunk(root, "2/2/2").read_bytes())
    with dataset(root, cache=cache, reader=reader) as data:
        assert (data[position(data, (32, 32, 32))]["raw"].numpy() == RAW[64:, 64:, 64:]).all(), "it was fetched again"


@pytest.mark.parametrize("reader", ["zarr", "tensorstore"])
def test_missing_raw_warn_reads_the_fill_value_and_warns(root, caplog, reader):
    chunk(root, "1/1/1").unlink()
    with dataset(root, missing_raw="warn", reader=reader) as data:
        assert "with missing_raw=warn they show the fill value" in caplog.text
        caplog.clear()
        sample = data[position(data, (32, 32, 32))]
        assert (sample["raw"] == 0).all()
        assert not sample["labels"].isnan().any()
        assert [r.levelno for r in caplog.records] == [logging.WARNING]
        assert f"chunk {chunk(root, '1/1/1')} is missing" in caplog.text
    with dataset(root) as data, pytest.raises(ChunkError):  # a cached fill value does not count as stored
        data[position(data, (32, 32, 32))]


@pytest.mark.parametrize("cache", ["none", "disk", pytest.param("memory", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["binary", "instances", "affinities"])
@pytest.mark.parametrize("spatial", [None, TURNS])
def test_missing_raw_mask_makes_targets_unknown_there_and_nowhere_else(root, cache, kind, spatial):
    """For each turn of the sample, targets are unknown exactly where raw has the fill value (as nothing else)."""
    chunk(root, "1/0/1").unlink()
    for again in range(2):
        target = SPEC | ({"kind": kind} if kind != "binary" else {})
        more = {"offsets": [[1, 0, 0]]} if kind == "affinities" else {}
        data = CellMapDataset(
            root / "raw",
            f"{root}/crop1/[mito]",
            ["mito"],
            {"raw": SPEC},
            {"labels": target | more},
            spatial_transforms=spatial,
            is_train=spatial is not None,
            read=ReadOptions(missing_raw="mask", cache=cache),
            intensity=IntensityOptions(raw_value_transforms=None),
        )
        with data:
            touched = 0
            for start in ((0, 0, 0), (16, 0, 16), (32, 0, 32), (32, 32, 32), (20, 10, 30)):
                for number in range(3 if spatial else 1):
                    at = position(data, start)
                    draws = data.draw([number], True, again)
                    draws[0] = type(draws[0])(number, at, draws[0].turn)
                    batch = data.layout.finish(data.read(draws))
                    hole = batch["raw"][0, 0] == 0
                    found = batch["labels"][0, 0]
                    unknown = found == -1 if kind == "instances" else found.isnan()
                    if kind == "affinities":  # one of the two voxels may be the hidden one
                        assert unknown[hole].all()
                    else:
                        assert torch.equal(unknown, hole)
                    touched += int(hole.sum())
            assert touched


def test_interpolation_from_missing_raw_is_unknown_too(root):
    chunk(root, "1/0/1").unlink()
    spec = {"shape": [16, 16, 16], "scale": [10.0, 10.0, 10.0]}
    data = CellMapDataset(
        root / "raw",
        f"{root}/crop1/[mito]",
        ["mito"],
        {"raw": spec},
        {"labels": spec},
        read=ReadOptions(missing_raw="mask"),
        intensity=IntensityOptions(normalize={"range": [0, 1]}),
        labels=LabelOptions(too_coarse="upsample"),
    )
    whole = np.full_like(RAW, 200)
    write_multiscale(
        root / "even", whole, scale=SCALE, translation=(4.0, 4.0, 4.0), storage=ArrayOptions(chunks=(32, 32, 32))
    )
    shutil.copytree(root / "even" / "s0", root / "raw" / "s0", dirs_exist_ok=True)
    chunk(root, "1/0/1").unlink()
    touched = 0
    with data:
        for at in range(0, len(data), max(1, len(data) // 40)):
            sample = data[at]
            affected = sample["raw"][0] != 200
            unknown = sample["labels"][0].isnan()
            assert unknown[affected].all()
            touched += int(affected.sum())
    assert touched


def test_volumes_to_predict_may_have_holes(root, caplog):
    """Programs leave out chunks that hold nothing but the fill value, as around most volumes."""
    chunk(root, "0/0/0").unlink()
    split = CellMapDataSplit(datasets={"predict": [{"raw": str(root / "raw")}]}, input_arrays={"raw": SPEC})
    with split["predict"] as data:
        assert (data[0]["raw"] == 0).all()
    assert "1 of the 27 chunks of raw that its patches reach are not stored" in caplog.text
    assert "missing_raw=warn" in caplog.text


def test_a_missing_chunk_of_labels_is_background(root, caplog):
    """If nothing contradicts it: there are no counts of the voxels."""
    edit(root / "crop1" / "mito" / "s0" / ".zattrs", lambda c: c["cellmap"]["annotation"].pop("complement_counts"))
    chunk(root, "0/0/0", "crop1/mito").unlink()
    with dataset(root) as data:
        assert (data[position(data, (0, 0, 0))]["labels"][0] == 0).all()
    assert "not stored" not in caplog.text


def test_values_of_missing_raw():
    for value in ("skip", None, True):
        with pytest.raises(CellMapValueError, match="missing_raw must be one of auto, error, warn, fill, mask"):
            CellMapDataSplit(datasets={}, input_arrays={"raw": SPEC}, read=ReadOptions(missing_raw=value))


# -- everything that is wrong, in one report


def test_errors_of_all_crops_are_one_report(root):
    """One error names the faults of raw and classes of all crops."""
    second = root.parent / "second.zarr"
    shutil.copytree(root, second)
    edit(root / "raw" / ".zattrs", lambda c: c["multiscales"][0]["axes"][0].update(unit="lightyear"))
    (root / "crop1" / "mito" / "s0" / ".zarray").write_text("{")
    edit(root / "crop1" / "er" / "s0" / ".zarray", lambda c: c.update(dtype="|O"))
    shutil.rmtree(second / "crop1" / "er")
    entries = [{"raw": str(p / "raw"), "gt": f"{p}/crop1/[mito,er]"} for p in (root, second)]
    split = CellMapDataSplit(
        datasets={"train": entries}, classes=["mito", "er"], input_arrays={"raw": SPEC}, target_arrays={"labels": SPEC}
    )
    with pytest.raises(CellMapValueError) as caught:
        split["train"]
    text = str(caught.value)
    assert text.startswith("2 of the 2 crops for 'train' cannot be used")
    for expected in (
        "3 things are wrong:", "has the unit 'lightyear'", "mito/s0/.zarray: not valid JSON",
        "data type '|O' is not a number", f"but {second}/crop1/er does not exist",
    ):  # fmt: skip
        assert expected in text, text


def edit(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def test_labels_without_any_annotation_are_reported(root, caplog):
    counts = {"absent": 0, "unknown": 64**3}
    edit(
        root / "crop1" / "mito" / "s0" / ".zattrs",
        lambda c: c["cellmap"]["annotation"].update(complement_counts=counts),
    )
    with dataset(root):
        pass
    assert f"crop1, class mito: by its metadata all {64**3} voxels are unknown" in caplog.text


def test_stale_consolidated_metadata_hides_nothing(root):
    """A class that was added after the metadata had been consolidated is found."""
    (root / ".zmetadata").write_text(
        json.dumps({"zarr_consolidated_format": 1, "metadata": {".zgroup": {"zarr_format": 2}}})
    )
    with dataset(root) as data:
        assert set(data.annotated) == {"mito", "er"}
        assert (data[0]["raw"][0].numpy() == RAW[:32, :32, :32]).all()


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_unreadable_file_is_named(root):
    """As another user: the metadata, a folder, and a chunk."""
    for folder in (root, *root.parents[:-2]):
        folder.chmod(0o755)
    for path in root.rglob("*"):
        path.chmod(0o755)
    with dataset(root) as data:
        chunk(root).chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(ChunkError, match=r"PermissionError.*reading is not allowed"):
                data[position(data, (0, 0, 0))]
        finally:
            os.seteuid(0)
    for path in (root / "raw" / ".zattrs", root / "raw", root / "crop1" / "mito"):
        path.chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(MetadataError, match=r"cannot be (read|looked at) \(Permission denied\)"):
                dataset(root)
        finally:
            os.seteuid(0)
            path.chmod(0o755)


# -- soak


@pytest.mark.slow
def test_soak_with_faults(root, monkeypatch):
    """100,000 samples, 1 % of whose reads fail: each is right, and nothing grows."""
    monkeypatch.setattr(guard, "FIRST_PAUSE", 0.001)
    count = itertools.count(1)

    def fault(key, number):
        found = next(count)
        return transient() if found % 100 == 0 else ConnectionResetError() if found % 250 == 0 else None

    monkeypatch.setattr(chunks, "open_store", lambda path, most: FaultyStore(LocalStore(path, read_only=True), fault))
    spec = {"shape": [8, 8, 8], "scale": list(SCALE)}
    COUNTS.reset()
    data = CellMapDataset(
        root / "raw",
        f"{root}/crop1/[mito]",
        ["mito"],
        {"raw": spec},
        {"labels": spec},
        is_train=True,
        read=ReadOptions(cache="none", max_workers=2),
        intensity=IntensityOptions(raw_value_transforms=None),
    )
    found = []
    with data:
        for first in range(0, 100_000, 8):
            draws = data.draw(range(first, first + 8), True, 0)
            batch = data.read(draws).tensors
            for row, draw in enumerate(draws):
                z, y, x = data.placement.grid_index(draw.position)
                assert (np.asarray(batch["raw"])[row, 0] == RAW[z : z + 8, y : y + 8, x : x + 8]).all()
            if first % 1000 == 0:
                status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
                descriptors = len(list(Path("/proc/self/fd").iterdir()))
                found.append((int(status["VmRSS"].split()[0]), descriptors, threading.active_count()))
    assert COUNTS.retries > 1000
    assert COUNTS.failures == 0
    early, late = np.median(found[20:40], axis=0), np.median(found[-20:], axis=0)
    assert late[0] < 1.02 * early[0] + 4000, (early, late)
    assert (late[1:] <= early[1:] + 2).all(), (early, late)


# -- silence while closing


def test_a_read_that_stalls_ends_with_its_deadline_and_the_data_can_be_closed(root, no_threads_left, monkeypatch):
    """A pipe stands in for a dead network mount: zarr-python's own store blocks in the system when it opens one."""
    monkeypatch.setattr(chunks, "open_store", lambda path, most: LocalStore(path, read_only=True))
    chunk(root).unlink()
    os.mkfifo(chunk(root))
    try:
        with (
            dataset(root, read_timeout=1.0) as data,
            pytest.raises(ChunkError, match="no answer, or not all of it, in time; read_timeout"),
        ):
            data[position(data, (0, 0, 0))]
    finally:
        os.close(os.open(chunk(root), os.O_WRONLY | os.O_NONBLOCK))


# -- security


def test_package_never_executes_data():
    """No eval, no pickle of data, no unsafe YAML, and checkpoints are loaded as weights."""
    package = Path(__file__).parents[1] / "cellmap_lightning"
    for file in package.rglob("*.py"):
        text = file.read_text()
        if file.name == "testing.py":  # tests of other packages' formats pickle a reader and read that again
            text = text.replace("pickle.loads(pickle.dumps(", "")
        for word in (" eval(", " exec(", "pickle.load", "yaml.load(", "yaml.unsafe", "allow_pickle=True", "shell=True"):
            assert word not in text, (file, word)
        for at in text.split("torch.load(")[1:]:
            # Or the argument of `load_from_checkpoint`.
            call = at.split(")")[0]
            assert "weights_only=True" in call or "weights_only=weights_only is not False" in call, file


def test_a_level_cannot_lead_out_of_the_store(root):
    for name in ("../crop1/mito/s0", "/etc", "s0/../../crop1/mito/s0", ""):
        edit(root / "raw" / ".zattrs", lambda c, name=name: c["multiscales"][0]["datasets"][0].update(path=name))
        with pytest.raises(MetadataError, match="a level's path should be a name inside the image"):
            dataset(root)


def test_cache_files_are_private(root, tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    with dataset(root, cache="disk", normalize="zscore", is_train=True) as data:
        data[0]
        _ = data.class_counts, data.crop.foreground_index("mito")
        for path in (tmp_path / "cache").rglob("*"):
            assert path.stat().st_mode & 0o077 == 0, path
    assert (tmp_path / "cache").stat().st_mode & 0o077 == 0


def test_the_table_of_faults_names_tests_that_exist():
    """`docs/reliability.md` says of each fault which test shows it."""
    tests = Path(__file__).parent
    text = (tests.parent / "docs" / "reliability.md").read_text()
    named = re.findall(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`", text)
    assert len(named) > 40
    for file, name in named:
        assert re.search(rf"^def {name}\(", (tests / file).read_text(), re.MULTILINE), (file, name)
