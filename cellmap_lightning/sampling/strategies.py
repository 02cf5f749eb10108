"""All sampling strategies by name, and mixtures of them.

A strategy is a function from a few random numbers per sample to a crop and a position. These numbers are drawn from
(seed, number of the sample) alone, so that a "rare" class is defined by voxel counts and not by the samples drawn so
far. Cost does not grow with the number of voxels.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.sampling.class_strategies import ByClass, ClassBalanced, Foreground
from cellmap_lightning.sampling.crop_strategies import BySize, PerCrop, Uniform, Weighted
from cellmap_lightning.sampling.strategy import Choices, Chooser, Column, Strategy, Turns, check_known, check_weight
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)


class Mix(Strategy):
    """A mixture of strategies, each with a share of the samples. See docs/sampling.md.

    If nothing is annotated, or no class has a voxel, crops are drawn by the square root of their volume.

    Args:
        parts: ``{strategy: share}``, or a list of ``{name: .., share: .., and the strategy's own options}``.
    """

    name = "mix"
    #: Two thirds show each class in its usual surroundings, one third are sure to show it.
    DEFAULT: ClassVar[Mapping[str, float]] = {"class_balanced": 2, "foreground": 1}

    def __init__(self, parts: Mapping[str, Any] | Sequence[Any] | None = None) -> None:
        specs: Any = self.DEFAULT if parts is None else parts
        if isinstance(specs, Mapping):
            specs = [{"name": name, "share": share} for name, share in specs.items()]
        if not specs or isinstance(specs, str) or not isinstance(specs, Sequence):
            raise CellMapTypeError(f"strategy mix: parts must be {{strategy: share}} or a list, got {parts!r}")
        self.parts: list[Strategy] = []
        self.shares: list[float] = []
        for spec in specs:
            if not isinstance(spec, Mapping) or "name" not in spec:
                raise CellMapTypeError(f"strategy mix: a part must be {{name: .., share: ..}}, got {spec!r}")
            share = check_weight(spec.get("share", 1), f"strategy mix: the share of {spec['name']!r}")
            strategy = parse_strategy({key: value for key, value in spec.items() if key != "share"})
            if isinstance(strategy, Mix):
                raise CellMapValueError("strategy mix: a mix cannot be a part of a mix; name its parts instead")
            self.parts.append(strategy)
            self.shares.append(share)
        self.uses_weights = any(part.uses_weights for part in self.parts)
        if not sum(self.shares) > 0:
            raise CellMapValueError("strategy mix: every part has the share 0")

    def check(self) -> None:
        """See `Strategy`."""
        if self._possible(self.table.annotated):
            self.parts = [part.bind(self.table) for part in self.parts]

    def _possible(self, exists: npt.NDArray[np.bool_]) -> bool:
        """Return True if no part needs classes, or if any class exists in any crop, ``[crops, classes]``."""
        return bool(exists.any()) or not any(isinstance(part, ByClass) for part in self.parts)

    @cached_property
    def _used(self) -> list[tuple[Strategy, float]]:
        """The parts and their shares; if no class has a voxel, crops by the square root of their volume."""
        needs_classes = any(isinstance(part, ByClass) for part in self.parts)
        # Voxels are counted only if a part needs classes and any are annotated.
        if not needs_classes or (self.table.annotated.any() and (self.table.counts > 0).any()):
            total = sum(self.shares)
            return [(part, share / total) for part, share in zip(self.parts, self.shares, strict=True) if share > 0]
        log.info(
            "strategy mix: no class has a voxel in %s; crops are drawn by the square root of their volume",
            plural(len(self.table), "crop"),
        )
        return [(BySize().bind(self.table), 1.0)]

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

    def choose(self, u: FloatArray, turns: Turns) -> Choices:
        """See `Strategy`."""
        chosen = self._choose_part(0, u[:, Column.PART])
        places = Choices(*(np.empty(len(u), np.int64) for _ in range(3)))
        for number, (part, _) in enumerate(self._used):
            rows = np.flatnonzero(chosen == number)
            if len(rows):
                part_places = part.choose(u[rows], [turns[row] for row in rows.tolist()])
                places.crops[rows], places.positions[rows] = part_places.crops, part_places.positions
                places.classes[rows] = part_places.classes
        return places

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


def parse_strategy(value: Any) -> Strategy:
    """Create a strategy from its name, from ``{name: .., and its options}``, or return a `Strategy` unchanged.

    Raises:
        CellMapError: the name or an option does not exist; the message lists those that do.

    Example:
        >>> parse_strategy({"name": "foreground", "classes": ["mito"], "jitter": 0.2})
        foreground of mito (100%, jitter 0.2)
    """
    if isinstance(value, Strategy):
        return value
    spec = {"name": value} if isinstance(value, str) else value
    if not isinstance(spec, Mapping) or not isinstance(spec.get("name"), str):
        raise CellMapTypeError(
            f"strategy must be one of {', '.join(STRATEGIES)}, or {{name: one of them, and its options}}, got {value!r}"
        )
    check_known(spec["name"], STRATEGIES, "strategy")
    kind = STRATEGIES[spec["name"]]
    options = {key: option for key, option in spec.items() if key != "name"}
    for key in options:
        if not _OPTIONS[kind]:
            raise CellMapKeyError(f"strategy {kind.name} has no options, got {key!r}")
        check_known(str(key), _OPTIONS[kind], f"strategy {kind.name}: option")
    return kind(**options)
