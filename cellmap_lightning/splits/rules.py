"""Rules that choose the crops for validation, as functions of a seed, names and crop metadata; they read nothing."""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapIndexError, CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import Box
from cellmap_lightning.validation import first_few, int_at_least, one_of

SplitRule = Literal["csv", "random", "stratified", "by_dataset", "leave_one_dataset_out", "kfold", "blocks"]
RULES: tuple[str, ...] = get_args(SplitRule)
Usage = Literal["train", "val"]

#: Initial orders that are tried while a class is missing in a split, and rounds of improvement of each.
_ATTEMPTS, _ROUNDS = 12, 40
#: Costs are rounded to multiples of 1 / _UNIT, so that their sums are the same on every machine.
_UNIT = 1e6

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CandidateCrop:
    """A crop that a rule assigns to training or validation, by its name, classes and box; see docs/data.md.

    Attributes:
        name: its name, such as ``jrc_hela-2/crop1``; crops with the same name stay in the same split.
        dataset: the volume that it lies in.
        classes: the classes that it holds.
        box: its box in the dataset, nm; None if unknown, in which case it overlaps nothing.
    """

    name: str
    dataset: str
    classes: frozenset[str] = frozenset()
    box: Box | None = None


def check_split(split: Any, val_fraction: Any, fold: Any, n_folds: Any) -> None:
    """Check the options of a rule, independent of the crops.

    Raises:
        CellMapKeyError: the rule does not exist.
        CellMapError: a number is invalid or out of range.
    """
    one_of("split", split, RULES, CellMapKeyError)
    if isinstance(val_fraction, bool) or not isinstance(val_fraction, int | float) or not 0 < val_fraction < 1:
        raise CellMapValueError(f"val_fraction must be a number between 0 and 1, got {val_fraction!r}")
    int_at_least("fold", fold, 0)
    int_at_least("n_folds", n_folds, 2)
    if split == "kfold" and fold >= n_folds:
        raise CellMapIndexError(f"fold must be in [0, {n_folds}) with n_folds={n_folds}, got {fold}")


def assign(
    crops: Sequence[CandidateCrop],
    split: str,
    *,
    val_fraction: float = 0.1,
    fold: int = 0,
    n_folds: int = 5,
    seed: int = 0,
) -> list[Usage]:
    """Return the usage of each crop, independent of the order of the crops.

    Crops that overlap stay together. Criteria, the most important first: every class with two such groups is in val,
    every class stays in train, sizes match, and, if stratified, so do the shares of each class.

    Args:
        crops: the annotated crops.
        split: ``random`` (by a hash of seed and name), ``stratified`` (the same, then improved until val has
            ``val_fraction`` of the crops of each class), ``by_dataset`` (random, whole datasets), ``kfold``
            (``n_folds`` stratified parts; part ``fold`` is for validation), ``leave_one_dataset_out`` (the dataset
            with number ``fold`` in alphabetical order is for validation).
        val_fraction: share of the crops for validation.
        fold: see ``split``.
        n_folds: see ``split``.
        seed: random seed.

    Raises:
        CellMapError: the rule cannot divide these crops.
    """
    check_split(split, val_fraction, fold, n_folds)
    if split == "csv":
        raise CellMapValueError("split=csv is not a rule: the CSV itself defines the crops for validation")
    if split == "leave_one_dataset_out":
        return _leave_one_dataset_out(crops, fold)
    groups = together(crops, whole_datasets=split == "by_dataset")
    needed = n_folds if split == "kfold" else 2
    if len(groups) < needed:
        unit = "datasets" if split == "by_dataset" else "crops that do not overlap"
        option = f"n_folds={n_folds}" if split == "kfold" else f"split={split}"
        names = [crops[group[0]].dataset if split == "by_dataset" else crops[group[0]].name for group in groups]
        raise CellMapValueError(f"{option} needs at least {needed} {unit}, got {len(groups)}: {_listed(names)}")
    if split == "kfold":
        shares = [1 / n_folds] * n_folds
    else:
        # The share of a whole number of crops, so that it can be reached exactly.
        count = min(max(math.floor(val_fraction * len(crops) + 0.5), 1), len(crops) - 1)
        fold, shares = 0, [count / len(crops), 1 - count / len(crops)]
    even = split in ("stratified", "kfold")
    parts = _Parts(crops, groups, shares, folds=split == "kfold", even=even, seed=seed).best()
    usages: list[Usage] = ["train"] * len(crops)
    for group, part in zip(groups, parts, strict=True):
        for index in group:
            if part == fold:
                usages[index] = "val"
    return usages


def _leave_one_dataset_out(crops: Sequence[CandidateCrop], fold: int) -> list[Usage]:
    datasets = sorted({crop.dataset for crop in crops})
    if len(datasets) < 2:
        raise CellMapValueError(f"split=leave_one_dataset_out needs at least two datasets, got {_listed(datasets)}")
    if fold >= len(datasets):
        raise CellMapIndexError(
            f"fold must be in [0, {len(datasets)}) with split=leave_one_dataset_out and the datasets "
            f"{_listed(datasets)}, got {fold}"
        )
    return ["val" if crop.dataset == datasets[fold] else "train" for crop in crops]


def together(crops: Sequence[CandidateCrop], whole_datasets: bool = False) -> list[list[int]]:
    """Return groups of crops that must stay in the same split, sorted by name, as positions of the crops.

    Crops are grouped that overlap, directly or through others, and that have the same name; with ``whole_datasets``
    also those of one dataset.
    """
    parent = list(range(len(crops)))  # a union-find forest

    def root(i: int) -> int:
        """Return the representative of a crop's group, with path halving."""
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    # Boxes are only comparable within a dataset, so that pairs are compared per dataset.
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


def missing_classes(crops: Sequence[CandidateCrop], usages: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the classes of two or more crops that are missing in val, and all classes that are missing in train."""
    counts = Counter(name for crop in crops for name in crop.classes)
    present: dict[str, set[str]] = {"train": set(), "val": set()}
    for crop, usage in zip(crops, usages, strict=True):
        present[usage] |= crop.classes
    in_val = sorted(name for name, count in counts.items() if count > 1 and name not in present["val"])
    return in_val, sorted(set(counts) - present["train"])


class _Parts:
    """Division of groups of crops into parts, by a deterministic local search.

    Groups are assigned in a pseudorandom order given by a hash; then single groups are moved and pairs exchanged while
    that lowers the cost.

    Args:
        crops: the crops.
        groups: positions of the crops that stay together.
        shares: target share of the crops of each part; without ``folds`` the first part is for validation.
        folds: True if each part is used for validation in turn.
        even: True if each class should be divided by the same shares.
        seed: seed of the hash.
    """

    def __init__(
        self,
        crops: Sequence[CandidateCrop],
        groups: list[list[int]],
        shares: list[float],
        folds: bool,
        even: bool,
        seed: int,
    ) -> None:
        classes = sorted({name for crop in crops for name in crop.classes})
        column = {name: n for n, name in enumerate(classes)}
        self.names = [crops[group[0]].name for group in groups]
        self.size: Ints = np.array([len(group) for group in groups])
        #: ``[groups, classes]``, number of crops that hold a class.
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
        # Lower bounds of the first three costs: a class in two groups is in at most two folds, and a class in one group
        # is missing in train when its fold is for validation.
        self.bound = (
            (0, int(np.maximum(len(shares) - spread, 0)[self.shared].sum()), int((~self.shared).sum()))
            if folds
            else (0, 0, 0)
        )

    def best(self) -> Ints:
        """Return ``[groups]``, the part of each group."""
        divisions: list[tuple[tuple[int, ...], Ints]] = []
        for attempt in range(_ATTEMPTS):
            part = self._improved(attempt)
            # Orders are compared by missing classes only, so that the first order is used wherever it is sufficient.
            cost = tuple(int(n) for n in self._costs(*self._sums(part))[0][:3])
            divisions.append((cost, part))
            if cost <= self.bound:
                break
        return min(divisions, key=lambda division: division[0])[1]

    def _order(self, attempt: int) -> list[int]:
        """Return the groups in a pseudorandom order."""

        def digest(index: int) -> bytes:
            return hashlib.blake2b(f"{self.seed}/{attempt}/{self.names[index]}".encode(), digest_size=16).digest()

        return sorted(range(len(self.names)), key=digest)

    def _sums(self, part: Ints) -> tuple[Ints, Ints]:
        """Return the crops of each class ``[1, parts, classes]``, and the crops ``[1, parts]``."""
        members = np.arange(len(self.shares))[:, None] == part
        return (members @ self.holds)[None], (members @ self.size)[None]

    def _costs(self, held: Ints, size: Ints) -> Ints:
        """Return the costs of several divisions, the most important first, to be compared lexicographically.

        Args:
            held: ``[divisions, parts, classes]``, crops that hold a class.
            size: ``[divisions, parts]``, crops.

        Returns:
            ``[divisions, 5]``: empty parts; classes missing in val; classes missing in train; deviation of the sizes;
            unevenness of the classes.
        """
        val_held = held[:, self.validating]
        shares = self.shares[self.validating]
        deviation = np.abs(size[:, self.validating] - shares * self.size.sum())
        unevenness = np.zeros(val_held.shape)
        if self.even:
            unevenness = (val_held / np.maximum(self.total, 1) - shares[:, None]) ** 2
        return np.stack(
            [
                (size == 0).sum(1),
                ((val_held == 0) & self.shared).sum((1, 2)),
                (val_held == self.total).sum((1, 2)),
                np.rint(deviation * _UNIT).astype(np.int64).sum(1),
                np.rint(unevenness * _UNIT).astype(np.int64).sum((1, 2)),
            ],
            axis=1,
        )

    def _improved(self, attempt: int) -> Ints:
        """Return a division that no move of a group and no exchange of two groups improves."""
        order = self._order(attempt)
        part = self._initial(order, attempt)
        held, size = self._sums(part)
        cost = tuple(self._costs(held, size)[0])
        for _ in range(_ROUNDS):
            before = cost
            for group in order:
                # All moves of this group to another part, then all exchanges with a group there, evaluated at once.
                current = part[group]
                others = np.array([other for other in order if part[other] != current], np.int64)
                targets = np.array([p for p in range(len(self.shares)) if p != current], np.int64)
                # For each option: the group's new part, and what comes back in exchange (nothing for a move).
                target = np.concatenate([targets, part[others]])
                back = np.concatenate([np.zeros((len(targets), self.holds.shape[1]), np.int64), self.holds[others]])
                weight = np.concatenate([np.zeros(len(targets), np.int64), self.size[others]])
                rows = np.arange(len(target))
                new_held, new_size = np.repeat(held, len(target), 0), np.repeat(size, len(target), 0)
                new_held[:, current] += back - self.holds[group]
                new_held[rows, target] += self.holds[group] - back
                new_size[:, current] += weight - self.size[group]
                new_size[rows, target] += self.size[group] - weight
                costs = self._costs(new_held, new_size)
                choice = int(np.lexsort(costs.T[::-1])[0])  # lexsort takes the most important key last
                if tuple(costs[choice]) < cost:
                    if choice >= len(targets):
                        part[others[choice - len(targets)]] = current
                    part[group] = target[choice]
                    held, size, cost = new_held[[choice]], new_size[[choice]], tuple(costs[choice])
            if cost == before:
                break
        return part

    def _initial(self, order: list[int], attempt: int) -> Ints:
        """Return an initial division: the first attempt fills val in the order of the hash, others alternate parts."""
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
    """Return at most twelve names, for messages."""
    return first_few(names, 12) if names else "none"
