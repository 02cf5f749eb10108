"""Boxes of arrays read as arrays: voxels, files, stamps and identities."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from cellmap_lightning.io.chunk_files import array_identity, location_of
from cellmap_lightning.io.ngff import complement_counts, read_multiscale
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.writer import ArrayOptions, write_group, write_multiscale

START, SHAPE = (5, 8, 20), (20, 10, 7)
BOX = tuple(slice(a, a + n) for a, n in zip(START, SHAPE, strict=True))


@pytest.fixture(scope="module", params=[2, 3])
def image(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("v") / "a.zarr"
    write_group(root, zarr_format=request.param)
    stored = np.arange(30 * 24 * 28, dtype=np.uint16).reshape(30, 24, 28)
    attributes = {"cellmap": {"annotation": {"complement_counts": {"absent": 1, "unknown": 2}}}}
    write_multiscale(
        root / "a", stored, scale=(8, 4, 4), translation=(100, 0, 0), levels=1,
        storage=ArrayOptions(chunks=(8, 8, 8), zarr_format=request.param), mode="mode", attributes=attributes,
    )  # fmt: skip
    return read_multiscale(root / "a")


def voxels(image):
    reader = open_reader(image.finest)
    return reader.read((0, 0, 0), reader.shape)


def test_voxels_and_lattice_are_those_of_the_box(image):
    part = image.finest.part(START, SHAPE)
    reader = open_reader(part)
    assert reader.shape == SHAPE
    assert reader.chunks == (8, 8, 8)
    np.testing.assert_array_equal(reader.read((0, 0, 0), SHAPE), voxels(image)[BOX])
    np.testing.assert_array_equal(reader.read((3, 1, 2), (4, 5, 5)), voxels(image)[8:12, 9:14, 22:27])
    assert part.lattice.origin == (140, 32, 80)
    assert part.lattice.shape == SHAPE


def test_chunks_of_the_files_cover_the_box_once(image):
    reader = open_reader(image.finest.part(START, SHAPE))
    seen = np.zeros(SHAPE, int)
    assert len(reader.stored()) == len(list(reader.files((0, 0, 0), SHAPE))) == 4 * 2 * 2
    for file in reader.stored():
        for start, shape in reader.chunks_of(file):
            seen[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))] += 1
    assert (seen == 1).all()


def test_files_lie_at_their_place_in_the_box(image):
    reader = open_reader(image.finest.part(START, SHAPE))
    seen = np.zeros(SHAPE, int)
    for index in reader.files((0, 0, 0), SHAPE):
        assert reader.file_start(index) == tuple(8 * i - a for i, a in zip(index, START, strict=True))
        start, shape = reader.common(index, (0, 0, 0), SHAPE)
        seen[tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))] += 1
    assert (seen == 1).all()


def test_boxes_of_one_array_differ_in_identity(image):
    levels = [image.finest, *(image.finest.part(START, shape) for shape in (SHAPE, (20, 10, 6)))]
    assert len({array_identity(level) for level in levels}) == 3
    assert len({location_of(level) for level in levels}) == 3
    assert len({open_reader(level).identity() for level in levels}) == 3
    assert len(set(levels)) == 3


def test_stored_files_have_the_stamps_of_the_whole_array(image):
    whole, part = open_reader(image.finest).stored(), open_reader(image.finest.part(START, SHAPE)).stored()
    assert part == {index: whole[index] for index in part}


def test_stamps_follow_the_files_of_the_box_alone(image):
    reader = open_reader(image.finest.part((0, 0, 0), (8, 8, 8)))
    other = open_reader(image.finest.part((8, 8, 8), (8, 8, 8)))
    before = [r.stamp((0, 0, 0), (8, 8, 8)) for r in (reader, other)]
    os.utime(image.finest.array.file((1, 1, 1)), (1, 1))
    after = [r.stamp((0, 0, 0), (8, 8, 8)) for r in (reader, other)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_counts_of_the_array_are_not_those_of_a_box(image):
    part = image.finest.part(START, SHAPE)
    assert complement_counts(image.finest, image) == {"absent": 1, "unknown": 2}
    assert complement_counts(part, image) is None


def test_a_missing_file_is_missing_in_the_box(image):
    reader = open_reader(image.finest.part(START, SHAPE))
    file = Path(image.finest.array.file((0, 1, 2)))
    content = file.read_bytes()
    file.unlink()
    try:
        assert reader.absent((0, 0, 0), SHAPE) == (1, 16)
        _ = reader.read((0, 0, 0), (3, 8, 4))
        assert reader.missing_chunks((0, 0, 0), (3, 8, 4)) == [(0, 1, 2)]
        assert not reader.has_chunk((0, 1, 2))
        assert len(reader.stored()) == 15
        file.touch()  # 0 bytes
        assert len(reader.stored()) == 15
        assert reader.is_empty((0, 1, 2))
    finally:
        file.write_bytes(content)


def test_levels_of_boxes_are_pickled(image):
    part = pickle.loads(pickle.dumps(image.finest.part(START, SHAPE)))
    np.testing.assert_array_equal(open_reader(part).read((0, 0, 0), SHAPE), voxels(image)[BOX])
