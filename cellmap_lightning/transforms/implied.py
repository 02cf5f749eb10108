"""What is known by implication: of classes that are parts of others, and of classes that exclude each other."""

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapKeyError, CellMapValueError
from cellmap_lightning.transforms.targets import Relations, infer_exclusive

RULES = ("subset", "superset")
DEFAULT_TABLE = Path(__file__).parent / "classes.csv"


@cache
def read_table(path: str | Path) -> Mapping[str, frozenset[int]]:
    """Atomic ids of each class: rows of ``name, id, "included ids"``; a class that includes none is atomic itself.

    Raises:
        CellMapFileNotFoundError: there is no such file.
        CellMapValueError: a row that cannot be read.
    """
    try:
        rows = list(csv.reader(Path(path).read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        raise CellMapFileNotFoundError(f"the class table {path} does not exist") from None
    table: dict[str, frozenset[int]] = {}
    for number, row in enumerate(rows, 1):
        if not row or row[0].startswith("#"):
            continue
        try:
            name, own, included = row[0].strip(), int(row[1]), row[2] if len(row) > 2 else ""
            table[name] = frozenset(int(i) for i in included.split(",")) if included.strip() else frozenset([own])
        except (IndexError, ValueError):
            raise CellMapValueError(f'{path}, line {number}: name, id, "included ids" are needed, got {row}') from None
    return table


class Implications:
    """What follows for the classes that are asked for from those that are read.

    Args:
        classes: the classes that are asked for.
        annotated: the classes that the crop annotates.
        rules: any of ``subset`` (where a part is present so is the whole; where every part is known to be absent the
            whole is too) and ``superset`` (where the whole is absent so is each part).
        table: a class table; by default that of the CellMap Segmentation Challenge.
        exclusive: ``{class: [classes that exclude it]}``; see `infer_exclusive`.

    Attributes:
        read: the classes to read: those that are asked for, then those that say something about them.

    Raises:
        CellMapKeyError: an unknown rule.
        CellMapValueError: an exclusion that is no list.
    """

    def __init__(
        self,
        classes: Sequence[str],
        annotated: Sequence[str],
        rules: Sequence[str] = (),
        table: str | Path | None = None,
        exclusive: Mapping[str, Any] | None = None,
    ) -> None:
        unknown = [r for r in rules if r not in RULES]
        if isinstance(rules, str) or unknown:
            raise CellMapKeyError(f"infer must be a list of {' and '.join(RULES)}, got {rules!r}")
        self.rules = tuple(rules)
        atoms = read_table(table or DEFAULT_TABLE) if self.rules else {}
        more: list[str] = []
        for name, others in (exclusive or {}).items():
            if isinstance(others, str) or not hasattr(others, "__iter__"):
                raise CellMapValueError(
                    f"class_relation_dict[{name!r}] must be a list or set of classes, got {others!r}"
                )
            if name in classes:
                more += [o for o in others if o in annotated]
        for name in annotated:
            wanted = atoms.get(name, frozenset())
            if any(wanted & atoms.get(c, frozenset()) for c in classes):
                more.append(name)
        self.read = (*classes, *sorted(set(more) - set(classes)))
        self._exclusive: Relations = {
            classes.index(name): [self.read.index(o) for o in set(others) if o in self.read and o != name]
            for name, others in (exclusive or {}).items()
            if name in classes
        }
        self._atoms = [atoms.get(name, frozenset()) for name in self.read]
        self._count = len(classes)

    def __bool__(self) -> bool:
        return bool(self.rules or any(self._exclusive.values()))

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells these implications from others."""
        exclusive = sorted((index, tuple(sorted(others))) for index, others in self._exclusive.items())
        atoms = [sorted(part) for part in self._atoms] if self.rules else []
        return self._count, self.read, self.rules, exclusive, atoms

    def apply(self, packed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        """Add what is implied to the packed voxels of the classes in `read`, in place. Annotations stay as they are."""
        if self.rules:
            self._apply_parts(packed)
        if any(self._exclusive.values()):
            infer_exclusive(packed, self._exclusive)

    def _apply_parts(self, packed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        present, known = [], []
        for index in range(len(self.read)):
            bit = np.uint8(1 << (index % 8))
            present.append((packed[..., 2 * (index // 8)] & bit) != 0)
            known.append((packed[..., 2 * (index // 8) + 1] & bit) != 0)
        for index in range(self._count):
            mine = self._atoms[index]
            if not mine:
                continue
            unsure = ~known[index]
            yes, no = np.zeros_like(unsure), np.zeros_like(unsure)
            missing = dict.fromkeys(mine, True)
            covered = {atom: np.zeros_like(unsure) for atom in mine}
            for other, theirs in enumerate(self._atoms):
                if other == index or not theirs:
                    continue
                absent = known[other] & ~present[other]
                if theirs <= mine and "subset" in self.rules:
                    yes |= present[other]
                    for atom in theirs:
                        covered[atom] |= absent
                        missing[atom] = False
                if theirs >= mine and "superset" in self.rules:
                    no |= absent
            if "subset" in self.rules and not any(missing.values()):
                everything = np.ones_like(unsure)
                for seen in covered.values():
                    everything &= seen
                no |= everything
            byte, bit = 2 * (index // 8), np.uint8(1 << (index % 8))
            yes &= unsure
            no &= unsure & ~yes
            packed[..., byte] |= yes.view(np.uint8) * bit
            packed[..., byte + 1] |= (yes | no).view(np.uint8) * bit
