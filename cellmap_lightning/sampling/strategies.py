"""Which crop, and where in it, a sample comes from: one small class for each strategy.

What a strategy says of a sample is a function of a few numbers that are drawn for it, and these follow from (seed,
number of the sample) alone. "Rare" is therefore never what was seen so far, but what the voxel counts say beforehand.
Nothing here grows with the number of voxels.
"""

import difflib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.sampling.crop_table import CropTable, Whole

log = logging.getLogger(__name__)

Turns = Sequence[FloatArray | None]

#: What each of the numbers drawn for a sample decides.
_CROP, _POSITION, _PART, _CLASS, _CENTRED, _JITTER = range(6)
#: How many are drawn: the jitter has one per axis.
NUMBERS = _JITTER + 3
#: `Uniform` warns when this share of the crops gives more than half of the samples.
FEW_CROPS = 0.05
#: How many times as often as the commonest class `Foreground` centres on the least seen one at most.
MOST_FAVOURED = 8.0


@dataclass(frozen=True, eq=False)
class Places:
    """Where ``n`` samples come from.

    Attributes:
        crops: ``[n]``, which crop.
        positions: ``[n]``, which position in it.
        classes: ``[n]``, the class that each was drawn for; -1 where none was.
    """

    crops: Whole
    positions: Whole
    classes: Whole


class Chooser:
    """Choices with given chances, by one number in [0, 1) each.

    Args:
        weights: ``[rows, choices]``, not negative; rows of nothing but zeros are never asked.
    """

    def __init__(self, weights: FloatArray) -> None:
        self.count = weights.shape[1]
        until = np.cumsum(weights, axis=1)
        total = until[:, -1:]
        rows = np.arange(len(weights))[:, None]
        # All rows one after the other, row r in [r, r + 1], are one sorted array: one search serves every sample.
        self._until = (rows + np.divide(until, total, out=np.zeros_like(until), where=total > 0)).ravel()

    def __call__(self, rows: Whole | int, u: FloatArray) -> Whole:
        """``[n]``, what the numbers ``u`` ``[n]`` choose from the rows."""
        rows = np.asarray(rows)
        at = np.minimum(rows + u, np.nextafter(rows + 1.0, rows))  # adding may round up to the next row
        found: Whole = self._until.searchsorted(at, "right") - rows * self.count
        return found


class Strategy(ABC):
    """From the numbers drawn for samples to crops and positions."""

    #: What it is called in YAML.
    name: ClassVar[str]
    table: CropTable

    #: Whether the weights that the CSV or ``datasets`` give to crops count.
    uses_weights: bool = False

    def bind(self, table: CropTable) -> "Strategy":
        """Return the same strategy for these crops.

        Raises:
            CellMapError: it names classes or crops that are not there, or needs classes where nothing is annotated.
        """
        other = copy(self)
        for key in list(vars(other)):
            if isinstance(getattr(type(self), key, None), cached_property):
                del other.__dict__[key]  # what was worked out for other crops
        other.table = table
        other._check()
        return other

    def _check(self) -> None:  # noqa: B027  most have nothing to refuse
        """Refuse crops that this strategy cannot be used on, before any voxel is counted."""

    def prepare(self) -> None:
        """Do now what the first sample would otherwise wait for."""
        self.crop_chances  # noqa: B018

    @abstractmethod
    def places(self, u: FloatArray, turns: Turns) -> Places:
        """Where samples come from: a function of each row alone.

        Args:
            u: ``[n, NUMBERS]`` in [0, 1).
            turns: how each sample's patch is turned, see `geometry.patch_map`.
        """

    @property
    @abstractmethod
    def crop_chances(self) -> FloatArray:
        """``[crops]``, how likely a sample is from each; they sum to 1."""

    @property
    def class_chances(self) -> FloatArray:
        """``[classes]``, how likely a sample is drawn for each; they sum to 1, or to less where some are for none."""
        return np.zeros(len(self.table.classes))

    @property
    def even_chances(self) -> FloatArray | None:
        """``[crops]``, as `crop_chances`, when every position of a crop is equally likely; else None."""
        return self.crop_chances

    def __repr__(self) -> str:
        return self.name


class _ByCrop(Strategy):
    """A crop by its weight, and any position in it."""

    @abstractmethod
    def _weights(self) -> FloatArray:
        """``[crops]``, not negative."""

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`."""
        weights = self.table.balanced(self._weights())
        chances: FloatArray = weights / weights.sum()
        return chances

    @cached_property
    def _choose(self) -> Chooser:
        return Chooser(self.crop_chances[None])

    def places(self, u: FloatArray, turns: Turns) -> Places:
        """See `Strategy`."""
        crops = self._choose(0, u[:, _CROP])
        return Places(crops, self.table.in_crop(crops, u[:, _POSITION]), np.full(len(u), -1))


class Uniform(_ByCrop):
    """Every annotated voxel as often as every other: crops by their volume."""

    name = "uniform"

    def _weights(self) -> FloatArray:
        return self.table.volumes

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`.

        Warns once, in the log, when few crops give most of the samples.
        """
        chances = super().crop_chances
        few = int(len(chances) * FEW_CROPS)
        largest = np.argsort(-chances, kind="stable")[:few]
        share = chances[largest].sum()
        if share > 0.5:
            log.warning(
                "strategy uniform: %d of the %d crops give %.0f %% of the samples (%s, ...), because samples are drawn "
                "by voxel; strategy mix, or per_crop, shows the others more often",
                few, len(chances), 100 * share, ", ".join(self.table.labels[i] for i in largest[:3]),
            )  # fmt: skip
        return chances


class PerCrop(_ByCrop):
    """Every crop as often as every other."""

    name = "per_crop"

    def _weights(self) -> FloatArray:
        return np.ones(len(self.table))


class _ByRoot(_ByCrop):
    """Crops by the square root of their volume, so that large ones drown no others."""

    def _weights(self) -> FloatArray:
        return np.sqrt(self.table.volumes)


class Weighted(_ByCrop):
    """Crops by weights that are given, else by the square root of their volume.

    Args:
        weights: ``{crop: weight}``, a crop being ``crop12``, ``12`` or ``jrc_a/crop12``; those that are not named have
            1. Or one number per crop. By default the
            weights that the CSV or ``datasets`` give; where those give none either, the square root of the volume.
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

    def _check(self) -> None:
        if isinstance(self.weights, Mapping):
            for crop in self.weights:
                _known(_named(crop), [*self.table.labels, *map(_short, self.table.labels)], "strategy weighted: crop")
        elif self.weights is not None and len(self.weights) != len(self.table):
            raise CellMapValueError(
                f"strategy weighted: {len(self.weights)} weights were given for {len(self.table)} crops"
            )
        if not self._weights().sum() > 0:
            raise CellMapValueError("strategy weighted: every crop has the weight 0, so there is nothing to draw")

    def _weights(self) -> FloatArray:
        if isinstance(self.weights, Mapping):
            given = {_named(crop): float(value) for crop, value in self.weights.items()}
            return np.array([given.get(label, given.get(_short(label), 1.0)) for label in self.table.labels])
        if self.weights is not None:
            return np.array([float(value) for value in self.weights])
        own = [d.weight for d in self.table.crops]
        if all(value is None for value in own):
            return np.sqrt(self.table.volumes)
        return np.array([1.0 if value is None else value for value in own])


class _ByClass(Strategy):
    """A class, and then a crop that really holds voxels of it."""

    def _check(self) -> None:
        if not self.table.annotated.any():
            raise CellMapValueError(
                f"strategy {self.name} needs classes, and nothing is annotated here; use uniform, per_crop or weighted"
            )

    @property
    @abstractmethod
    def class_chances(self) -> FloatArray:
        """See `Strategy`."""

    @cached_property
    def _given_class(self) -> FloatArray:
        """``[classes, crops]``, how likely each crop is for a class: by the square root of its volume.

        By volume and not by how much of the class it holds: a crop that is rich in it would otherwise be nearly all
        that is seen of the class.
        """
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
        return Chooser(self._given_class)

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`."""
        chances: FloatArray = self.class_chances @ self._given_class
        return chances

    def _nowhere(self, classes: Sequence[str]) -> CellMapValueError:
        return CellMapValueError(
            f"strategy {self.name}: no crop holds a voxel of {', '.join(classes)}, by the counts of their metadata or "
            "of their voxels"
        )


class ClassBalanced(_ByClass):
    """Every class as often as every other: a class that has voxels, a crop that holds it, and any position there."""

    name = "class_balanced"

    @cached_property
    def class_chances(self) -> FloatArray:
        """See `Strategy`."""
        there = (self.table.counts > 0).any(axis=0)
        if not there.any():
            raise self._nowhere(self.table.classes)
        chances: FloatArray = there / there.sum()
        return chances

    def places(self, u: FloatArray, turns: Turns) -> Places:
        """See `Strategy`."""
        classes = self._choose_class(0, u[:, _CLASS])
        crops = self._choose_crop(classes, u[:, _CROP])
        return Places(crops, self.table.in_crop(crops, u[:, _POSITION]), classes)


class Foreground(_ByClass):
    """Patches around a voxel of a class, from an index of where the class is stored.

    The voxel is then anywhere within ``jitter`` of the patch's middle. Where that would put the patch beyond the
    positions that there are, it is moved to the nearest: it stays in the crop, and still holds the voxel. Only a patch
    that is turned by other than quarter turns can miss a voxel, in a corner of its crop.

    Args:
        fraction: share of the samples that are drawn so; the others are from crops by the square root of their volume.
        classes: around which: names, ``{name: weight}``, or by default all. Without weights a class is the likelier the
            less is seen of it: as one over the square root of its share of the annotated voxels, and at most
            `MOST_FAVOURED` times as likely as the commonest.
        jitter: 0 for voxels in the middle of their patches, 1 for anywhere in them.
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
            raise CellMapValueError("strategy foreground: classes is empty; leave it out for all of them")

    def _check(self) -> None:
        super()._check()
        for name in self.classes or ():
            _known(str(name), self.table.classes, "strategy foreground: class")

    @cached_property
    def _others(self) -> Strategy:
        return _ByRoot().bind(self.table)

    @cached_property
    def class_chances(self) -> FloatArray:
        """See `Strategy`."""
        wanted = list(self.table.classes if self.classes is None else map(str, self.classes))
        counts = self.table.counts.sum(axis=0)
        chances = np.zeros(len(counts))
        number = [self.table.classes.index(name) for name in wanted]
        there = [i for i in number if counts[i] > 0]
        if not there or (self.classes is not None and len(there) < len(number)):
            raise self._nowhere([self.table.classes[i] for i in number if counts[i] == 0])
        if isinstance(self.classes, Mapping):
            chances[number] = [float(value) for value in self.classes.values()]
            if not chances.sum() > 0:
                raise CellMapValueError("strategy foreground: every class has the weight 0")
        else:
            share = counts / np.maximum(self.table.volumes @ self.table.annotated, 1)
            chances[there] = 1 / np.sqrt(share[there])
            chances = np.minimum(chances, MOST_FAVOURED * chances[there].min())
        shares: FloatArray = self.fraction * chances / chances.sum()
        return shares

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`."""
        chances: FloatArray = self.class_chances @ self._given_class + (1 - self.fraction) * self._others.crop_chances
        return chances

    @property
    def even_chances(self) -> FloatArray | None:
        """See `Strategy`."""
        return None

    def places(self, u: FloatArray, turns: Turns) -> Places:
        """See `Strategy`."""
        if self.fraction == 0:
            return self._others.places(u, turns)
        classes = self._choose_class(0, u[:, _CLASS])
        crops = self._choose_crop(classes, u[:, _CROP])
        positions = self.table.in_crop(crops, u[:, _POSITION])
        rows, points = [], []
        for row, (crop, number, at) in enumerate(
            zip(crops.tolist(), classes.tolist(), u[:, _POSITION].tolist(), strict=True)
        ):
            if u[row, _CENTRED] >= self.fraction:
                continue
            index = self.table.index(crop, number)
            if len(index):
                (z, y, x), (dz, dy, dx), (oz, oy, ox) = index.pick(at), index.lattice.step, index.lattice.origin
                rows.append(row)
                points.append((oz + dz * z, oy + dy * y, ox + dx * x))
        if rows:
            matrices = np.tile(np.eye(3), (len(rows), 1, 1))
            for i, row in enumerate(rows):
                turn = self.table.crops[crops[row]].plane.turn(turns[row])
                if turn is not None:
                    matrices[i] = turn
            offsets = (2 * u[rows, _JITTER:] - 1) * self.jitter
            positions[rows] = self.table.geometry.around(crops[rows], np.array(points), offsets, matrices)
        elsewhere = u[:, _CENTRED] >= self.fraction
        if elsewhere.any():
            other = self._others.places(u, turns)
            crops, positions, classes = (
                np.where(elsewhere, b, a)
                for a, b in (
                    (crops, other.crops), (positions, other.positions), (classes, other.classes),
                )
            )  # fmt: skip
        return Places(crops, positions, classes)

    def __repr__(self) -> str:
        chosen = "" if self.classes is None else f" of {', '.join(map(str, self.classes))}"
        return f"foreground{chosen} ({self.fraction:.0%}, jitter {self.jitter:g})"


class Mix(Strategy):
    """Several strategies, each for its share of the samples.

    Where nothing is annotated, or no class has a voxel, it is crops by the square root of their volume.

    Args:
        parts: ``{strategy: share}``, or a list of ``{name: .., share: .., and the strategy's own options}``.
    """

    name = "mix"
    #: Two thirds that show every class among what is around it, and a third that is sure to show it.
    DEFAULT: ClassVar[Mapping[str, float]] = {"class_balanced": 2, "foreground": 1}

    def __init__(self, parts: Mapping[str, Any] | Sequence[Any] | None = None) -> None:
        given: Any = self.DEFAULT if parts is None else parts
        if isinstance(given, Mapping):
            given = [{"name": name, "share": share} for name, share in given.items()]
        if not given or isinstance(given, str) or not isinstance(given, Sequence):
            raise CellMapTypeError(f"strategy mix: parts must be {{strategy: share}} or a list, got {parts!r}")
        self.parts: list[Strategy] = []
        self.shares: list[float] = []
        for part in given:
            if not isinstance(part, Mapping) or "name" not in part:
                raise CellMapTypeError(f"strategy mix: a part must be {{name: .., share: ..}}, got {part!r}")
            share = check_weight(part.get("share", 1), f"strategy mix: the share of {part['name']!r}")
            made = parse_strategy({key: value for key, value in part.items() if key != "share"})
            if isinstance(made, Mix):
                raise CellMapValueError("strategy mix: a mix cannot be a part of a mix; name its parts instead")
            self.parts.append(made)
            self.shares.append(share)
        self.uses_weights = any(part.uses_weights for part in self.parts)
        if not sum(self.shares) > 0:
            raise CellMapValueError("strategy mix: every part has the share 0")

    def _check(self) -> None:
        if self._possible(self.table.annotated):
            self.parts = [part.bind(self.table) for part in self.parts]

    def _possible(self, there: npt.NDArray[np.bool_]) -> bool:
        return bool(there.any()) or not any(isinstance(part, _ByClass) for part in self.parts)

    @cached_property
    def _used(self) -> list[tuple[Strategy, float]]:
        """The parts and their shares; where no class has a voxel, crops by their volume."""
        if self._possible(self.table.annotated) and (
            not any(isinstance(part, _ByClass) for part in self.parts) or self._possible(self.table.counts > 0)
        ):
            total = sum(self.shares)
            return [(part, share / total) for part, share in zip(self.parts, self.shares, strict=True) if share > 0]
        log.info(
            "strategy mix: no class has a voxel in these %d crops; they are drawn by the square root of their volume",
            len(self.table),
        )
        return [(_ByRoot().bind(self.table), 1.0)]

    @cached_property
    def _choose_part(self) -> Chooser:
        return Chooser(np.array([[share for _, share in self._used]]))

    def _sum(self, of: Callable[[Strategy], FloatArray]) -> FloatArray:
        total: FloatArray = np.sum([share * of(part) for part, share in self._used], axis=0)
        return total

    @cached_property
    def crop_chances(self) -> FloatArray:
        """See `Strategy`."""
        return self._sum(lambda part: part.crop_chances)

    @cached_property
    def class_chances(self) -> FloatArray:
        """See `Strategy`."""
        return self._sum(lambda part: part.class_chances)

    @property
    def even_chances(self) -> FloatArray | None:
        """See `Strategy`."""
        return self.crop_chances if all(part.even_chances is not None for part, _ in self._used) else None

    def places(self, u: FloatArray, turns: Turns) -> Places:
        """See `Strategy`."""
        chosen = self._choose_part(0, u[:, _PART])
        found = Places(*(np.empty(len(u), np.int64) for _ in range(3)))
        for number, (part, _) in enumerate(self._used):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                places = part.places(u[rows], [turns[row] for row in rows.tolist()])
                found.crops[rows], found.positions[rows] = places.crops, places.positions
                found.classes[rows] = places.classes
        return found

    def __repr__(self) -> str:
        total = sum(self.shares)
        return "mix of " + ", ".join(f"{s / total:.0%} {p!r}" for p, s in zip(self.parts, self.shares, strict=True))


_OPTIONS: Mapping[type[Strategy], tuple[str, ...]] = {
    Uniform: (),
    PerCrop: (),
    Weighted: ("weights",),
    ClassBalanced: (),
    Foreground: ("fraction", "classes", "jitter"),
    Mix: ("parts",),
}
STRATEGIES: Mapping[str, type[Strategy]] = {kind.name: kind for kind in _OPTIONS}


def parse_strategy(given: Any) -> Strategy:
    """A strategy from its name, from ``{name: .., and its options}``, or from a `Strategy`.

    Raises:
        CellMapError: there is none of that name, or it has no such option; the message says what is there.
    """
    if isinstance(given, Strategy):
        return given
    options = {"name": given} if isinstance(given, str) else given
    if not isinstance(options, Mapping) or not isinstance(options.get("name"), str):
        raise CellMapTypeError(
            f"strategy must be one of {', '.join(STRATEGIES)}, or {{name: one of them, and its options}}, got {given!r}"
        )
    _known(options["name"], STRATEGIES, "strategy")
    kind = STRATEGIES[options["name"]]
    for key in options:
        if key != "name" and not _OPTIONS[kind]:
            raise CellMapKeyError(f"strategy {kind.name} has no options, got {key!r}")
        if key != "name":
            _known(str(key), _OPTIONS[kind], f"strategy {kind.name}: option")
    return kind(**{key: value for key, value in options.items() if key != "name"})


def check_weight(value: Any, what: str) -> float:
    """A weight as a float.

    Raises:
        CellMapValueError: it is not a finite number of at least 0.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise CellMapValueError(f"{what} must be a number of at least 0, got {value!r}")
    return float(value)


def _short(label: str) -> str:
    """``crop12`` of ``jrc_a/crop12``."""
    return label.rpartition("/")[2]


def _named(crop: Any) -> str:
    """``crop12`` for the number 12."""
    return f"crop{crop}" if isinstance(crop, int) else str(crop)


def _known(name: str, names: Sequence[str] | Mapping[str, Any], what: str) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, list(names), 1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(list(names)[:12])}"
        raise CellMapKeyError(f"{what} {name!r} does not exist; {hint}")
