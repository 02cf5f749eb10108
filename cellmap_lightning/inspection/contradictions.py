"""Crops for training that overlap, and whose labels contradict each other there."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.encodings import LabelEncodings
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.geometry.lattice import Box, to_vector
from cellmap_lightning.inspection.facts import CropFacts
from cellmap_lightning.inspection.problems import Problem
from cellmap_lightning.inspection.scale_facts import class_image
from cellmap_lightning.io.label_values import MOST_VOXELS, read_labels
from cellmap_lightning.io.readers import open_reader
from cellmap_lightning.io.store import parse_location
from cellmap_lightning.splits.leakage import volume_identity

#: Part of a voxel by which lattices that are compared may differ.
_TOLERANCE = 1e-3
#: Foreground and known voxels of a class in a box.
_Labels = tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]


def contradicting_crops(crops: Sequence[CropFacts], classes: Sequence[str]) -> Iterator[Problem]:
    """Yield a problem for each pair of crops for training that share voxels, and label them differently.

    Args:
        crops: the crops; those for training are compared.
        classes: the classes in use.
    """
    trained = [crop for crop in crops if crop.usage == "train" and crop.box is not None and crop.wrong is None]
    by_volume: dict[str, list[CropFacts]] = {}
    for crop in trained:
        by_volume.setdefault(volume_identity(parse_location(crop.raw)), []).append(crop)
    for group in by_volume.values():
        for one, other in itertools.combinations(group, 2):
            shared = _shared(one, other)
            names = [name for name in classes if name in one.classes and name in other.classes]
            texts = [text for name in names if shared is not None and (text := _difference(one, other, name, shared))]
            if texts:
                yield Problem(
                    "contradiction", one.name, f"overlaps {other.name}, also for training: {', '.join(texts)}"
                )


def _shared(one: CropFacts, other: CropFacts) -> Box | None:
    """Return the box that two crops share; None without one."""
    assert one.box is not None
    assert other.box is not None
    sides = [(max(a[0], b[0]), min(a[1], b[1])) for a, b in zip(one.box.values(), other.box.values(), strict=True)]
    if any(high - low <= _TOLERANCE for low, high in sides):
        return None
    lower, upper = (to_vector(edges) for edges in zip(*sides, strict=True))
    return Box(lower, upper)


def _difference(one: CropFacts, other: CropFacts, name: str, shared: Box) -> str:
    """Return how many voxels of a class differ; "" where none does, or the lattices differ."""
    try:
        first, second = (_labels(crop, name, shared) for crop in (one, other))
    except CellMapError:
        return ""  # reported as unreadable
    if first is None or second is None or first[0].shape != second[0].shape:
        return ""
    known = first[1] & second[1]
    count = int(((first[0] != second[0]) & known).sum())
    return f"{name} differs in {count:,} of the {int(known.sum()):,} voxels known in both" if count else ""


def _labels(crop: CropFacts, name: str, shared: Box) -> _Labels | None:
    """Return the labels of a class in a box; None where its edges are not on the lattice, or it is large."""
    image = class_image(crop, name)
    level, lattice = image.finest, image.finest.lattice
    if lattice.turn is not None or level.ids is not None:
        return None
    ends = [np.subtract(corner, lattice.box.lower) / lattice.step for corner in (shared.lower, shared.upper)]
    low, high = (np.rint(end).astype(int) for end in ends)
    if np.abs(np.subtract(ends, [low, high])).max() > _TOLERANCE or np.prod(high - low) > MOST_VOXELS:
        return None
    if (low < 0).any() or (high > lattice.shape).any():
        return None
    encoding = LabelEncodings(crop.name, crop.metadata.get("unknown", "metadata")).of(name, image, level)
    start, shape = low.tolist(), (high - low).tolist()
    stored = read_labels(open_reader(level, f"{crop.name}/{name}"), tuple(start), tuple(shape))
    known = np.ones(stored.shape, bool) if encoding.unknown is None else stored != encoding.unknown
    return stored != encoding.absent, known
