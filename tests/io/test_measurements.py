"""Cached measurements of arrays: repeated when the source has changed, and only then.

The same for each measurement: counts, statistics, foreground indices, and the values of labels.
"""

import base64
import logging
import os
import shutil
import threading
from contextlib import closing

import numpy as np
import pytest

from cellmap_lightning.crops import counts
from cellmap_lightning.crops.class_index import foreground_index
from cellmap_lightning.inspection.cached_files import clear, listing
from cellmap_lightning.io import declared_counts, records, statistics
from cellmap_lightning.io.label_values import label_values
from cellmap_lightning.io.ngff import Encoding, read_multiscale
from cellmap_lightning.io.store import Remote, parse_location
from cellmap_lightning.io.writer import ArrayOptions, write_multiscale
from cellmap_lightning.runtime.thread_pool import ReadPool
from tests.io.changes import as_links, chunk_files, edit_in_place, packed, rename_over, retarget_chunks

CODE = Encoding(0, None)
SHAPE = (8, 8, 16)


def count(image):
    with closing(ReadPool(2)) as pool:
        return counts.foreground(image, CODE, pool, "crop1/mito")


def mean(image):
    return statistics.statistics(image).mean


def index(image):
    with closing(ReadPool(2)) as pool:
        return tuple(foreground_index([image.finest], CODE, pool, "crop1/mito").voxels[0].tolist())


def values(image):
    return str(label_values(image.finest, "crop1/mito"))


def not_absent(image):
    elsewhere = isinstance(image.path, Remote)
    files = (
        declared_counts._remote_files(image.finest, True, True) if elsewhere else declared_counts._files(image.finest)
    )
    files = list(files)
    return declared_counts._count(image.finest, files, CODE, "crop1/mito", declared_counts.DEFAULT_RETRY)


MEASUREMENTS = {"count": count, "statistics": mean, "index": index, "values": values, "not absent": not_absent}
#: What is measured of the first array, and of the second.
EXPECTED = {
    "count": (1, 3),
    "statistics": (2.0, 1.0),
    "index": ((0, 0, 9), (7, 7, 9)),
    "values": ("0 and other ids", "0 and 1"),
    "not absent": (1, 3),
}


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Use a separate cache folder for each test, and clear the cache in memory."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(statistics, "_known", {})
    monkeypatch.setattr(records, "_reported", set())
    return tmp_path / "cache"


@pytest.fixture(params=list(MEASUREMENTS))
def name(request):
    return request.param


def contents():
    first, second = np.zeros((2, *SHAPE), np.uint8)
    first[0, 0, 9] = 2
    second[7, 7, 9:12] = 1
    return first, second


@pytest.fixture
def pair(tmp_path):
    """Two images that differ in the content of their chunks alone, with equal sizes and times of all files."""
    paths = []
    for folder, data in zip(("a", "b"), contents(), strict=True):
        path = tmp_path / folder / "mito"
        write_multiscale(
            path, data, scale=(8, 8, 8), translation=(0, 0, 0), storage=ArrayOptions(chunks=(8, 8, 8), compressor=None)
        )
        paths.append(path)
    return paths


def test_the_pair_differs_in_content_alone(pair):
    a, b = (chunk_files(path / "s0") for path in pair)
    assert a == b
    assert len(a) == 1
    assert (pair[0] / "s0/.zarray").read_bytes() == (pair[1] / "s0/.zarray").read_bytes()


def of(path):
    return read_multiscale(parse_location(path))


@pytest.fixture
def measured(monkeypatch):
    """Number of boxes that were read from chunks."""
    from cellmap_lightning.io.chunks import ChunkReader

    read, calls = ChunkReader.read, []

    def counted(self, *args, **kwargs):
        calls.append(self.level.path)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(ChunkReader, "read", counted)
    return calls


def test_measurements_are_cached(pair, name, measured, monkeypatch):
    for path, expected in zip(pair, EXPECTED[name], strict=True):
        assert MEASUREMENTS[name](of(path)) == expected
    assert measured
    measured.clear()
    monkeypatch.setattr(statistics, "_known", {})
    for path, expected in zip(pair, EXPECTED[name], strict=True):
        assert MEASUREMENTS[name](of(path)) == expected
    assert not measured


def link_store(array, content):
    retarget_chunks(array, content)


def link_level(array, content):
    array.unlink()
    array.symlink_to(content)


def link_volume(array, content):
    array.parent.unlink()
    array.parent.symlink_to(content.parent)


def prepare(pair, how, tmp_path):
    """Return the path to open, and a change of what it leads to."""
    path, other = pair
    if how is link_store:
        as_links(path / "s0", tmp_path / "annex")
    elif how is link_level:
        (path / "s0").replace(tmp_path / "s0_v1")
        (path / "s0").symlink_to(tmp_path / "s0_v1")
    elif how is link_volume:
        path = tmp_path / "current" / "mito"
        path.parent.mkdir()
        path.symlink_to(pair[0])
        return path, lambda: (path.unlink(), path.symlink_to(other))
    return path, lambda: how(path / "s0", other / "s0")


CHANGES = [edit_in_place, rename_over, link_store, link_level, link_volume]


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("process", ["same", "next"])
def test_a_change_of_the_source_is_noticed(pair, name, how, process, tmp_path, monkeypatch, caplog):
    path, change = prepare(pair, how, tmp_path)
    assert MEASUREMENTS[name](of(path)) == EXPECTED[name][0]
    change()
    if process == "next":
        monkeypatch.setattr(statistics, "_known", {})
    with caplog.at_level(logging.WARNING):
        assert MEASUREMENTS[name](of(path)) == EXPECTED[name][1]
    assert not caplog.messages, "a stale record is no fault"


def test_a_chunk_that_is_added_or_removed_is_noticed(tmp_path, name, pair):
    path = pair[0]
    (file,) = chunk_files(path / "s0")
    (path / "s0" / file).replace(tmp_path / "gone")
    empty = {"count": 0, "values": "0", "not absent": 0}
    if name in empty:
        assert MEASUREMENTS[name](of(path)) == empty[name]
    (tmp_path / "gone").replace(path / "s0" / file)
    assert MEASUREMENTS[name](of(path)) == EXPECTED[name][0]


@pytest.mark.parametrize("how", ["replaced", "written in place", "link retargeted"])
@pytest.mark.parametrize("process", ["same", "next"])
def test_an_archive_that_changes_is_noticed(pair, name, how, process, tmp_path, monkeypatch):
    archives = [tmp_path / "a.zip", tmp_path / "b.zip"]
    for path, archive in zip(pair, archives, strict=True):
        packed(path, archive)
    assert archives[0].stat().st_size == archives[1].stat().st_size
    given = tmp_path / "given.zip"
    if how == "link retargeted":
        given.symlink_to(archives[0])
    else:
        shutil.copy2(archives[0], given)
    address = f"zip://mito::{given}"
    assert MEASUREMENTS[name](of(address)) == EXPECTED[name][0]
    if how == "link retargeted":
        given.unlink()
        given.symlink_to(archives[1])
    elif how == "replaced":
        archives[1].replace(given)
    else:
        given.write_bytes(archives[1].read_bytes())
        os.utime(given, ns=(10**18, 10**18))
    if process == "next":
        monkeypatch.setattr(statistics, "_known", {})
    assert MEASUREMENTS[name](of(address)) == EXPECTED[name][1]


def only_record(folder):
    (path,) = records.records(folder)
    return path


def resealed(text, change):
    content = records.unsealed(text)
    change(content)
    return records.sealed(content).encode()


def wrong_types(content):
    content["measured"] = {key: [[]] for key in content["measured"]}


def no_values(content):
    content["measured"] = {}


def wrong_container(content):
    content["measured"], content["stamp"] = [], 3


def another_version(content):
    content["format"] = 1


DAMAGE = {
    "empty object": lambda data, other: b"{}",
    "empty": lambda data, other: b"",
    "cut": lambda data, other: data[: len(data) // 2],
    "last byte lost": lambda data, other: data[:-1],
    "zeroed": lambda data, other: bytes(len(data)),
    "zeroed at the end": lambda data, other: data[:-10] + bytes(10),
    "flipped": lambda data, other: data.replace(b'"of"', b'"oF"'),
    "bit flipped": lambda data, other: data[:-30] + bytes([data[-30] ^ 0x10]) + data[-29:],
    "no text": lambda data, other: b"\xff\xfe" + data,
    "list": lambda data, other: b"[]",
    "of another array": lambda data, other: other,
    "wrong types": lambda data, other: resealed(data.decode(), wrong_types),
    "no values": lambda data, other: resealed(data.decode(), no_values),
    "wrong container": lambda data, other: resealed(data.decode(), wrong_container),
    "another version": lambda data, other: resealed(data.decode(), another_version),
}


@pytest.mark.parametrize("damage", list(DAMAGE))
def test_a_damaged_record_is_replaced_with_one_warning(pair, name, damage, own_folder, monkeypatch, caplog, measured):
    assert MEASUREMENTS[name](of(pair[1])) == EXPECTED[name][1]
    other = only_record(own_folder).read_bytes()
    clear()
    monkeypatch.setattr(statistics, "_known", {})
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    record = only_record(own_folder)
    record.write_bytes(DAMAGE[damage](record.read_bytes(), other))
    assert "MB" in listing()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            monkeypatch.setattr(statistics, "_known", {})
            measured.clear()
            assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    assert not measured, "the second time the new record is found"
    assert len(caplog.messages) == 1
    assert str(record) in caplog.text
    assert records.unsealed(record.read_text())["measured"]


def known(image):
    """Return the cached result of a measurement, without reading chunks."""
    return counts.known_foreground(image, image.finest, CODE), statistics.known_statistics(image)


@pytest.mark.parametrize("damage", ["empty", "cut", "zeroed"])
def test_damage_is_reported_once_until_the_record_is_replaced(pair, damage, own_folder, monkeypatch, caplog):
    assert count(of(pair[0])) == EXPECTED["count"][0]
    record = only_record(own_folder)
    for times in (1, 2):
        record.write_bytes(DAMAGE[damage](record.read_bytes(), b""))
        with caplog.at_level(logging.WARNING):
            assert known(of(pair[0])) == known(of(pair[0])) == (None, None)
            assert count(of(pair[0])) == known(of(pair[0]))[0] == EXPECTED["count"][0]
        assert len(caplog.messages) == times


def packed_as(dtype, values):
    return base64.b64encode(np.array(values, dtype).tobytes()).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"counts": packed_as(np.int64, [1, 1])}, {"kept": packed_as(np.int64, [2])},
        {"kept": packed_as(np.int64, [0])}, {"counts": packed_as(np.int64, [0])},
        {"voxels": packed_as(np.int32, [0, 0, 16])}, {"voxels": packed_as(np.int32, [-1, 0, 0])},
        {"voxels": packed_as(np.int32, [0, 0])}, {"voxels": "no base64"},
    ],
)  # fmt: skip
def test_an_index_that_cannot_be_one_of_its_array(pair, part, own_folder, caplog):
    assert index(of(pair[0])) == EXPECTED["index"][0]
    record = only_record(own_folder)
    record.write_bytes(resealed(record.read_text(), lambda content: content["measured"].update(part)))
    with caplog.at_level(logging.WARNING):
        assert index(of(pair[0])) == EXPECTED["index"][0]
    assert "not those of index" in caplog.text


@pytest.mark.parametrize(
    "part", [{"mean": float("nan")}, {"quantiles": [1.0]}, {"quantiles": [float("inf")] * 1001}, {"std": "much"}]
)
def test_statistics_that_cannot_be_some(pair, part, own_folder, monkeypatch, caplog):
    assert mean(of(pair[0])) == EXPECTED["statistics"][0]
    record = only_record(own_folder)
    record.write_bytes(resealed(record.read_text(), lambda content: content["measured"].update(part)))
    monkeypatch.setattr(statistics, "_known", {})
    with caplog.at_level(logging.WARNING):
        assert mean(of(pair[0])) == EXPECTED["statistics"][0]
    assert "not those of statistics" in caplog.text


@pytest.mark.parametrize("what", ["folder", "full folder", "fifo", "link", "dead link"])
def test_something_else_in_the_place_of_a_record(pair, name, what, own_folder, monkeypatch, caplog, measured, tmp_path):
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    record = only_record(own_folder)
    text = record.read_text()
    record.unlink()
    if what.endswith("folder"):
        record.mkdir()
        if what == "full folder":
            (record / "mine").write_text("kept")
    elif what == "fifo":
        os.mkfifo(record)
    else:
        foreign = tmp_path / "foreign"
        if what == "link":
            foreign.write_text(text)
        record.symlink_to(foreign)
    assert listing()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            monkeypatch.setattr(statistics, "_known", {})
            measured.clear()
            assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    assert not measured
    assert len(caplog.messages) == 1
    assert record.is_file()
    assert not record.is_symlink()
    if what == "full folder":
        assert [p.read_text() for p in own_folder.rglob("mine")] == ["kept"], "files of others are never removed"
    else:
        assert [p.name for p in own_folder.iterdir()] == [record.name]


def test_drafts_of_killed_processes(pair, name, own_folder, monkeypatch):
    """They are never read, and removed when they are old; those of running processes stay."""
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    record = only_record(own_folder)
    old, new = (own_folder / f".{record.stem}.{end}" for end in ("17.9.draft", "18.draft"))
    for draft in (old, new):
        draft.write_bytes(record.read_bytes()[:40])
    os.utime(old, (1, 1))
    monkeypatch.setattr(statistics, "_known", {})
    monkeypatch.setattr(records, "_swept", set())
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    edit_in_place(pair[0] / "s0", pair[1] / "s0")
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][1]
    assert not old.exists()
    assert new.exists()
    os.utime(new, (1, 1))
    clear()
    assert not list(own_folder.iterdir())


def test_two_threads_measure_at_once(pair, name, own_folder, caplog):
    barrier = threading.Barrier(4)
    found = []

    def work(path):
        barrier.wait()
        found.append((path, MEASUREMENTS[name](of(path))))

    threads = [threading.Thread(target=work, args=(path,)) for path in (*pair, *pair)]
    with caplog.at_level(logging.WARNING):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert dict(found) == dict(zip(pair, EXPECTED[name], strict=True))
    assert len(found) == 4
    assert not caplog.messages
    assert len(list(own_folder.iterdir())) == 2
    assert all(records.unsealed(path.read_text()) for path in own_folder.iterdir())


@pytest.mark.parametrize("what", ["cache", "volume", "both"])
def test_folders_that_are_moved(pair, name, what, own_folder, tmp_path, monkeypatch, measured):
    """The cache stays valid; a volume at another path is measured again."""
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    monkeypatch.setattr(statistics, "_known", {})
    measured.clear()
    path = pair[0]
    if what != "volume":
        own_folder.replace(tmp_path / "moved")
        monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "moved"))
    if what != "cache":
        path.replace(tmp_path / "elsewhere")
        pair[1].replace(path)
        assert MEASUREMENTS[name](of(path)) == EXPECTED[name][1], "another volume in the old place"
        path = tmp_path / "elsewhere"
    assert MEASUREMENTS[name](of(path)) == EXPECTED[name][0]
    assert bool(measured) == (what != "cache")


def test_a_record_that_would_be_too_large(pair, name, own_folder, monkeypatch):
    """Neither written nor read."""
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    monkeypatch.setattr(statistics, "_known", {})
    monkeypatch.setattr(records, "MOST_BYTES", 100)
    record = only_record(own_folder)
    before = record.stat().st_mtime_ns
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][0]
    assert record.stat().st_mtime_ns == before
    edit_in_place(pair[0] / "s0", pair[1] / "s0")
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][1]


def test_chunks_written_during_a_measurement_invalidate_it(pair, name, monkeypatch):
    from cellmap_lightning.io.chunks import ChunkReader

    read = ChunkReader.read

    def overtaken(self, *args, **kwargs):
        found = read(self, *args, **kwargs)
        edit_in_place(pair[0] / "s0", pair[1] / "s0")
        return found

    with monkeypatch.context() as patch:
        patch.setattr(ChunkReader, "read", overtaken)
        MEASUREMENTS[name](of(pair[0]))
    assert MEASUREMENTS[name](of(pair[0])) == EXPECTED[name][1]
