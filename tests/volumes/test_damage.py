"""Region files that were damaged, torn by a power loss, moved or exchanged: voxels are those of the source."""

import itertools
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.volumes.chunk_cache import ChunkCache
from cellmap_lightning.volumes.mapped import EMPTY, FILLED, SYNCED
from cellmap_lightning.volumes.region import Region, RegionStore
from cellmap_lightning.volumes.shared import FORMAT, RegionFolder

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share voxels so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
SHAPE, CHUNKS = (20, 24, 40), (10, 12, 20)
COUNT = 8
PAGE = 4096


@pytest.fixture(autouse=True)
def cache_dir(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("CELLMAP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Source:
    """An array in memory, and the version of each of its chunks, which a stamp is made of."""

    def __init__(self, shape=SHAPE, chunks=CHUNKS, dtype="uint16", depth=0, key="a"):
        self.chunks, self.depth, self.key = chunks, depth, key
        self.versions = np.zeros([-(-n // c) for n, c in zip(shape, chunks, strict=True)], int)
        kind = np.dtype(dtype)
        # No byte is 0, so that zeros are never right.
        content = np.random.default_rng(1).integers(1, 256, np.prod(shape) * max(1, depth) * kind.itemsize, np.uint8)
        self.data = content.view(kind).reshape(*shape, *([depth] if depth else []))
        self.decoded = []

    def change(self, index, back=False):
        """Write other voxels, or the first ones."""
        place = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, self.chunks, strict=True))
        self.data[place] ^= 0x54
        self.versions[index] += -1 if back else 1

    def decode(self, start, shape):
        self.decoded.append(start)
        return self.data[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]

    def stamp(self, start, shape):
        return 1 + int(self.versions[tuple(a // c for a, c in zip(start, self.chunks, strict=True))])

    def open(self, mode="disk"):
        """The region as a new process finds it, planned, and the store."""
        self.decoded.clear()
        region = Region(
            self.data.shape[:3], self.chunks, self.data.dtype, self.decode, ChunkCache(), self.key, depth=self.depth,
            stamp=self.stamp, identity=lambda: ("damage", self.key), name=f"array {self.key}",
        )  # fmt: skip
        store = RegionStore(mode)
        store.plan([region], False, "test")
        return region, store

    def right(self, region):
        """Whether a region holds what is stored, read in two parts so that what was filled is read as well."""
        found = np.empty_like(self.data)
        half = len(found) // 2
        region.read_into((0, 0, 0), found[:half])
        region.read_into((half, 0, 0), found[half:])
        first = found.tobytes()
        region.read_into((0, 0, 0), found)
        return first == found.tobytes() == self.data.tobytes()

    def run(self):
        """Read everything as a run does, and close; returns how many chunks were decoded."""
        region, store = self.open()
        assert self.right(region)
        count = store.decoded
        assert count == len(self.decoded)
        store.close()
        return count

    @property
    def file(self):
        (file,) = Path(os.environ["CELLMAP_CACHE_DIR"]).rglob(f"{self.open('none')[0].digest()}.region")
        return file

    @property
    def layout(self):
        return self.open("none")[0].layout


def part_of(layout, name):
    """First byte of a part of a region file, and how many bytes are in use there."""
    sizes = {"flags": COUNT, "stamps": 8 * COUNT, "checksums": 4 * COUNT, "reserved": layout.grid[0]}
    return getattr(layout.parts, name), sizes.get(name, layout.nbytes - layout.parts.voxels)


def edit(file, change):
    """Change the bytes of a file in place; it may have another size afterwards."""
    content = bytearray(file.read_bytes())
    changed = change(content)
    content = content if changed is None else changed
    with file.open("r+b") as out:
        out.write(content)
        out.truncate()


def flipped(content, at, size):
    content[at : at + size] = bytes(b ^ 0x5A for b in content[at : at + size])


def zeroed(content, at, size):
    content[at : at + size] = bytes(size)


def one_bit(content, at, size):
    content[at + size // 2] ^= 0x10


def ones(content, at, size):
    content[at : at + size] = b"\1" * size


def random_bytes(content, at, size):
    content[at : at + size] = np.random.default_rng(size).bytes(size)


def rolled(content, at, size):
    """The bytes of neighbours."""
    content[at : at + size] = content[at + 1 : at + size] + content[at : at + 1]


PARTS = ["flags", "stamps", "checksums", "reserved", "voxels"]
CHANGES = [flipped, zeroed, one_bit, ones, random_bytes, rolled]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("dtype", "depth"), [("uint8", 0), ("uint16", 0), ("float32", 0), ("uint8", 2)])
def test_any_part_that_is_damaged_is_noticed(part, change, dtype, depth):
    source = Source(dtype=dtype, depth=depth)
    assert source.run() == COUNT
    at, size = part_of(source.layout, part)
    edit(source.file, lambda content: change(content, at, size))
    source.run()
    assert source.run() == 0, "it was repaired"


@pytest.mark.parametrize("change", [flipped, zeroed, one_bit])
@pytest.mark.parametrize("synced", [True, False], ids=["synced", "filled"])
def test_a_damaged_chunk_is_decoded_again_and_reported_once(change, synced, caplog):
    source = Source()
    source.run()
    layout = source.layout
    plane = layout.room[1] * layout.room[2] * 2
    edit(source.file, lambda content: change(content, layout.parts.voxels + 3 * plane, 20))  # chunk 0, 0, 0
    if not synced:
        edit(source.file, lambda content: ones(content, layout.parts.flags, COUNT))
    region, store = source.open()
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        assert source.right(region)
    assert source.decoded == [(0, 0, 0)]
    (record,) = caplog.records
    assert record.getMessage().startswith("array a: chunk (0, 0, 0) is damaged in ")
    assert str(source.file) in record.getMessage()
    store.close()


def test_many_damaged_chunks_are_a_few_lines(caplog):
    source = Source()
    source.run()
    at, size = part_of(source.layout, "checksums")
    edit(source.file, lambda content: flipped(content, at, size))
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        assert source.run() == COUNT
    assert [r.getMessage().split(" so far")[0].split("(")[-1] for r in caplog.records] == ["1", "2", "4", "8"]


@pytest.mark.parametrize("flag", [2 << 3, 3, 7, 255])
def test_garbage_among_the_flags_is_an_empty_chunk(flag, caplog):
    source = Source()
    source.run()
    at, _ = part_of(source.layout, "flags")
    edit(source.file, lambda content: content.__setitem__(at + 5, flag))
    with caplog.at_level(logging.WARNING, "cellmap_lightning"):
        assert source.run() == 1
    assert not caplog.records


@pytest.mark.parametrize("page", range(12))
@pytest.mark.parametrize("content", [b"\0", b"\1", b"\2", b"\xff"])
def test_any_page_may_be_lost(page, content):
    source = Source()
    source.run()
    assert source.layout.nbytes >= 12 * PAGE
    edit(source.file, lambda found: found.__setitem__(slice(page * PAGE, (page + 1) * PAGE), content * PAGE))
    source.run()
    assert source.run() == 0


@pytest.mark.parametrize("size", [0, 1, PAGE, 3 * PAGE, 6 * PAGE + 100, -1, -PAGE, PAGE * 100])
def test_a_file_of_another_size(size):
    source = Source()
    source.run()
    whole = source.layout.nbytes
    edit(source.file, lambda content: content.ljust(size, b"\0")[: size if size >= 0 else whole + size])
    assert source.run() == COUNT
    assert source.run() == 0


@pytest.mark.parametrize("done", [0.1, 0.3, 0.5, 0.9])
def test_a_file_of_which_a_copy_was_cut_short(done):
    """The rest are zeros, as after a copy that has reserved its space first."""
    source = Source()
    source.run()
    edit(source.file, lambda content: zeroed(content, int(done * len(content)), int((1 - done) * len(content))))
    source.run()
    assert source.run() == 0


@pytest.mark.parametrize("text", [b"[" * PAGE, b'{"boot":' * 500, b'{"boot": 1}', b"\xff" * PAGE, b"9" * PAGE, b"null"])
def test_a_header_that_is_no_header(text):
    source = Source()
    source.run()
    edit(source.file, lambda content: content.__setitem__(slice(0, PAGE), text.ljust(PAGE, b"\0")))
    assert RegionFolder(source.file.parent).name(source.file) == ""
    source.run()
    assert source.run() == 0


@pytest.mark.parametrize("at", range(0, 300, 7))
def test_a_flipped_byte_of_the_header(at):
    source = Source()
    source.run()
    edit(source.file, lambda content: content.__setitem__(at, content[at] ^ 0x01))
    source.run()
    assert source.run() == 0


# -- chunks that are damaged while other processes use them


def test_a_chunk_that_another_process_repairs_is_decoded_once():
    """Both have seen the damage; the second one finds the chunk whole under its lock."""
    source = Source()
    source.run()
    at, _ = part_of(source.layout, "voxels")
    edit(source.file, lambda content: flipped(content, at, 10))
    (one, first), (two, second) = source.open(), source.open()
    mapped = two.attached()
    intact, seen = mapped._intact, []

    def see(*args):
        found = intact(*args)
        if not seen:
            seen.append(found)
            assert source.right(one)
        return found

    mapped._intact = see
    assert source.right(two)
    assert seen == [False]
    assert source.decoded == [(0, 0, 0)]
    first.close()
    second.close()


def test_what_a_process_has_filled_or_checked_is_not_checked_again():
    """Not for each patch: the second pass over a region costs what it did without checksums."""
    source = Source()
    region, store = source.open()
    checked = []
    region.attached()._intact = lambda *args: checked.append(args) or True
    assert source.right(region)
    assert checked == []
    store.close()
    region, store = source.open()
    intact = region.attached()._intact
    region.attached()._intact = lambda *args: checked.append(args) or intact(*args)
    for _ in range(3):
        assert source.right(region)
    assert len(checked) == COUNT
    store.close()


# -- power loss


def reboot(content):
    """The header as a machine finds it after a restart."""
    known = json.loads(bytes(content[:PAGE]).rstrip(b"\0"))
    content[:PAGE] = json.dumps(known | {"boot": "an earlier one"}).encode().ljust(PAGE, b"\0")


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


def test_data_is_flushed_before_what_counts_as_synced():
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


def test_a_disk_that_does_not_take_what_is_flushed(caplog):
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
def test_damaged_notes_of_reserved_space(byte, monkeypatch):
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
def test_what_is_no_region_file_is_not_evicted(name, cache_dir):
    """A folder with such a name, or a file of somebody else."""
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
