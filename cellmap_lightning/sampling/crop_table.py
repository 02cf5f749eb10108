"""The crops as arrays that strategies draw from: positions, volumes, voxel counts, and where classes are."""

import logging
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import numpy.typing as npt

from cellmap_lightning.crops.class_index import Foreground
from cellmap_lightning.crops.crop import Crop
from cellmap_lightning.crops.remote_arrays import fetch_counted, fetch_read
from cellmap_lightning.geometry.lattice import FloatArray

log = logging.getLogger(__name__)

Whole = npt.NDArray[np.int64]


class CropTable:
    """The crops as arrays; voxels are counted when a strategy needs counts, and not before.

    Args:
        crops: the crops.
        classes: the classes.
        balance: make raw volumes equally likely, whatever the number and size of their crops.
    """

    def __init__(self, crops: Sequence[Crop], classes: Sequence[str], balance: bool = False) -> None:
        self.crops, self.classes, self.balance = crops, tuple(classes), balance
        self._indices: dict[tuple[int, int], Foreground] = {}

    def __len__(self) -> int:
        return len(self.crops)

    @property
    def labels(self) -> list[str]:
        """Names of the crops."""
        return [d.label for d in self.crops]

    @cached_property
    def positions(self) -> Whole:
        """``[crops]``, positions of each."""
        return np.array([len(d.placement) for d in self.crops], np.int64)

    @cached_property
    def volumes(self) -> FloatArray:
        """``[crops]``, annotated voxels of each at the resolution asked for."""
        return np.array([d.volume for d in self.crops])

    @cached_property
    def counts(self) -> FloatArray:
        """``[crops, classes]``, foreground voxels; 0 where a class is not annotated."""
        fetch_counted(self.crops)
        counted = [d.class_counts if d.annotated else {} for d in self.crops]
        return np.array([[count.get(c, 0.0) for c in self.classes] for count in counted]).reshape(len(self), -1)

    @cached_property
    def annotated(self) -> npt.NDArray[np.bool_]:
        """``[crops, classes]``, what is annotated where."""
        return np.array([[c in d.annotated for c in self.classes] for d in self.crops]).reshape(len(self), -1)

    @cached_property
    def _volume_of(self) -> Whole:
        """``[crops]``, number of the raw volume that each lies in."""
        return np.unique([d.input_path for d in self.crops], return_inverse=True)[1].reshape(-1)

    def balanced(self, weights: FloatArray) -> FloatArray:
        """Weights of crops ``[crops]`` or ``[crops, classes]``, such that every raw volume among them has the same."""
        if not self.balance:
            return weights
        totals = np.zeros((self._volume_of.max() + 1, *weights.shape[1:]))
        np.add.at(totals, self._volume_of, weights)
        own = totals[self._volume_of]
        return np.divide(weights, own, out=np.zeros_like(weights), where=own > 0)

    def index(self, crop: int, number: int) -> Foreground:
        """Where a class is in a crop: read from the cache folder, or built, when it is first asked for."""
        found = self._indices.get((crop, number))
        if found is None:
            if not self._indices:
                fetch_read(self.crops)
            source = self.crops[crop]
            found = self._indices[crop, number] = source.foreground_index(self.classes[number])
            if not len(found):
                log.warning(
                    "%s: the metadata counts voxels of %r, and none is stored: it is sampled anywhere in the crop",
                    source.label, self.classes[number],
                )  # fmt: skip
        return found

    @cached_property
    def geometry(self) -> "_Geometry":
        """The placements as arrays."""
        return _Geometry(self.crops)

    def in_crop(self, crops: Whole, u: FloatArray) -> Whole:
        """A position in each crop, all equally likely, from numbers in [0, 1)."""
        positions: Whole = np.minimum((u * self.positions[crops]).astype(np.int64), self.positions[crops] - 1)
        return positions


class _Geometry:
    """The placements of the crops as arrays ``[crops, 3]``, so that many samples are placed at a time."""

    def __init__(self, crops: Sequence[Crop]) -> None:
        self.first = np.array([d.placement.first for d in crops])
        self.step = np.array([d.placement.step for d in crops])
        self.counts = np.array([d.placement.counts for d in crops], np.int64)
        self.half = np.array([d.half for d in crops])

    def around(self, crops: Whole, points: FloatArray, offsets: FloatArray, turns: FloatArray) -> Whole:
        """The positions of patches that hold a point each, not in their middle but ``offsets`` beside it.

        Args:
            crops: ``[n]``.
            points: ``[n, 3]``, nm.
            offsets: ``[n, 3]`` in [-1, 1] along the patches' own axes, 1 being half a patch.
            turns: ``[n, 3, 3]``, from the patches' axes to the volume's.
        """
        step, first, counts = self.step[crops], self.first[crops], self.counts[crops]
        # The nearest position is up to half a step away: so much of the patch is kept in reserve.
        reserve = np.einsum("nij,ni->nj", np.abs(turns), step / 2)
        reach = np.maximum(np.minimum(np.abs(offsets) * self.half[crops], self.half[crops] - reserve), 0)
        centers = points - np.einsum("nij,nj->ni", turns, np.sign(offsets) * reach)
        # Beyond the first and the last position there is no patch. A patch that is moved there still holds the point.
        z, y, x = np.clip(np.rint((centers - first) / step), 0, counts - 1).astype(np.int64).T
        found: Whole = (z * counts[:, 1] + y) * counts[:, 2] + x
        return found
