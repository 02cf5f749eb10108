"""The interface of sampling strategies, and choices with given probabilities."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.sampling.crop_table import CropTable, Whole
from cellmap_lightning.validation import did_you_mean, first_few

Turns = Sequence[FloatArray | None]


class Column(IntEnum):
    """The choice that each of a sample's random numbers makes; the jitter uses one number per axis."""

    CROP = 0
    POSITION = 1
    PART = 2
    CLASS = 3
    CENTRED = 4
    JITTER = 5


#: Random numbers per sample.
NUMBERS = Column.JITTER + 3


@dataclass(frozen=True, eq=False)
class Choices:
    """Crops and positions of ``n`` samples.

    Attributes:
        crops: ``[n]``, number of the crop.
        positions: ``[n]``, number of the position in the crop.
        classes: ``[n]``, the class that each was drawn for; -1 for no class.
    """

    crops: Whole
    positions: Whole
    classes: Whole


class Chooser:
    """Weighted random choices, by one number in [0, 1) each (inverse transform sampling).

    Args:
        weights: ``[rows, choices]``, not negative; rows of zeros must not be used.
    """

    def __init__(self, weights: FloatArray) -> None:
        self.count = weights.shape[1]
        cumulative = np.cumsum(weights, axis=1)
        total = cumulative[:, -1:]
        rows = np.arange(len(weights))[:, None]
        # All rows in one sorted array, row r shifted to [r, r + 1]: one binary search serves samples of all rows.
        shares = np.divide(cumulative, total, out=np.zeros_like(cumulative), where=total > 0)
        self._cumulative = (rows + shares).ravel()

    def __call__(self, rows: Whole | int, u: FloatArray) -> Whole:
        """Return ``[n]``, the choices that the numbers ``u`` ``[n]`` make in the rows."""
        rows = np.asarray(rows)
        values = np.minimum(rows + u, np.nextafter(rows + 1.0, rows))  # adding may round up to the next row
        choices: Whole = self._cumulative.searchsorted(values, "right") - rows * self.count
        return choices


class Strategy(ABC):
    """A function from a sample's random numbers to a crop and a position; see docs/sampling.md."""

    #: Name in a configuration.
    name: ClassVar[str]
    table: CropTable

    #: True if the crops' weights from the CSV or ``datasets`` are used.
    uses_weights: bool = False

    def bind(self, table: CropTable) -> "Strategy":
        """Return a copy of the strategy for these crops.

        Raises:
            CellMapError: it names classes or crops that do not exist, or needs classes and nothing is annotated.
        """
        other = copy(self)
        for key in list(vars(other)):
            if isinstance(getattr(type(self), key, None), cached_property):
                del other.__dict__[key]  # computed for other crops
        other.table = table
        other.check()
        return other

    def check(self) -> None:  # noqa: B027  optional to override
        """Check that the strategy can be used on its crops, before any voxel is counted."""

    def prepare(self) -> None:
        """Compute the probabilities now, for which the first sample would otherwise wait."""
        self.crop_chances  # noqa: B018

    @abstractmethod
    def choose(self, u: FloatArray, turns: Turns) -> Choices:
        """Return crop and position of each sample, a function of its row alone.

        Args:
            u: ``[n, NUMBERS]`` in [0, 1).
            turns: rotation of each sample's patch, see `geometry.patch_map`.
        """

    @property
    @abstractmethod
    def crop_chances(self) -> FloatArray:
        """``[crops]``, probability that a sample is from each; they sum to 1."""

    @property
    def class_chances(self) -> FloatArray:
        """``[classes]``, probability that a sample is drawn for each; they sum to at most 1."""
        return np.zeros(len(self.table.classes))

    @property
    def even_chances(self) -> FloatArray | None:
        """`crop_chances` if every position of a crop is equally likely; else None."""
        return self.crop_chances

    def __repr__(self) -> str:
        return self.name


def check_weight(value: Any, what: str) -> float:
    """Return a weight as a float.

    Raises:
        CellMapValueError: the value is not a finite number of at least 0.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise CellMapValueError(f"{what} must be a number of at least 0, got {value!r}")
    return float(value)


def check_known(name: str, names: Sequence[str] | Mapping[str, Any], what: str) -> None:
    """Check that a name exists.

    Raises:
        CellMapKeyError: it does not; the message has a similar name, or the first of those that exist.
    """
    if name not in names:
        hint = did_you_mean(name, names, f"; there are {first_few(list(names), 12)}")
        raise CellMapKeyError(f"{what} {name!r} does not exist{hint}")
