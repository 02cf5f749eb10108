"""How often each class is met: what a strategy promises, and what samples that were drawn and read really show."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellmap_lightning.datasets.source import Draw, SampleSource
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.runtime.rng import PLACE, uniforms
from cellmap_lightning.sampling.strategies import parse_strategy
from cellmap_lightning.sampling.strategy import NUMBERS, Strategy

#: Samples that are read at a time.
_TOGETHER = 16


@dataclass(frozen=True)
class ClassFrequency:
    """How often one class is met, as shares of the samples unless something else is said.

    Attributes:
        name: the class.
        expected_drawn: that should be drawn for it.
        drawn: that were.
        expected_crop: that should be from a crop that holds it.
        crop: that were.
        expected_voxels: of the voxels of all patches, that should be it; None where a strategy prefers some positions.
        voxels: of these, that were.
        shown: whose patch shows a voxel of it.
        kept: of those that were drawn for it, whose patch shows it; NaN without any.
    """

    name: str
    expected_drawn: float
    drawn: float
    expected_crop: float
    crop: float
    expected_voxels: float | None
    voxels: float
    shown: float
    kept: float


@dataclass(frozen=True)
class ClassFrequencies:
    """What `class_frequencies` found; its text is a table.

    Attributes:
        strategy: what was measured.
        samples: how many samples were drawn and read.
        rows: one per class.
    """

    strategy: str
    samples: int
    rows: Sequence[ClassFrequency]

    def error(self, expected: float) -> float:
        """Standard deviation of an achieved share, by chance alone."""
        return float(np.sqrt(expected * (1 - expected) / self.samples))

    def __str__(self) -> str:
        width = max(5, *(len(row.name) for row in self.rows))
        lines = [
            f"{self.strategy}: {self.samples} samples; expected and achieved shares in %",
            f"{'class':<{width}}  drawn for it     crop holds it    its voxels       patch shows it  if drawn for it",
        ]
        for row in self.rows:
            pairs = [
                f"{'-' if wanted is None else f'{100 * wanted:.2f}':>6} {100 * found:>6.2f}"
                for wanted, found in (
                    (row.expected_drawn, row.drawn),
                    (row.expected_crop, row.crop),
                    (row.expected_voxels, row.voxels),
                )
            ]
            kept = "-" if np.isnan(row.kept) else f"{100 * row.kept:.2f}"
            lines.append(f"{row.name:<{width}}  {'    '.join(pairs)}    {100 * row.shown:>14.2f}  {kept:>15}")
        return "\n".join(lines)


def class_frequencies(
    dataset: SampleSource, samples: int = 1000, seed: int | None = None, strategy: object = None
) -> ClassFrequencies:
    """Draw and read samples, and count what they show.

    Patches are read as they lie, neither mirrored nor turned. What a strategy expects of voxels is known beforehand
    where every position of a crop is equally likely: from where the foreground of each crop is, and how many positions
    cover it.

    Args:
        dataset: where the samples come from; its first target must be of the kind ``binary``.
        samples: how many.
        seed: what they follow from; by default the dataset's own.
        strategy: by default the dataset's own; else as `CellMapMultiDataset` takes it.

    Raises:
        CellMapValueError: the dataset has no binary target.
    """
    first = next(iter(dataset.layout.targets), None)
    if first is None or dataset.layout.targets[first].kind.name != "binary":
        raise CellMapValueError(f"{dataset}: class frequencies need a target of the kind 'binary'")
    used = dataset.strategy if strategy is None else parse_strategy(strategy).bind(dataset.crop_table)
    seed = dataset.seed if seed is None else seed
    numbers = range(samples)
    places = used.places(uniforms(seed, PLACE, numbers, NUMBERS), [None] * samples)
    positions = (np.asarray(dataset.first_positions)[places.crops] + places.positions).tolist()
    shown, voxels = [], []
    for start in numbers[::_TOGETHER]:
        draws = [Draw(n, positions[n], None) for n in numbers[start : start + _TOGETHER]]
        target = dataset.layout.finish(dataset.read(draws))[first].numpy()
        present = (target == 1).reshape(*target.shape[:2], -1)
        shown.append(present.any(axis=2))
        voxels.append(present.mean(axis=2))
    seen, part = np.concatenate(shown), np.concatenate(voxels)
    held = dataset.crop_table.counts > 0
    wanted = _expected_voxels(dataset, used)
    rows = []
    for i, name in enumerate(dataset.classes):
        own = places.classes == i
        rows.append(
            ClassFrequency(
                name,
                float(used.class_chances[i]), float(own.mean()),
                float(used.crop_chances @ held[:, i]), float(held[places.crops, i].mean()),
                None if wanted is None else float(wanted[i]), float(part[:, i].mean()),
                float(seen[:, i].mean()), float(seen[own, i].mean()) if own.any() else float("nan"),
            )
        )  # fmt: skip
    return ClassFrequencies(repr(used), samples, rows)


def _expected_voxels(dataset: SampleSource, strategy: Strategy) -> FloatArray | None:
    """``[classes]``, the share of all patches' voxels that should be each class."""
    chances = strategy.even_chances
    if chances is None:
        return None
    found = np.zeros(len(dataset.classes))
    for number, crop in enumerate(dataset.crops):
        for i in np.flatnonzero(dataset.crop_table.counts[number] > 0).tolist():
            index, placement = dataset.crop_table.index(number, i), crop.placement
            points = np.asarray(index.lattice.origin) + np.multiply(index.voxels, index.lattice.step)
            extent = crop.plane.in_volume(crop.target_window).extent
            # The positions along each axis whose patch covers the voxel.
            low = np.ceil((points - extent / 2 - placement.first) / placement.step - 1e-6)
            high = np.floor((points + extent / 2 - placement.first) / placement.step - 1e-6)
            covers = np.clip(np.minimum(high, np.subtract(placement.counts, 1)) - np.maximum(low, 0) + 1, 0, None)
            covered = float((index.weights * covers.prod(axis=1)).sum()) / len(placement)
            found[i] += chances[number] * covered * float(np.prod(index.lattice.step) / np.prod(extent))
    return found
