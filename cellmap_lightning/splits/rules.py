"""Which crops validate: rules that are functions of a seed, names, and what is known of each crop. Nothing is read."""

import difflib
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapIndexError, CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import Box

SplitRule = Literal["csv", "random", "stratified", "by_dataset", "leave_one_dataset_out", "kfold"]
RULES: tuple[str, ...] = get_args(SplitRule)

#: Orders that are tried while a class is missing that another order may bring in, and rounds in each.
_ATTEMPTS, _ROUNDS = 12, 40
#: What shares and sizes are rounded to, so that they add up to the same number on every machine.
_UNIT = 1e6

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Crop:
    """What a rule knows of a crop.

    Attributes:
        name: tells it from the others, such as ``jrc_hela-2/crop1``; crops of one name are never parted.
        dataset: the volume that it lies in.
        classes: the classes that it holds.
        box: where it lies in its dataset, in nm; None where that is not known, and then it overlaps nothing.
    """

    name: str
    dataset: str
    classes: frozenset[str] = frozenset()
    box: Box | None = None


def check_split(split: Any, val_fraction: Any, fold: Any, n_folds: Any) -> None:
    """Refuse what cannot be right whatever the crops are.

    Raises:
        CellMapKeyError: there is no such rule.
        CellMapError: a number that is none, or out of its range.
    """
    if split not in RULES:
        close = difflib.get_close_matches(str(split), RULES, 1)
        raise CellMapKeyError(
            f"split is one of {', '.join(RULES)}, got {split!r}" + (f"; did you mean {close[0]!r}?" if close else "")
        )
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 < val_fraction < 1:
        raise CellMapValueError(f"val_fraction must be a number between 0 and 1, got {val_fraction!r}")
    for name, value, least in (("fold", fold, 0), ("n_folds", n_folds, 2)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise CellMapTypeError(f"{name} must be a whole number, got {value!r}")
        if value < least:
            raise CellMapValueError(f"{name} must be at least {least}, got {value}")
    if split == "kfold" and fold >= n_folds:
        raise CellMapIndexError(f"fold {fold} is out of range: n_folds={n_folds} makes the folds 0 to {n_folds - 1}")


def assign(
    crops: Sequence[Crop],
    split: str,
    *,
    val_fraction: float = 0.1,
    fold: int = 0,
    n_folds: int = 5,
    seed: int = 0,
) -> list[Literal["train", "val"]]:
    """The usage of each crop, whatever the order in which they are listed.

    Crops that overlap stay together. Every class that two of what stays together hold is in val, and stays in train as
    well, wherever both can be had at once; then the sizes count, then, if stratified, the share of each class.

    Args:
        crops: the annotated crops.
        split: ``random`` (by a hash of seed and name), ``stratified`` (the same, and evened out so that val has
            ``val_fraction`` of the crops of each class), ``by_dataset`` (random, whole datasets), ``kfold``
            (``n_folds`` stratified parts, of which ``fold`` validates), ``leave_one_dataset_out`` (the dataset of
            number ``fold`` in alphabetical order validates).
        val_fraction: the part of the crops that validates.
        fold: see ``split``.
        n_folds: see ``split``.
        seed: another one gives another split.

    Raises:
        CellMapError: what is asked for cannot be had from these crops.
    """
    check_split(split, val_fraction, fold, n_folds)
    if split == "csv":
        raise CellMapValueError("split=csv is no rule: the CSV itself says which crops validate")
    datasets = sorted({crop.dataset for crop in crops})
    if split == "leave_one_dataset_out":
        if len(datasets) < 2:
            raise CellMapValueError(
                f"split=leave_one_dataset_out needs two datasets at least, and there is {_listed(datasets)}"
            )
        if fold >= len(datasets):
            raise CellMapIndexError(
                f"fold {fold} is out of range: split=leave_one_dataset_out numbers the {len(datasets)} datasets "
                f"{_listed(datasets)} from 0 to {len(datasets) - 1}"
            )
        return ["val" if crop.dataset == datasets[fold] else "train" for crop in crops]
    groups = together(crops, whole_datasets=split == "by_dataset")
    needed = n_folds if split == "kfold" else 2
    if len(groups) < needed:
        what = "datasets" if split == "by_dataset" else "crops that do not overlap"
        parts = f"n_folds={n_folds}" if split == "kfold" else f"split={split}"
        raise CellMapValueError(
            f"{parts} needs {needed} {what} at least, and there {'is' if len(groups) == 1 else 'are'} {len(groups)}: "
            + _listed([crops[group[0]].dataset if split == "by_dataset" else crops[group[0]].name for group in groups])
        )
    if split == "kfold":
        shares = [1 / n_folds] * n_folds
    else:
        # Whole crops: their number is known before anything is drawn.
        count = min(max(math.floor(val_fraction * len(crops) + 0.5), 1), len(crops) - 1)
        fold, shares = 0, [count / len(crops), 1 - count / len(crops)]
    even = split in ("stratified", "kfold")
    chosen = _Parts(crops, groups, shares, folds=split == "kfold", even=even, seed=seed).best()
    usages: list[Literal["train", "val"]] = ["train"] * len(crops)
    for group, part in zip(groups, chosen, strict=True):
        for index in group:
            if part == fold:
                usages[index] = "val"
    return usages


def together(crops: Sequence[Crop], whole_datasets: bool = False) -> list[list[int]]:
    """Positions of the crops that must not be parted, each group and all of them in the order of the names.

    Crops belong together that overlap, directly or through others, and those of one name; ``whole_datasets`` adds those
    of one dataset.
    """
    parent = list(range(len(crops)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    by_dataset: dict[str, list[int]] = {}
    first: dict[str, int] = {}
    for i, crop in enumerate(crops):
        parent[root(i)] = root(first.setdefault(crop.name, i))
        by_dataset.setdefault(crop.dataset, []).append(i)
    for members in by_dataset.values():
        for n, i in enumerate(members):
            for j in members[:n]:
                a, b = crops[i].box, crops[j].box
                if whole_datasets or (a is not None and b is not None and a.intersects(b)):
                    parent[root(i)] = root(j)
    groups: dict[int, list[int]] = {}
    for i in sorted(range(len(crops)), key=lambda i: crops[i].name):
        groups.setdefault(root(i), []).append(i)
    return list(groups.values())


def missing_classes(crops: Sequence[Crop], usages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Classes that two crops hold and val does not, and classes that train does not hold although a crop does."""
    held = Counter(name for crop in crops for name in crop.classes)
    of = {
        usage: {name for crop, own in zip(crops, usages, strict=True) if own == usage for name in crop.classes}
        for usage in ("train", "val")
    }
    return sorted(name for name, n in held.items() if n > 1 and name not in of["val"]), sorted(set(held) - of["train"])


class _Parts:
    """Groups of crops, divided into parts.

    They are dealt out in an order that a hash gives; then groups are moved and pairs exchanged while that makes
    anything better.

    Args:
        crops: the crops.
        groups: positions of those that stay together.
        shares: the part of the crops that each part should have; if not ``folds`` the first validates.
        folds: each part validates in its turn.
        even: each class should have the same shares.
        seed: of the hash.
    """

    def __init__(
        self, crops: Sequence[Crop], groups: list[list[int]], shares: list[float], folds: bool, even: bool, seed: int
    ) -> None:
        classes = sorted({name for crop in crops for name in crop.classes})
        column = {name: n for n, name in enumerate(classes)}
        self.names = [crops[group[0]].name for group in groups]
        self.size: Ints = np.array([len(group) for group in groups])
        #: Crops of each group that hold each class.
        self.holds: Ints = np.zeros((len(groups), len(classes)), np.int64)
        for row, group in zip(self.holds, groups, strict=True):
            for index in group:
                for name in crops[index].classes:
                    row[column[name]] += 1
        self.total: Ints = self.holds.sum(0)
        self.shares = np.array(shares)
        self.validating = slice(None) if folds else slice(0, 1)
        self.even, self.seed = even, seed
        spread = (self.holds > 0).sum(0)
        self.shared = spread > 1
        # What no division can better: a class of two groups is in two folds only, and one of a single group is in train
        # in all folds but one.
        self.bound = (
            (0, int(np.maximum(len(shares) - spread, 0)[self.shared].sum()), int((~self.shared).sum()))
            if folds
            else (0, 0, 0)
        )

    def best(self) -> Ints:
        """``[groups]``, the part of each."""
        found: list[tuple[tuple[int, ...], Ints]] = []
        for attempt in range(_ATTEMPTS):
            part = self._improved(attempt)
            # Orders are compared by what is missing alone: the first of them is the seed's own.
            wrong = tuple(int(n) for n in self._wrong(*self._sums(part))[0][:3])
            found.append((wrong, part))
            if wrong <= self.bound:
                break
        return min(found, key=lambda f: f[0])[1]

    def _order(self, attempt: int) -> list[int]:
        def drawn(index: int) -> bytes:
            return hashlib.blake2b(f"{self.seed}/{attempt}/{self.names[index]}".encode(), digest_size=16).digest()

        return sorted(range(len(self.names)), key=drawn)

    def _sums(self, part: Ints) -> tuple[Ints, Ints]:
        """Crops of each class ``[1, parts, classes]``, and crops ``[1, parts]``."""
        of = np.arange(len(self.shares))[:, None] == part
        return (of @ self.holds)[None], (of @ self.size)[None]

    def _wrong(self, held: Ints, size: Ints) -> Ints:
        """What is wrong with divisions, the worst first.

        Args:
            held: ``[divisions, parts, classes]`` crops that hold a class.
            size: ``[divisions, parts]`` crops.

        Returns:
            ``[divisions, 5]``: empty parts; classes that miss in val, and in train; how far the sizes are off; how
            uneven the classes are.
        """
        own = held[:, self.validating]
        shares = self.shares[self.validating]
        off = np.abs(size[:, self.validating] - shares * self.size.sum())
        uneven = np.zeros(own.shape)
        if self.even:
            uneven = (own / np.maximum(self.total, 1) - shares[:, None]) ** 2
        return np.stack(
            [
                (size == 0).sum(1),
                ((own == 0) & self.shared).sum((1, 2)),
                (own == self.total).sum((1, 2)),
                np.rint(off * _UNIT).astype(np.int64).sum(1),
                np.rint(uneven * _UNIT).astype(np.int64).sum((1, 2)),
            ],
            axis=1,
        )

    def _improved(self, attempt: int) -> Ints:
        order = self._order(attempt)
        part = self._dealt(order, attempt)
        held, size = self._sums(part)
        wrong = tuple(self._wrong(held, size)[0])
        for _ in range(_ROUNDS):
            before = wrong
            for group in order:
                # Every move of this group to another part, then every exchange with a group there.
                mine = part[group]
                others = np.array([other for other in order if part[other] != mine], np.int64)
                targets = np.array([p for p in range(len(self.shares)) if p != mine], np.int64)
                target = np.concatenate([targets, part[others]])
                back = np.concatenate([np.zeros((len(targets), self.holds.shape[1]), np.int64), self.holds[others]])
                weight = np.concatenate([np.zeros(len(targets), np.int64), self.size[others]])
                rows = np.arange(len(target))
                new_held, new_size = np.repeat(held, len(target), 0), np.repeat(size, len(target), 0)
                new_held[:, mine] += back - self.holds[group]
                new_held[rows, target] += self.holds[group] - back
                new_size[:, mine] += weight - self.size[group]
                new_size[rows, target] += self.size[group] - weight
                options = self._wrong(new_held, new_size)
                choice = int(np.lexsort(options.T[::-1])[0])
                if tuple(options[choice]) < wrong:
                    if choice >= len(targets):
                        part[others[choice - len(targets)]] = mine
                    part[group] = target[choice]
                    held, size, wrong = new_held[[choice]], new_size[[choice]], tuple(options[choice])
            if wrong == before:
                break
        return part

    def _dealt(self, order: list[int], attempt: int) -> Ints:
        """Each group to a part: the first attempt fills val in the order of the hash, the others mix more freely."""
        part: Ints = np.full(len(self.names), len(self.shares) - 1, np.int64)
        if attempt == 0 and len(self.shares) == 2:
            left = round(self.shares[0] * self.size.sum())
            for index in order:
                if self.size[index] <= left:
                    part[index] = 0
                    left -= int(self.size[index])
        else:
            part[order] = np.arange(len(order)) % len(self.shares)
        return part


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "none"
