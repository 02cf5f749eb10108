"""Region files that were damaged: voxels are those of the source, and what was damaged is repaired."""

import logging
import sys

import pytest

from cellmap_lightning.cache.shared_memory import RegionFolder
from tests.io.sources import (
    COUNT,
    PAGE,
    Source,
    edit,
    flipped,
    one_bit,
    ones,
    part_of,
    random_bytes,
    rolled,
    zeroed,
)

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes share voxels so on Linux only"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]


PARTS = ["flags", "stamps", "checksums", "reserved", "voxels"]
CHANGES = [flipped, zeroed, one_bit, ones, random_bytes, rolled]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize(("dtype", "depth"), [("uint8", 0), ("uint16", 0), ("float32", 0), ("uint8", 2)])
def test_damage_of_any_part_is_detected(part, change, dtype, depth):
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
def test_truncated_copy_of_a_file(done):
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


def test_verified_chunks_are_not_checked_again():
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
