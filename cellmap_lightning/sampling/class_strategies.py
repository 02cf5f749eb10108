"""Strategies that draw a class first, and then a crop that holds voxels of it."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.sampling.crop_strategies import BySize
from cellmap_lightning.sampling.strategy import Choices, Chooser, Column, Strategy, Turns, check_known, check_weight

#: Upper limit of how many times as often as the commonest class `Foreground` centres patches on a rare one.
MOST_FAVOURED = 8.0


class ByClass(Strategy):
    """A class, and then a crop that holds voxels of it; see docs/sampling.md."""

    def check(self) -> None:
        """See `Strategy`."""
        if not self.table.annotated.any():
            raise CellMapValueError(
                f"strategy {self.name} needs classes, and nothing is annotated here; use uniform, per_crop or weighted"
            )

    @property
    @abstractmethod
    def class_chances(self) -> FloatArray:
        """See `Strategy`."""

    @cached_property
    def _crop_chances_given_class(self) -> FloatArray:
        """``[classes, crops]``, probability of each crop given the class: by the square root of its volume."""
        # Not by the voxels of the class: a single crop that is rich in it would give nearly all samples of the class.
        weights = np.sqrt(self.table.volumes)[:, None] * (self.table.counts > 0)
        weights = self.table.balanced(weights).T
        total = weights.sum(axis=1, keepdims=True)
        chances: FloatArray = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
        return chances

    @cached_property
    def _choose_class(self) -> Chooser:
        return Chooser(self.class_chances[None])

    @cached_property
    def _choose_crop(self) -> Chooser:
        return Chooser(self._crop_chances_given_class)

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`."""
        chances: FloatArray = self.class_chances @ self._crop_chances_given_class
        return chances

    def _absent_error(self, classes: Sequence[str]) -> CellMapValueError:
        return CellMapValueError(
            f"strategy {self.name}: no crop holds a voxel of {', '.join(classes)}, by the counts of their metadata or "
            "of their voxels"
        )


class ClassBalanced(ByClass):
    """Every class equally often: a class that has voxels, a crop that holds it, and any position there.

    See docs/sampling.md.
    """

    name = "class_balanced"

    @cached_property
    def class_chances(self) -> FloatArray:
        """See `Strategy`."""
        exists = (self.table.counts > 0).any(axis=0)
        if not exists.any():
            raise self._absent_error(self.table.classes)
        chances: FloatArray = exists / exists.sum()
        return chances

    def choose(self, u: FloatArray, turns: Turns) -> Choices:
        """See `Strategy`."""
        classes = self._choose_class(0, u[:, Column.CLASS])
        crops = self._choose_crop(classes, u[:, Column.CROP])
        return Choices(crops, self.table.in_crop(crops, u[:, Column.POSITION]), classes)


class Foreground(ByClass):
    """Patches around a foreground voxel of a class, from an index of the class. See docs/sampling.md.

    The voxel lies within ``jitter`` of the patch's centre. A patch that would leave the crop is moved to the nearest
    position, where it still holds the voxel. Only a patch rotated by other than quarter turns can miss its voxel, in a
    corner of its crop.

    Args:
        fraction: share of such samples; the others are from crops by the square root of their volume.
        classes: names, ``{name: weight}``, or by default all classes. Without weights rare classes are more likely: by
            one over the square root of their share of the annotated voxels, and at most `MOST_FAVOURED` times as likely
            as the commonest.
        jitter: 0 for voxels at the centre of their patches, 1 for anywhere in them.
    """

    name = "foreground"

    def __init__(
        self,
        fraction: float = 1.0,
        classes: Sequence[str] | Mapping[str, float] | str | None = None,
        jitter: float = 0.5,
    ) -> None:
        for what, value in (("fraction", fraction), ("jitter", jitter)):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise CellMapValueError(f"strategy foreground: {what} must be between 0 and 1, got {value!r}")
        if classes is not None and not isinstance(classes, str | Mapping | Sequence):
            raise CellMapTypeError(f"strategy foreground: classes must be names or {{name: weight}}, got {classes!r}")
        self.fraction, self.jitter = float(fraction), float(jitter)
        self.classes = [classes] if isinstance(classes, str) else classes
        if isinstance(self.classes, Mapping):
            for name, value in self.classes.items():
                check_weight(value, f"strategy foreground: the weight of {name!r}")
        if self.classes is not None and not self.classes:
            raise CellMapValueError("strategy foreground: classes is empty; leave it out for all classes")

    def check(self) -> None:
        """See `Strategy`."""
        super().check()
        for name in self.classes or ():
            check_known(str(name), self.table.classes, "strategy foreground: class")

    @cached_property
    def _others(self) -> Strategy:
        return BySize().bind(self.table)

    @cached_property
    def class_chances(self) -> FloatArray:
        """See `Strategy`."""
        names = list(self.table.classes if self.classes is None else map(str, self.classes))
        counts = self.table.counts.sum(axis=0)
        chances = np.zeros(len(counts))
        indices = [self.table.classes.index(name) for name in names]
        existing = [i for i in indices if counts[i] > 0]
        if not existing or (self.classes is not None and len(existing) < len(indices)):
            raise self._absent_error([self.table.classes[i] for i in indices if counts[i] == 0])
        if isinstance(self.classes, Mapping):
            chances[indices] = [float(value) for value in self.classes.values()]
            if not chances.sum() > 0:
                raise CellMapValueError("strategy foreground: every class has the weight 0")
        else:
            share = counts / np.maximum(self.table.volumes @ self.table.annotated, 1)
            chances[existing] = 1 / np.sqrt(share[existing])
            chances = np.minimum(chances, MOST_FAVOURED * chances[existing].min())
        shares: FloatArray = self.fraction * chances / chances.sum()
        return shares

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`."""
        centred = self.class_chances @ self._crop_chances_given_class
        chances: FloatArray = centred + (1 - self.fraction) * self._others.crop_chances
        return chances

    @property
    def even_chances(self) -> FloatArray | None:
        """See `Strategy`."""
        return None

    def choose(self, u: FloatArray, turns: Turns) -> Choices:
        """See `Strategy`."""
        if self.fraction == 0:
            return self._others.choose(u, turns)
        classes = self._choose_class(0, u[:, Column.CLASS])
        crops = self._choose_crop(classes, u[:, Column.CROP])
        # Crops without an indexed voxel of the class keep this random position.
        places = Choices(crops, self.table.in_crop(crops, u[:, Column.POSITION]), classes)
        centred = u[:, Column.CENTRED] < self.fraction
        self._centre(places, np.flatnonzero(centred).tolist(), u, turns)
        if centred.all():
            return places
        other = self._others.choose(u, turns)
        return Choices(
            np.where(centred, places.crops, other.crops),
            np.where(centred, places.positions, other.positions),
            np.where(centred, places.classes, other.classes),
        )

    def _centre(self, places: Choices, samples: Sequence[int], u: FloatArray, turns: Turns) -> None:
        """Move the patches of some samples to a voxel of their class, in place; others and absent classes stay."""
        rows, points, matrices = [], [], []
        for row in samples:
            crop = int(places.crops[row])
            index = self.table.index(crop, int(places.classes[row]))
            if not len(index):
                continue
            voxel = index.pick(float(u[row, Column.POSITION]))
            turn = self.table.crops[crop].plane.turn(turns[row])
            rows.append(row)
            points.append(index.lattice.points(voxel))
            matrices.append(np.eye(3) if turn is None else turn)
        if rows:
            offsets = (2 * u[rows, Column.JITTER :] - 1) * self.jitter
            geometry = self.table.geometry
            places.positions[rows] = geometry.around(places.crops[rows], np.array(points), offsets, np.array(matrices))

    def __repr__(self) -> str:
        chosen = "" if self.classes is None else f" of {', '.join(map(str, self.classes))}"
        return f"foreground{chosen} ({self.fraction:.0%}, jitter {self.jitter:g})"
