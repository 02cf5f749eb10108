"""Detection of stale caches between runs, for files, links and archives."""

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning import CellMapDataset
from cellmap_lightning.crops.options import IntensityOptions, ReadOptions
from cellmap_lightning.io.chunks import ChunkReader
from cellmap_lightning.io.ngff import read_multiscale
from cellmap_lightning.io.stamps import file_stamp
from cellmap_lightning.io.store import absolute, parse_location
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.splits.datasplit import CellMapDataSplit
from tests.io.changes import as_links, edit_in_place, packed, rename_over, retarget_chunks

SPEC = {"raw": {"shape": [8, 8, 8], "scale": [8, 8, 8]}}
BOX = (0, 0, 0), (8, 8, 8)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def pair(tmp_path):
    """Two volumes of value 1 and 2 that differ in the bytes of their chunks alone."""
    paths = []
    for number, folder in enumerate(("a", "b"), 1):
        path = tmp_path / folder / "raw"
        data = np.full((8, 8, 16), number, np.uint8)
        write_multiscale(
            path, data, scale=(8, 8, 8), translation=(0, 0, 0), storage=ArrayOptions(chunks=(8, 8, 8), compressor=None)
        )
        paths.append(path)
    return paths


def shown(address):
    """Return the value of a sample, by a new dataset whose decoded voxels are cached on disk."""
    with CellMapDataset(
        str(address),
        input_arrays=SPEC,
        is_train=False,
        read=ReadOptions(cache="disk"),
        intensity=IntensityOptions(normalize={"range": [0, 1]}),
    ) as dataset:
        values = dataset[0]["raw"].unique().tolist()
    assert len(values) == 1
    return values[0]


def decoded_again(address, monkeypatch):
    """Return whether a new dataset decodes a chunk."""
    read, calls = ChunkReader.read, []
    with monkeypatch.context() as patch:
        patch.setattr(ChunkReader, "read", lambda self, *args: calls.append(1) or read(self, *args))
        shown(address)
    return bool(calls)


def change(pair, how, tmp_path):
    """Return the address of the first volume, and a function that puts the second in its place."""
    path, other = pair
    given = tmp_path / "given"
    if how in ("edited in place", "replaced by rename"):
        act = edit_in_place if how == "edited in place" else rename_over
        return path, lambda: act(path / "s0", other / "s0")
    if how == "links of chunks":
        as_links(path / "s0", tmp_path / "annex")
        return path, lambda: retarget_chunks(path / "s0", other / "s0")
    if how == "link of a chunk's folder":
        (path / "s0/0").replace(tmp_path / "chunks")
        (path / "s0/0").symlink_to(tmp_path / "chunks")
        return path, lambda: relink(path / "s0/0", other / "s0/0")
    if how == "link of a level":
        (path / "s0").replace(tmp_path / "s0_v1")
        (path / "s0").symlink_to("../../s0_v1")
        return path, lambda: relink(path / "s0", other / "s0")
    if how == "link of a volume":
        given.symlink_to(path)
        return given, lambda: relink(given, other)
    if how == "link of a folder above":
        given.symlink_to(path.parent)
        return given / "raw", lambda: relink(given, other.parent)
    for folder, archive in zip(pair, ("a.zip", "b.zip"), strict=True):
        packed(folder, tmp_path / archive)
    archive = tmp_path / "given.zip"
    if how == "link of an archive":
        archive.symlink_to(tmp_path / "a.zip")
        return f"zip://raw::{archive}", lambda: relink(archive, tmp_path / "b.zip")
    shutil.copy2(tmp_path / "a.zip", archive)
    if how == "archive replaced":
        return f"zip://raw::{archive}", lambda: (tmp_path / "b.zip").replace(archive)
    assert how == "archive written in place"

    def overwrite():
        archive.write_bytes((tmp_path / "b.zip").read_bytes())
        os.utime(archive, ns=(10**18, 10**18))

    return f"zip://raw::file://{archive}", overwrite


def relink(link, target):
    link.unlink()
    link.symlink_to(target)


LOCAL = [
    "edited in place", "replaced by rename", "links of chunks", "link of a chunk's folder", "link of a level",
    "link of a volume", "link of a folder above",
]  # fmt: skip
ARCHIVES = ["link of an archive", "archive replaced", "archive written in place"]


@pytest.mark.parametrize("how", LOCAL + ARCHIVES)
def test_voxels_of_a_source_that_changed_are_decoded_again(pair, how, tmp_path, monkeypatch):
    address, act = change(pair, how, tmp_path)
    assert shown(address) == 1
    assert not decoded_again(address, monkeypatch)
    act()
    assert shown(address) == 2
    assert not decoded_again(address, monkeypatch)


@pytest.mark.parametrize("how", LOCAL + ARCHIVES)
def test_a_stamp_follows_the_files_of_an_open_reader(pair, how, tmp_path):
    address, act = change(pair, how, tmp_path)
    reader = ChunkReader(read_multiscale(parse_location(address)).finest)
    identity, stamp, files = reader.identity(), reader.stamp(*BOX), reader.stored()
    assert reader.read(*BOX).max() == 1
    assert (reader.identity(), reader.stamp(*BOX), reader.stored()) == (identity, stamp, files)
    assert len(files) == 2
    act()
    assert reader.read(*BOX).max() == 2, "what is read fits the new stamp"
    assert reader.stamp(*BOX) != stamp
    assert reader.stored() != files
    assert reader.stored().keys() == files.keys()


@pytest.mark.parametrize("how", ["link of a level", "link of a volume", "link of a folder above"])
def test_an_identity_has_no_links_in_it(pair, how, tmp_path):
    address, act = change(pair, how, tmp_path)
    before = ChunkReader(read_multiscale(parse_location(address)).finest).identity()
    act()
    assert ChunkReader(read_multiscale(parse_location(address)).finest).identity() != before


def test_folders_of_chunks_that_lead_round_in_a_circle(pair):
    (pair[0] / "s0/0/7").symlink_to("..")
    (pair[0] / "s0/c").symlink_to(".")
    reader = ChunkReader(read_multiscale(pair[0]).finest)
    assert {(0, 0, 0), (0, 0, 1)} <= reader.stored().keys()
    assert len(reader.stored()) < 100


def test_unchanged_chunks_keep_their_stamps(pair):
    """The stamp of a box depends on its chunks only."""
    reader = ChunkReader(read_multiscale(pair[0]).finest)
    boxes = [((0, 0, 0), (8, 8, 8)), ((0, 0, 8), (8, 8, 8)), ((0, 0, 4), (1, 1, 8))]
    before = [reader.stamp(*box) for box in boxes]
    (pair[0] / "s0/0/0/1").touch()
    after = [reader.stamp(*box) for box in boxes]
    assert [a == b for a, b in zip(after, before, strict=True)] == [True, False, False]


# ---------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("form", ["raw", "file://raw", "zip://raw::v.zip", "zip://raw::file://v.zip", "~/raw",
                                  "zip://raw::~/v.zip"])  # fmt: skip
def test_relative_paths_are_relative_to_the_folder_of_the_csv(pair, form, tmp_path, monkeypatch):
    for folder in pair:
        packed(folder, folder.parent / "v.zip")
    found = []
    for folder in pair:
        monkeypatch.chdir(folder.parent)
        monkeypatch.setenv("HOME", str(folder.parent))
        found.append(parse_location(form))
    monkeypatch.chdir(tmp_path)
    assert found[0] != found[1]
    assert [shown(place) if isinstance(place, Path) else value_of(place) for place in found] == [1, 2]
    monkeypatch.setenv("HOME", str(pair[0].parent))
    monkeypatch.chdir(pair[0].parent)
    assert shown(form) == 1
    monkeypatch.setenv("HOME", str(pair[1].parent))
    monkeypatch.chdir(pair[1].parent)
    assert shown(form) == 2


def value_of(place):
    return int(ChunkReader(read_multiscale(place).finest).read(*BOX).max())


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a/b", "{cwd}/a/b"), ("/a/../b", "/a/../b"), ("/a::b", "/a::b"), ("a::b", "{cwd}/a::b"),
        ("file:///a", "/a"), ("s3://bucket/a", "s3://bucket/a"),
        ("zip://x::a.zip", "zip://x::{cwd}/a.zip"), ("zip://x::zip://y.zip::b.zip", "zip://x::zip://y.zip::{cwd}/b.zip"),
        ("zip://x::s3://bucket/a.zip", "zip://x::s3://bucket/a.zip"), ("zip://::/a.zip", "zip://::/a.zip"),
        ("zip://crop/[mito,er]::~/a.zip", "zip://crop/[mito,er]::{home}/a.zip"),
    ],
)  # fmt: skip
def test_absolute(given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = expected.format(cwd=Path.cwd(), home=Path.home())
    assert absolute(given) == absolute(absolute(given)) == expected


def test_a_csv_of_splits_names_archives_by_their_absolute_path(pair, tmp_path, monkeypatch):
    packed(pair[0], tmp_path / "v.zip")
    monkeypatch.chdir(tmp_path)
    entries = {"train": [{"raw": "zip://raw::v.zip"}]}
    split = CellMapDataSplit(datasets=entries, input_arrays=SPEC, read=ReadOptions(cache="none"))
    split.write_csv("split.csv")
    split.close()
    assert f"zip://raw::{tmp_path}/v.zip" in Path("split.csv").read_text()


# ----------------------------------------------------------------------------------------------- archives


def open_files():
    gc.collect()
    folder = Path("/proc/self/fd")
    return [str(fd.readlink()) for fd in folder.iterdir() if fd.is_symlink()]


def test_the_listing_of_an_archive_that_was_replaced_is_closed(pair, tmp_path):
    for folder in pair:
        packed(folder, tmp_path / f"{folder.parent.name}.zip")
    for number in range(6):
        draft = tmp_path / "draft.zip"
        shutil.copy2(tmp_path / ("a.zip", "b.zip")[number % 2], draft)
        draft.replace(tmp_path / "v.zip")
        assert value_of(parse_location(f"zip://raw::{tmp_path}/v.zip")) == number % 2 + 1
    mine = [name for name in open_files() if str(tmp_path) in name]
    assert len(mine) <= 2, "one to list and one to read"
    assert not [name for name in mine if "deleted" in name]


def test_the_stamp_of_an_archive_is_that_of_its_file(pair, tmp_path):
    packed(pair[0], tmp_path / "v.zip")
    place = parse_location(f"zip://raw::{tmp_path}/v.zip")
    assert (place / "s0").archive == tmp_path / "v.zip"
    assert (place / "s0").archive_stamp() == file_stamp(str(tmp_path / "v.zip"))
    outer = parse_location(f"zip://raw::zip://inner.zip::{tmp_path}/v.zip")
    assert outer.archive_stamp() == place.archive_stamp()
    for other in ("s3://bucket/v.zip", "zip://raw::s3://bucket/v.zip"):
        assert parse_location(other).archive_stamp() == b""
    assert parse_location("zip://raw::s3://bucket/v.zip").archive == parse_location("s3://bucket/v.zip")
    assert parse_location("s3://bucket/v.zip").archive is None
