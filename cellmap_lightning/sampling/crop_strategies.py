"""Strategies that draw a crop first, and any position in it."""

import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.sampling.strategy import Choices, Chooser, Column, Strategy, Turns, check_known, check_weight

log = logging.getLogger(__name__)

#: `Uniform` warns when this share of the crops gives more than half of the samples.
FEW_CROPS = 0.05


class ByCrop(Strategy):
    """A crop by its weight, and any position in it; see docs/sampling.md."""

    @abstractmethod
    def _weights(self) -> FloatArray:
        """Return ``[crops]``, not negative."""

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`."""
        weights = self.table.balanced(self._weights())
        chances: FloatArray = weights / weights.sum()
        return chances

    @cached_property
    def _choose(self) -> Chooser:
        return Chooser(self.crop_chances[None])

    def choose(self, u: FloatArray, turns: Turns) -> Choices:
        """See `Strategy`."""
        crops = self._choose(0, u[:, Column.CROP])
        return Choices(crops, self.table.in_crop(crops, u[:, Column.POSITION]), np.full(len(u), -1))


class Uniform(ByCrop):
    """Every annotated voxel equally often: crops by their volume. See docs/sampling.md."""

    name = "uniform"

    def _weights(self) -> FloatArray:
        return self.table.volumes

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`.

        A warning is logged once if few crops give most of the samples.
        """
        chances = super().crop_chances
        count = int(len(chances) * FEW_CROPS)
        largest = np.argsort(-chances, kind="stable")[:count]
        share = chances[largest].sum()
        if share > 0.5:
            log.warning(
                "strategy uniform: %d of the %d crops give %.0f %% of the samples (%s, ...), because samples are drawn "
                "by voxel; strategy mix, or per_crop, shows the others more often",
                count, len(chances), 100 * share, ", ".join(self.table.labels[i] for i in largest[:3]),
            )  # fmt: skip
        return chances


class PerCrop(ByCrop):
    """Every crop equally often. See docs/sampling.md."""

    name = "per_crop"

    def _weights(self) -> FloatArray:
        return np.ones(len(self.table))


class BySize(ByCrop):
    """Crops by the square root of their volume, a compromise between all voxels and all crops equally often."""

    def _weights(self) -> FloatArray:
        return np.sqrt(self.table.volumes)


class Weighted(ByCrop):
    """Crops by explicit weights, else by the square root of their volume. See docs/sampling.md.

    Args:
        weights: ``{crop: weight}``, a crop being ``crop12``, ``12`` or ``jrc_a/crop12``, with 1 for other crops; or one
            number per crop. By default the weights of the CSV or ``datasets``, and without these the square root of the
            volume.
    """

    name = "weighted"

    def __init__(self, weights: Mapping[Any, Any] | Sequence[Any] | None = None) -> None:
        if weights is not None and (isinstance(weights, str) or not isinstance(weights, Mapping | Sequence)):
            raise CellMapTypeError(f"strategy weighted: weights must be {{crop: weight}} or a list, got {weights!r}")
        self.weights = weights
        self.uses_weights = weights is None
        values = weights.items() if isinstance(weights, Mapping) else enumerate(weights or ())
        for crop, value in values:
            check_weight(value, f"strategy weighted: the weight of {crop!r}")

    def check(self) -> None:
        """See `Strategy`."""
        if isinstance(self.weights, Mapping):
            for crop in self.weights:
                names = [*self.table.labels, *map(_crop_name, self.table.labels)]
                check_known(_name_of(crop), names, "strategy weighted: crop")
        elif self.weights is not None and len(self.weights) != len(self.table):
            raise CellMapValueError(
                f"strategy weighted: weights must have one value for each of the {len(self.table)} crops, got "
                f"{len(self.weights)}"
            )
        if not self._weights().sum() > 0:
            raise CellMapValueError("strategy weighted: every crop has the weight 0; one must be above 0")

    def _weights(self) -> FloatArray:
        if isinstance(self.weights, Mapping):
            weights = {_name_of(crop): float(value) for crop, value in self.weights.items()}
            return np.array([weights.get(label, weights.get(_crop_name(label), 1.0)) for label in self.table.labels])
        if self.weights is not None:
            return np.array([float(value) for value in self.weights])
        listed = [crop.weight for crop in self.table.crops]
        if all(weight is None for weight in listed):
            return np.sqrt(self.table.volumes)
        return np.array([1.0 if weight is None else weight for weight in listed])


def _crop_name(label: str) -> str:
    """Return ``crop12`` for ``jrc_a/crop12``."""
    return label.rpartition("/")[2]


def _name_of(crop: Any) -> str:
    """Return ``crop12`` for the number 12, and names unchanged."""
    return f"crop{crop}" if isinstance(crop, int) else str(crop)
