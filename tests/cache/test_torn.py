"""Region files that were torn by a power loss, moved, exchanged or are of another format: voxels are right."""

import itertools
import json
import logging
import os
import shutil
import sys

import numpy as np
import pytest

from cellmap_lightning.cache.mapped import EMPTY, FILLED, SYNCED
from cellmap_lightning.cache.shared_memory import FORMAT, RegionFolder
from tests.io.sources import (
    COUNT,
    PAGE,
    SHAPE,
    Source,
    edit,
    part_of,
    reboot,
    zeroed,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share voxels so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


def small(changed, depth=0):
    """A region of few pages, before and after a change of some chunks: the source and both contents of the file."""
    source = Source((8, 16, 32), (8, 16, 16), "uint16" if not depth else "uint8", depth)
    source.run()
    before = source.file.read_bytes()
    for index in changed:
        source.change(index)
    region, store = source.open()
    assert source.right(region)
    filled = source.file.read_bytes()
    store.close()
    after = source.file.read_bytes()
    return source, before, filled, after


@pytest.mark.parametrize("changed", [[(0, 0, 0)], [(0, 0, 1)], [(0, 0, 0), (0, 0, 1)]], ids=["first", "last", "both"])
@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("late", ["filled", "synced"])
@pytest.mark.parametrize("back", [False, True], ids=["new source", "old source"])
def test_pages_of_any_ages_after_a_power_loss(changed, depth, late, back):
    """Each page of a file is as it was before a chunk was replaced, or after: every mixture gives right voxels."""
    source, before, filled, synced = small(changed, depth)
    after = filled if late == "filled" else synced
    if back:  # a copy of the source with its times was put back
        for index in changed:
            source.change(index, back=True)
    pages = [n for n in range(1, len(after) // PAGE) if before[n * PAGE :][:PAGE] != after[n * PAGE :][:PAGE]]
    assert len(pages) >= (4 if late == "synced" else 5) - 1
    file = source.file
    for ages in itertools.product((before, after), repeat=len(pages)):
        content = bytearray(after)
        for page, content_of in zip(pages, ages, strict=True):
            content[page * PAGE : (page + 1) * PAGE] = content_of[page * PAGE : (page + 1) * PAGE]
        reboot(content)
        file.write_bytes(content)
        region, store = source.open()
        assert source.right(region), [n for n, old in zip(pages, ages, strict=True) if old is before]
        store.close()


@pytest.mark.parametrize("lost", ["voxels", "stamps", "checksums"])
def test_pages_that_never_reached_the_disk(lost):
    """The flags did, as those of synced chunks: of a file system that writes in another order, or a disk that lies."""
    source = Source()
    source.run()
    at, size = part_of(source.layout, lost)
    for first in range(at, at + size, PAGE):
        content = bytearray(source.file.read_bytes())
        zeroed(content, first, min(PAGE, at + size - first))
        reboot(content)
        source.file.write_bytes(content)
        assert source.run() >= 1
        assert source.run() == 0


def test_data_is_flushed_before_it_is_marked_as_synced():
    source = Source()
    region, store = source.open()
    assert source.right(region)
    mapped = region.attached()
    log, buffer = [], mapped._buffer

    class Watched:
        def flush(self, *args):
            log.append((args, mapped.flags.max()))
            buffer.flush(*args)

    mapped._buffer = Watched()
    mapped.sync()
    assert [flag for _, flag in log] == [FILLED, SYNCED]
    assert log[0][0] == (), "everything, before the flags say so"
    mapped._buffer = buffer
    store.close()


def test_a_chunk_that_is_replaced_during_a_sync(monkeypatch):
    """The flag may say synced although another process is writing: the checksum tells."""
    source = Source()
    region, store = source.open()
    assert source.right(region)
    mapped = region.attached()
    mapped.voxels[0, 0, 0] ^= 0xFF  # half written, by a process that was killed
    store.close()
    assert mapped.flags[0, 0, 0] == SYNCED
    assert source.run() == 1


def test_disk_that_fails_to_flush(caplog):
    source = Source()
    region, store = source.open()
    assert source.right(region)
    mapped = region.attached()

    class Broken:
        def flush(self, *args):
            raise OSError(5, "Input/output error")

    mapped._buffer = Broken()
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        store.close()
    assert (mapped.flags == FILLED).all()
    (record,) = caplog.records
    assert "Input/output error" in record.getMessage()


# -- files that were moved, exchanged or are of another version


@pytest.mark.parametrize(("how", "closed", "decoded"), [
    ("renamed", True, 0), ("renamed", False, 0), ("linked", True, 0), ("linked", False, 0),
    ("copied", True, 0), ("copied", False, COUNT),
])  # fmt: skip
def test_a_cache_folder_that_was_moved(how, closed, decoded, tmp_path, monkeypatch):
    """A copy is another file: what was not on disk does not count, and no space is reserved there."""
    source = Source()
    region, store = source.open()
    assert source.right(region)
    if closed:
        store.close()
    old, new = tmp_path / "cache", tmp_path / "other"
    if how == "renamed":
        old.rename(new)
    elif how == "linked":
        new.symlink_to(old)
    else:
        shutil.copytree(old, new)
        shutil.copystat(old, new)
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(new))
    mapped = source.open()[0].attached()
    assert (mapped._reserved != 0).all() == (how != "copied")
    assert source.run() == decoded
    assert source.run() == 0
    store.close()


@pytest.mark.parametrize("during", [False, True], ids=["between runs", "while it is mapped"])
@pytest.mark.parametrize("shape", [SHAPE, (20, 24, 20)], ids=["same layout", "another layout"])
def test_a_file_that_was_exchanged_for_that_of_another_region(during, shape):
    one, two = Source(key="a"), Source(shape, key="b")
    two.data ^= 0x11
    region, store = one.open()
    region.read_into((0, 0, 0), np.empty((10, 24, 40), np.uint16))
    two.run()
    if not during:
        store.close()
    two.file.rename(one.file)
    if during:
        assert one.right(region)
        store.close()
    assert one.run() == COUNT
    assert one.run() == 0


def test_no_space_is_reserved_in_another_file(caplog):
    """Writing to pages without space ends the process when the disk is full."""
    source = Source()
    region, store = source.open()
    region.attached()
    file = source.file
    file.unlink()
    file.write_bytes(b"another file")
    file.chmod(0o600)
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        assert source.right(region)
    assert file.read_bytes() == b"another file"
    store.close()


@pytest.mark.parametrize("byte", [0, 1, 2, 0x5A, 0xFF])
def test_damaged_record_of_reserved_space(byte, monkeypatch):
    """Space is reserved again before anything is written there."""
    source = Source()
    region, store = source.open()
    region.read_into((0, 0, 0), np.empty((10, 24, 40), np.uint16))
    store.close()
    at, size = part_of(source.layout, "reserved")
    edit(source.file, lambda content: content.__setitem__(slice(at, at + size), bytes([byte] * size)))
    region, store = source.open()
    mapped, asked, reserve = region.attached(), [], os.posix_fallocate
    monkeypatch.setattr(os, "posix_fallocate", lambda fd, *area: asked.append(area) or reserve(fd, *area))
    assert source.right(region)
    half = source.layout.room[1] * source.layout.room[2] * 2 * 10
    assert asked == [(source.layout.parts.voxels + half, half)], "the other plane of chunks is there"
    assert (mapped._reserved == [byte, 0xA5]).all()
    store.close()


@pytest.mark.parametrize("name", ["earlier", "same"])
def test_files_of_an_earlier_format(name):
    """Their names are others; if one had the name of a new one, it would be replaced. They are evicted like others."""
    assert FORMAT == 2
    source = Source()
    source.run()
    file = source.file
    head = json.loads(file.read_bytes()[:PAGE].rstrip(b"\0")) | {"format": 1}
    stem = file.stem if name == "same" else f"{7:040x}"
    earlier = file.with_name(f"{stem}.region")
    content = bytearray(file.read_bytes())
    content[:PAGE] = json.dumps(head | {"key": stem}).encode().ljust(PAGE, b"\0")
    earlier.write_bytes(content)
    earlier.chmod(0o600)
    if name == "same":
        assert source.run() == COUNT
    else:
        folder = RegionFolder(file.parent)
        os.utime(earlier, (1000, 1000))
        assert folder.evict(1, set()) > 0
        assert not earlier.exists()
        assert file.exists()


@pytest.mark.parametrize("name", ["notes.region", "0123.region", f"{'g' * 40}.region", f"{1:040x}.region"])
def test_foreign_files_are_not_evicted(name, cache_dir):
    """A folder with such a name, or a foreign file."""
    source = Source()
    source.run()
    folder = RegionFolder(source.file.parent)
    stray = folder.folder / name
    if name.startswith("0" * 30):
        stray.mkdir()
    else:
        stray.write_text("mine")
    assert [path.name for path, _, _ in folder.files()] == [source.file.name]
    folder.evict(10**9, set())
    assert stray.exists()
    assert [path.name for path in folder.folder.glob("*.region")] == [name]


@pytest.mark.parametrize("mode", ["disk", "memory"])
def test_a_stamp_belongs_to_its_voxels(mode):
    """Stamps and checksums of neighbours are no chunk's own, even where voxels are the same."""
    source = Source()
    source.data[...] = 9
    region, store = source.open(mode)
    assert source.right(region)
    mapped = region.attached()
    assert len(np.unique(mapped.checksums)) == COUNT
    mapped.flags[0, 0, 0] = EMPTY
    store.close()
