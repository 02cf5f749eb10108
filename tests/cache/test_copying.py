"""Copies of voxels in every orientation, against a plain assignment."""

import itertools

import numpy as np
import pytest

from cellmap_lightning.cache import copying
from cellmap_lightning.cache.copying import copy_voxels

ORIENTATIONS = [
    (order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]
SHAPES = [(1, 1, 1), (3, 5, 7), (1, 16, 8), (16, 1, 24), (8, 9, 1), (7, 6, 40)]


def _volume(shape, dtype, depth=0):
    full = tuple(n + 6 for n in shape) + ((depth,) if depth else ())
    values = np.random.default_rng(0).integers(0, 2**63, full, np.uint64)
    volume = values.astype(dtype)
    return volume, volume[2 : 2 + shape[0], 3 : 3 + shape[1], 1 : 1 + shape[2]]


def _target(box, order, flips):
    """Return a buffer, and a view of it of the shape of the box with permuted and flipped axes."""
    shape = [0, 0, 0]
    for axis, place in enumerate(order):
        shape[place] = box.shape[axis]
    buffer = np.full((*shape, *box.shape[3:]), 7, box.dtype)
    view = buffer.transpose(*order, *range(3, box.ndim))[tuple(slice(None, None, step) for step in flips)]
    return buffer, view


def _check(box, order, flips):
    buffer, view = _target(box, order, flips)
    expected, plain = _target(box, order, flips)
    plain[...] = box
    copy_voxels(view, box)
    np.testing.assert_array_equal(buffer, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("dtype", "depth"),
    [("u1", 0), ("u2", 0), ("f4", 0), ("i8", 0), (">u2", 0), ("?", 0)] + [("u1", depth) for depth in (1, 2, 4, 6, 12)],
)
def test_every_orientation_is_a_plain_assignment(shape, dtype, depth, monkeypatch):
    for slab_bytes in (copying._SLAB_BYTES, 150):  # one slab; many, the last one thinner
        monkeypatch.setattr(copying, "_SLAB_BYTES", slab_bytes)
        monkeypatch.setattr(copying, "_TURNED_BYTES", slab_bytes // 2)
        for order, flips in ORIENTATIONS:
            _check(_volume(shape, dtype, depth)[1], order, flips)


@pytest.mark.parametrize("depth", [0, 2, 6])
def test_boxes_larger_than_a_slab(depth):
    box = _volume((5, 260, 512), "u1", depth)[1]
    assert box.nbytes > 2 * copying._SLAB_BYTES
    for order, flips in ORIENTATIONS[::9]:
        _check(box, order, flips)


def test_nothing_beside_the_target_is_written():
    _, box = _volume((6, 7, 8), "u2")
    for order, flips in ORIENTATIONS:
        frame = np.full((12, 12, 12), 9, "u2")
        inner = frame[2:10, 1:10, 3:12].transpose(*order)[:6, :7, :8][tuple(slice(None, None, s) for s in flips)]
        inner[...] = box
        expected = frame.copy()
        inner[...] = 0
        copy_voxels(inner, box)
        np.testing.assert_array_equal(frame, expected)


@pytest.mark.parametrize("gap", ["x", "byte", "flipped", "transposed"])
def test_sources_with_gaps_in_a_row_are_copied(gap):
    volume = np.random.default_rng(1).integers(0, 255, (9, 10, 12, 4), np.uint8)
    box = {
        "x": volume[:, :, ::2],
        "byte": volume[..., ::2],
        "flipped": volume[:, :, ::-1],
        "transposed": volume.transpose(2, 1, 0, 3),
    }[gap]
    for order, flips in ORIENTATIONS:
        _check(box, order, flips)


@pytest.mark.parametrize(("stored", "wanted"), [("u1", "f4"), ("u2", "u4"), (">u2", "<u2"), ("i2", "f8")])
def test_other_types_are_converted(stored, wanted):
    box = np.arange(60, dtype=stored).reshape(3, 4, 5)
    for order, flips in ORIENTATIONS:
        _, view = _target(box.astype(wanted), order, flips)
        copy_voxels(view, box)
        np.testing.assert_array_equal(view, box)


def test_empty_boxes_and_broadcast_sources():
    copy_voxels(np.empty((0, 3, 4), "u1"), np.empty((0, 3, 4), "u1"))
    copy_voxels(np.empty((2, 3, 0), "u1"), np.empty((2, 3, 0), "u1"))
    target = np.empty((2, 3, 4), "u1")
    copy_voxels(target, np.broadcast_to(np.uint8(5), (2, 3, 4)))
    assert (target == 5).all()


def test_sources_may_be_read_only():
    box = np.arange(2 * 3 * 8, dtype="u1").reshape(2, 3, 8)
    box.flags.writeable = False
    for order, flips in ORIENTATIONS:
        _check(box, order, flips)
