"""Copies of boxes of voxels between arrays whose axes are permuted or flipped, in the fastest order of accesses.

Patches are small: a loop over single voxels, or over rows of 64 bytes, costs more than the memory that it moves. So a
row that stays a row is copied as one item of NumPy's ``void`` type. A row that is reversed, or becomes a column, is
first copied in that way to a slab that stays in the CPU cache, and reordered from there.

``python benchmarks/copies.py`` measures all orientations beside a plain assignment.
"""

from collections.abc import Iterator

import numpy as np

from cellmap_lightning.geometry.source import AnyArray

#: Bytes of a slab, which stays in the second-level cache; tuned by measurement.
_SLAB_BYTES = 1 << 18
#: Bytes of the planes that are turned at a time where the target's outermost axis is x, in the first-level cache.
_TURNED_BYTES = 1 << 15
#: Bytes of a cache line.
_LINE_BYTES = 64


def copy_voxels(target: AnyArray, source: AnyArray) -> None:
    """Copy voxels to an array of the same shape.

    Args:
        target: ``[z, y, x]``, or ``[z, y, x, bytes]`` for voxels of several bytes; any strides along z, y and x.
        source: the same shape and type, its voxels adjacent along x.
    """
    row = _row_bytes(source)
    if target.dtype != source.dtype or row is None or target.strides[3:] != source.strides[3:]:
        target[...] = source
    elif target.strides[2] == source.strides[2]:
        _rows(target, row)[...] = _rows(source, row)
    elif target.strides[2] == -source.strides[2]:
        _reverse_rows(target, source, row)
    else:
        _turn_rows(target, source, row)


def _row_bytes(voxels: AnyArray) -> int | None:
    """Return the bytes of a row along x; None if there are gaps within it."""
    size = int(voxels.itemsize)
    for count, stride in zip(voxels.shape[:1:-1], voxels.strides[:1:-1], strict=True):
        if stride != size:
            return None
        size *= int(count)
    return size or None


def _rows(voxels: AnyArray, row: int) -> AnyArray:
    """Return a view ``[z, y]`` of rows, each one item."""
    if voxels.ndim == 4:
        voxels = voxels.view(f"V{voxels.shape[3] * voxels.itemsize}")[..., 0]
    return voxels.view(f"V{row}")[..., 0]


def _reverse_rows(target: AnyArray, source: AnyArray, row: int) -> None:
    """Copy with x flipped."""
    # In the order of the target's memory, so that a slab is one run of bytes, and its reverse too.
    if abs(target.strides[0]) < abs(target.strides[1]):
        target, source = target.swapaxes(0, 1), source.swapaxes(0, 1)
    flips = tuple(slice(None, None, -1 if stride < 0 else 1) for stride in target.strides[:3])
    target, source = target[flips], source[flips]
    for to, of in _slabs(target, source, _planes(source, row, _SLAB_BYTES)):
        slab = np.empty(of.shape, of.dtype)
        _rows(slab[::-1, ::-1], row)[...] = _rows(of[:, :, ::-1], row)
        for word, stored in _words(to, slab[::-1, ::-1, ::-1]):
            if word.itemsize == 1 and word.shape[2] % 8 == 0 and word.strides[2] == 1:
                # A big-endian word is read with its bytes reversed, in a single instruction.
                word.view(np.uint64)[...] = stored[:, :, ::-1].view(">u8")[:, :, ::-1]
            else:
                word[...] = stored


def _turn_rows(target: AnyArray, source: AnyArray, row: int) -> None:
    """Copy with x permuted with another axis."""
    if abs(target.strides[0]) < abs(target.strides[1]):
        target, source = target.swapaxes(0, 1), source.swapaxes(0, 1)
    # Planes of x and the target's innermost axis are turned. Where x is its outermost axis, NumPy would loop over the
    # planes inside the loop over x, and touch a line of the slab once for each voxel of it.
    outermost = abs(target.strides[2]) > abs(target.strides[0])
    turned = _planes(source, row, _TURNED_BYTES) if outermost else len(source)
    for to, of in _slabs(target, source, _planes(source, row, _SLAB_BYTES)):
        slab = _empty_lines(of, row)
        _rows(slab, row)[...] = _rows(of, row)
        for word, stored in _words(to, slab):
            for part, planes in _slabs(word, stored, turned):
                part[...] = planes


def _empty_lines(voxels: AnyArray, row: int) -> AnyArray:
    """Return an uninitialized array whose rows begin an odd number of cache lines apart.

    A column of it uses all sets of the cache. With rows of a power of two it would use few of them, and evict itself.
    """
    z, y = voxels.shape[:2]
    lines = -(-row // _LINE_BYTES) | 1
    rows = np.empty((z, y, lines * _LINE_BYTES), np.uint8)[:, :, :row]
    return rows.reshape(voxels.shape) if voxels.ndim == 4 else rows.view(voxels.dtype)


def _planes(source: AnyArray, row: int, most_bytes: int) -> int:
    """Return how many planes across axis 0 have this many bytes, at least 2."""
    return max(2, most_bytes // (row * int(source.shape[1])))


def _slabs(target: AnyArray, source: AnyArray, planes: int) -> Iterator[tuple[AnyArray, AnyArray]]:
    """Yield slabs of so many planes across axis 0."""
    for first in range(0, len(source), planes):
        yield target[first : first + planes], source[first : first + planes]


def _words(target: AnyArray, source: AnyArray) -> Iterator[tuple[AnyArray, AnyArray]]:
    """Yield views ``[z, y, x]`` of integers that together hold all bytes of the voxels."""
    if target.ndim == 3:
        yield target, source
        return
    size = target.shape[3] * target.itemsize
    size = min(size & -size, 8)  # the largest power of two that divides the bytes of a voxel
    to, of = target.view(f"u{size}"), source.view(f"u{size}")
    for word in range(to.shape[3]):
        yield to[..., word], of[..., word]
