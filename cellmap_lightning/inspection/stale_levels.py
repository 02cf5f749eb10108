"""Coarser levels of pyramids that do not show what the finer ones do, as after an edit of the finest alone."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.encodings import LabelEncodings
from cellmap_lightning.crops.labels import stored_labels
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import Lattice
from cellmap_lightning.inspection.facts import CropFacts
from cellmap_lightning.inspection.problems import Problem
from cellmap_lightning.inspection.scale_facts import class_image
from cellmap_lightning.io.images import read_image
from cellmap_lightning.io.ngff import Level, Multiscale, Overrides
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.splits.crop_names import dataset_and_crop

Floats = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

#: Correlation of raw with the finer level below which it does not agree. Means have about 1, and every second voxel of
#: noise too, with that voxel; turned and shifted copies have about 0.
LEAST_CORRELATION = 0.5
#: Part of the foreground of a coarser level that may lie where the finer one has none within two voxels, or reverse.
MOST_ELSEWHERE = 0.01
#: Voxels of the finer level that are compared of each block, and blocks along each axis of a large level.
_BLOCK_VOXELS, _BLOCKS = 1 << 18, 2
#: Voxels of the finer level up to which all of it is compared.
_WHOLE = 1 << 22
#: Compares one level with a finer one; returns the difference as a text, empty without one.
_Compare = Callable[[Level, Level], str]


def stale_raw(overrides: Mapping[str, Overrides]) -> Iterator[Problem]:
    """Yield a problem for each volume with coarser levels that do not correlate with the finer ones.

    Args:
        overrides: of the metadata of each volume, by its path; a few blocks of each level are read.
    """
    for path, of_volume in overrides.items():
        name = dataset_and_crop(path, None)[0]

        def compare(fine: Level, coarse: Level, name: str = name) -> str:
            found = _correlation(fine, coarse, name)
            return "" if found is None or found >= LEAST_CORRELATION else f"correlation {found:.2f}"

        try:
            texts = _disagreeing(read_image(path, of_volume, allow_turned=True), compare)
        except CellMapError:
            continue  # reported as unreadable
        if texts:
            yield Problem("stale", name, f"raw: {'; '.join(texts)}")


def stale_labels(crops: Sequence[CropFacts], classes: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each class of a crop whose coarser levels have foreground elsewhere than the finer ones.

    Args:
        crops: the crops.
        classes: the classes in use.
    """
    for crop in crops:
        encodings = LabelEncodings(crop.name, crop.metadata.get("unknown", "metadata"))
        for name in [] if crop.wrong else [name for name in classes if name in crop.classes]:
            if crop.classes[name].wrong is not None:
                continue
            try:
                texts = _stale_class(crop, name, encodings)
            except CellMapError:
                continue  # reported as unreadable, or as averaged
            if texts:
                yield Problem("stale", crop.name, f"{name}: {'; '.join(texts)}")


def _stale_class(crop: CropFacts, name: str, encodings: LabelEncodings) -> list[str]:
    """Return the coarser levels of a class that disagree with the finer ones."""
    image = class_image(crop, name)

    def compare(fine: Level, coarse: Level) -> str:
        elsewhere, foreground = _elsewhere(fine, coarse, name, image, encodings)
        if elsewhere <= MOST_ELSEWHERE * foreground:
            return ""
        return f"{elsewhere:,} voxels differ, of {foreground:,} of the class"

    return _disagreeing(image, compare)


def _disagreeing(image: Multiscale, compare: _Compare) -> list[str]:
    """Return the levels that disagree with the last finer level that agrees."""
    levels = [level for level in image.present if level.lattice.turn is None]
    texts: list[str] = []
    fine = levels[0] if levels else None
    for coarse in levels[1:]:
        assert fine is not None
        text = compare(fine, coarse)
        if text:
            texts.append(f"level {coarse.name} does not show what {fine.name} does ({text})")
        else:
            fine = coarse
    return texts


def _correlation(fine: Level, coarse: Level, label: str) -> float | None:
    """Return the highest correlation of a level with means, or with single voxels, of a finer one; None if flat."""
    reader, coarse_reader = open_reader(fine, label), open_reader(coarse, label)
    sums = np.zeros((4, 3))  # products and squares: of means, and of the first, middle and last voxel of each window
    for start, shape in _blocks(fine.lattice, coarse.lattice):
        edges = _edges(fine.lattice, coarse.lattice, start, shape)
        stored = _read(reader.read, edges).astype(np.float64)
        found = coarse_reader.read(start, shape).astype(np.float64)
        first = [e[:-1] - e[0] for e in edges]
        last = [np.maximum(e[1:] - e[0] - 1, a) for e, a in zip(edges, first, strict=True)]
        middle = [(a + b + 1) // 2 for a, b in zip(first, last, strict=True)]
        z, y, x = (np.maximum(np.diff(e), 1) for e in edges)
        means = _pooled(np.add, stored, edges) / (z[:, None, None] * y[:, None] * x)
        ways = [means, *(stored[np.ix_(*index)] for index in (first, middle, last))]
        if not all(np.isfinite(way).all() for way in (*ways, found)) or ways[0].std() < 1e-9:
            continue
        there = found - found.mean()
        for number, way in enumerate(ways):
            here = way - way.mean()
            sums[number] += (here * there).sum(), (here**2).sum(), (there**2).sum()
    if not sums[0, 1]:
        return None
    return max(float(xy / np.sqrt(xx * yy)) if xx * yy > 0 else 0.0 for xy, xx, yy in sums)


def _elsewhere(fine: Level, coarse: Level, name: str, image: Multiscale, encodings: LabelEncodings) -> tuple[int, int]:
    """Return how many voxels of a level have a class where the finer one lacks it or reverse, and how many have it."""
    of_fine, of_coarse = encodings.of(name, image, fine), encodings.of(name, image, coarse)
    reader = open_reader(fine, name, empty=of_fine.empty)
    coarse_reader = open_reader(coarse, name, empty=of_coarse.empty)
    elsewhere = foreground = 0
    for start, shape in _blocks(fine.lattice, coarse.lattice):
        edges = _edges(fine.lattice, coarse.lattice, start, shape)
        stored = _read(lambda low, n: stored_labels(reader, of_fine, low, n), edges)
        found = stored_labels(coarse_reader, of_coarse, start, shape)
        present, there = of_fine.present(stored), of_coarse.present(found)
        known = np.ones(there.shape, bool)
        if of_coarse.unknown is not None:
            known &= found != of_coarse.unknown
        if of_fine.unknown is not None:
            known &= ~_dilated(_pooled(np.logical_or, stored == of_fine.unknown, edges) > 0)
        near = _dilated(_pooled(np.logical_or, present, edges) > 0)
        full = ~_dilated(_pooled(np.logical_and, present, edges) == 0)
        elsewhere += int(np.count_nonzero(((there & ~near) | (~there & full)) & known))
        foreground += int(np.count_nonzero((there | full) & known))
    return elsewhere, foreground


def _blocks(fine: Lattice, coarse: Lattice) -> list[tuple[tuple[int, int, int], tuple[int, int, int]]]:
    """Return start and shape, in voxels of the coarser level, of the blocks that are compared."""
    ratio = np.maximum(np.divide(coarse.step, fine.step), 1)
    # Voxels that end outside of the finer level are left out.
    low = np.ceil(np.subtract(fine.box.lower, coarse.box.lower) / coarse.step - 1e-3).astype(int).clip(0)
    ends = np.floor(np.subtract(fine.box.upper, coarse.box.lower) / coarse.step + 1e-3).astype(int)
    high = np.minimum(ends, coarse.shape)
    if (high <= low).any():
        return []
    if np.prod((high - low) * ratio) <= _WHOLE:
        return [(_three(low), _three(high - low))]
    side = max(1, int((_BLOCK_VOXELS / np.prod(ratio)) ** (1 / 3)))
    shape = np.minimum(side, high - low)
    places = [
        sorted({int(a + (b - a - n) * (i + 1) / (_BLOCKS + 1)) for i in range(_BLOCKS)})
        for a, b, n in zip(low, high, shape, strict=True)
    ]
    return [(_three(place), _three(shape)) for place in itertools.product(*places)]


def _edges(fine: Lattice, coarse: Lattice, start: Sequence[int], shape: Sequence[int]) -> list[npt.NDArray[np.int64]]:
    """Return the edges of the coarser level's voxels along each axis, in voxels of the finer one."""
    edges = []
    for axis, (first, count) in enumerate(zip(start, shape, strict=True)):
        places = coarse.box.lower[axis] + (first + np.arange(count + 1)) * coarse.step[axis]
        whole = np.rint((places - fine.box.lower[axis]) / fine.step[axis]).astype(int)
        # No window is empty, even where the finer level has larger voxels along an axis.
        lower = np.clip(whole[:-1], 0, fine.shape[axis] - 1)
        edges.append(np.append(lower, max(int(lower[-1]) + 1, min(int(whole[-1]), fine.shape[axis]))))
    return edges


def _read(read: Callable[[tuple[int, int, int], tuple[int, int, int]], Any], edges: Sequence[Any]) -> Any:
    low = _three([e[0] for e in edges])
    return read(low, _three([e[-1] - e[0] for e in edges]))


def _pooled(function: np.ufunc, values: Any, edges: Sequence[Any]) -> Floats:
    """Return sums, or logical sums, over the windows between edges."""
    for axis, e in enumerate(edges):
        values = function.reduceat(values, e[:-1] - e[0], axis)
    return np.asarray(values, np.float64)


def _dilated(mask: Mask) -> Mask:
    """Return a mask with the 26 neighbours of its voxels."""
    for axis in range(3):
        grown = mask.copy()
        ahead, behind = [slice(None)] * 3, [slice(None)] * 3
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        grown[tuple(ahead)] |= mask[tuple(behind)]
        grown[tuple(behind)] |= mask[tuple(ahead)]
        mask = grown
    return mask


def _three(values: Any) -> tuple[int, int, int]:
    z, y, x = (int(v) for v in values)
    return z, y, x
