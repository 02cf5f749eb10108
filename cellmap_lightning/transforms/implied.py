"""Presence and absence of classes by implication: parts of other classes, and classes that exclude each other."""

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.io.missing_paths import missing
from cellmap_lightning.transforms.targets import Relations, infer_exclusive, set_bits, unpack_class

RULES = ("subset", "superset")

Mask = npt.NDArray[np.bool_]
DEFAULT_TABLE = Path(__file__).parent / "classes.csv"


@cache
def read_table(path: str | Path) -> Mapping[str, frozenset[int]]:
    """Read the atomic ids of each class from a table.

    Args:
        path: a CSV with rows of ``name, id, "included ids"``; a class without included ids is atomic itself.

    Raises:
        CellMapFileNotFoundError: the file does not exist.
        CellMapValueError: a row that cannot be read.
    """
    try:
        rows = list(csv.reader(Path(path).read_text(encoding="utf-8").splitlines()))
    except FileNotFoundError:
        raise missing(Path(path), "the class table") from None
    table: dict[str, frozenset[int]] = {}
    for number, row in enumerate(rows, 1):
        if not row or row[0].startswith("#"):
            continue
        try:
            name, class_id, included = row[0].strip(), int(row[1]), row[2] if len(row) > 2 else ""
            table[name] = frozenset(int(i) for i in included.split(",")) if included.strip() else frozenset([class_id])
        except (IndexError, ValueError):
            raise CellMapValueError(f'{path}, line {number}: name, id, "included ids" are needed, got {row}') from None
    return table


class Implications:
    """Implications for the requested classes from all classes that are read.

    Args:
        classes: the requested classes.
        annotated: the classes that the crop annotates.
        rules: any of ``subset`` (a class is present where one of its parts is, and absent where all its parts are) and
            ``superset`` (a class is absent where a class that includes it is).
        table: a class table; by default that of the CellMap Segmentation Challenge.
        exclusive: ``{class: [classes that exclude it]}``; see `infer_exclusive`.

    Attributes:
        read: the classes to read: the requested ones, then those that imply something about them.

    Raises:
        CellMapKeyError: an unknown rule.
        CellMapValueError: an exclusion that is not a list.

    Example:
        >>> Implications(["cell"], ["mito"], rules=["subset"]).read
        ('cell', 'mito')
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
        excluders = _excluders(exclusive or {}, classes)
        related = {other for others in excluders.values() for other in others if other in annotated}
        requested = frozenset[int]().union(*(atoms.get(name, ()) for name in classes))
        related |= {name for name in annotated if atoms.get(name, frozenset()) & requested}
        self.read = (*classes, *sorted(related - set(classes)))
        self._exclusive: Relations = {
            classes.index(name): [self.read.index(other) for other in others if other in self.read]
            for name, others in excluders.items()
        }
        self._atoms = [atoms.get(name, frozenset()) for name in self.read]
        self._count = len(classes)

    def __bool__(self) -> bool:
        return bool(self.rules or any(self._exclusive.values()))

    @property
    def identity(self) -> tuple[object, ...]:
        """All that these implications depend on, for comparison."""
        exclusive = sorted((index, tuple(sorted(others))) for index, others in self._exclusive.items())
        atoms = [sorted(part) for part in self._atoms] if self.rules else []
        return self._count, self.read, self.rules, exclusive, atoms

    def apply(self, packed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        """Add implied voxels to the packed voxels of the classes in `read`, in place; annotations are unchanged."""
        if self.rules:
            self._apply_parts(packed)
        if any(self._exclusive.values()):
            infer_exclusive(packed, self._exclusive)

    def _apply_parts(self, packed: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> None:
        """Apply the rules ``subset`` and ``superset``, from the annotations alone and not from what they imply."""
        voxels = [unpack_class(packed, index) for index in range(len(self.read))]
        for index in range(self._count):
            if not self._atoms[index]:
                continue
            unknown = ~voxels[index][1]
            present, absent = self._implied(index, voxels)
            present &= unknown
            absent &= unknown & ~present
            set_bits(packed, index, present, present | absent)

    def _implied(self, index: int, voxels: Sequence[tuple[Mask, Mask]]) -> tuple[Mask, Mask]:
        """Return where the other classes imply that a class is present, and where they imply that it is absent.

        Args:
            index: position of the class.
            voxels: where each class is present, and where it is known.
        """
        atoms = self._atoms[index]
        present, absent = np.zeros_like(voxels[index][0]), np.zeros_like(voxels[index][0])
        #: Where each atom of the class is absent, by a part of the class that is annotated as absent there.
        atom_absent: dict[int, Mask] = {}
        for other, (other_present, other_known) in enumerate(voxels):
            other_atoms = self._atoms[other]
            if other == index or not other_atoms:
                continue
            other_absent = other_known & ~other_present
            if other_atoms <= atoms and "subset" in self.rules:
                present |= other_present
                for atom in other_atoms:
                    atom_absent[atom] = atom_absent.get(atom, False) | other_absent
            if other_atoms >= atoms and "superset" in self.rules:
                absent |= other_absent
        if len(atom_absent) == len(atoms):  # otherwise a part is not annotated at all
            absent |= np.logical_and.reduce(list(atom_absent.values()))
        return present, absent


def _excluders(exclusive: Mapping[str, Any], classes: Sequence[str]) -> dict[str, set[str]]:
    """Return the classes that exclude each requested class.

    Raises:
        CellMapValueError: an exclusion that is not a list.
    """
    for name, others in exclusive.items():
        if isinstance(others, str) or not hasattr(others, "__iter__"):
            raise CellMapValueError(f"class_relation_dict[{name!r}] must be a list or set of classes, got {others!r}")
    return {name: set(others) - {name} for name, others in exclusive.items() if name in classes}
