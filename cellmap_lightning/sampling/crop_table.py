"""Crops as arrays that strategies sample from: positions, volumes, voxel counts and class indices."""

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
    """Crops as arrays, each computed at first use; voxels are only counted if a strategy needs counts.

    Args:
        crops: the crops.
        classes: the classes.
        balance: make raw volumes equally likely, regardless of the number and size of their crops.
    """

    def __init__(self, crops: Sequence[Crop], classes: Sequence[str], balance: bool = False) -> None:
        self.crops, self.classes, self.balance = crops, tuple(classes), balance
        self._indices: dict[tuple[int, int], Foreground] = {}

    def __len__(self) -> int:
        return len(self.crops)

    @property
    def labels(self) -> list[str]:
        """Names of the crops."""
        return [crop.label for crop in self.crops]

    @cached_property
    def positions(self) -> Whole:
        """``[crops]``, number of positions of each."""
        return np.array([len(crop.placement) for crop in self.crops], np.int64)

    @cached_property
    def volumes(self) -> FloatArray:
        """``[crops]``, annotated voxels of each at the target's resolution."""
        return np.array([crop.volume for crop in self.crops])

    @cached_property
    def counts(self) -> FloatArray:
        """``[crops, classes]``, foreground voxels; 0 where a class is not annotated."""
        fetch_counted(self.crops)
        counts = [crop.class_counts if crop.annotated else {} for crop in self.crops]
        return np.array([[count.get(c, 0.0) for c in self.classes] for count in counts]).reshape(len(self), -1)

    @cached_property
    def annotated(self) -> npt.NDArray[np.bool_]:
        """Bool ``[crops, classes]``, True where a class is annotated."""
        return np.array([[c in crop.annotated for c in self.classes] for crop in self.crops]).reshape(len(self), -1)

    @cached_property
    def _volume_of(self) -> Whole:
        """``[crops]``, number of the raw volume that each lies in."""
        return np.unique([crop.input_path for crop in self.crops], return_inverse=True)[1].reshape(-1)

    def balanced(self, weights: FloatArray) -> FloatArray:
        """Return weights ``[crops]`` or ``[crops, classes]``, scaled so that all raw volumes have the same total."""
        if not self.balance:
            return weights
        totals = np.zeros((self._volume_of.max() + 1, *weights.shape[1:]))
        np.add.at(totals, self._volume_of, weights)
        volume_totals = totals[self._volume_of]
        return np.divide(weights, volume_totals, out=np.zeros_like(weights), where=volume_totals > 0)

    def index(self, crop: int, number: int) -> Foreground:
        """Return the foreground index of a class in a crop, read from the cache folder or built at first use."""
        index = self._indices.get((crop, number))
        if index is None:
            if not self._indices:
                fetch_read(self.crops)  # versions of remote arrays, requested together
            source = self.crops[crop]
            index = self._indices[crop, number] = source.foreground_index(self.classes[number])
            if not len(index):
                log.warning(
                    "%s: the metadata counts voxels of %r, and none is stored: it is sampled anywhere in the crop",
                    source.label, self.classes[number],
                )  # fmt: skip
        return index

    @cached_property
    def geometry(self) -> "_Geometry":
        """The placements as arrays."""
        return _Geometry(self.crops)

    def in_crop(self, crops: Whole, u: FloatArray) -> Whole:
        """Return a position in each crop, all equally likely, from numbers in [0, 1)."""
        positions: Whole = np.minimum((u * self.positions[crops]).astype(np.int64), self.positions[crops] - 1)
        return positions


class _Geometry:
    """The placements of the crops as arrays ``[crops, 3]``, to place many samples at a time."""

    def __init__(self, crops: Sequence[Crop]) -> None:
        self.first = np.array([crop.placement.first for crop in crops])
        self.step = np.array([crop.placement.step for crop in crops])
        self.counts = np.array([crop.placement.counts for crop in crops], np.int64)
        self.half = np.array([crop.half for crop in crops])

    def around(self, crops: Whole, points: FloatArray, offsets: FloatArray, turns: FloatArray) -> Whole:
        """Return positions of patches that each hold a point at ``offsets`` from the patch's centre.

        Args:
            crops: ``[n]``.
            points: ``[n, 3]``, nm.
            offsets: ``[n, 3]`` in [-1, 1] along the patches' axes, 1 being half a patch.
            turns: ``[n, 3, 3]``, matrices from the patches' axes to the volume's.
        """
        step, first, counts = self.step[crops], self.first[crops], self.counts[crops]
        # The nearest position is up to half a step away: the offset leaves that much room inside the patch.
        reserve = np.einsum("nji,ni->nj", np.abs(_inverses(turns)), step / 2)
        reach = np.maximum(np.minimum(np.abs(offsets) * self.half[crops], self.half[crops] - reserve), 0)
        centers = points - np.einsum("nij,nj->ni", turns, np.sign(offsets) * reach)
        # A patch that is clipped to the first or last position still holds the point, since the point is in the crop;
        # unless it is zoomed in.
        z, y, x = np.clip(np.rint((centers - first) / step), 0, counts - 1).astype(np.int64).T
        positions: Whole = (z * counts[:, 1] + y) * counts[:, 2] + x
        return positions


def _inverses(turns: FloatArray) -> FloatArray:
    """Return the inverse of each matrix; that of a rotation is its transpose, without rounding."""
    transposed = np.swapaxes(turns, 1, 2)
    error = np.abs(turns @ transposed - np.eye(3)).max(axis=(1, 2), keepdims=True)
    return np.where(error < 1e-9, transposed, np.linalg.inv(turns))
