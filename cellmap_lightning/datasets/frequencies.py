"""Class frequencies of a sampling strategy: expected, and measured on samples."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cellmap_lightning.datasets.source import Draw, SampleSource
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.geometry.lattice import FloatArray
from cellmap_lightning.runtime.rng import PLACE, uniforms
from cellmap_lightning.sampling.strategies import parse_strategy
from cellmap_lightning.sampling.strategy import NUMBERS, Strategy

#: Samples per read.
_BATCH = 16


@dataclass(frozen=True)
class ClassFrequency:
    """Frequencies of one class, as shares of the samples except for voxels; see `class_frequencies`.

    Attributes:
        name: the class.
        expected_drawn: expected share of samples drawn for the class.
        drawn: measured share of samples drawn for it.
        expected_crop: expected share of samples from a crop that holds it.
        crop: measured share of samples from a crop that holds it.
        expected_voxels: expected share of the voxels of all patches; None if the strategy prefers some positions.
        voxels: measured share of the voxels of all patches.
        shown: share of samples whose patch shows a voxel of it.
        shown_if_drawn: share of the samples drawn for it whose patch shows it; NaN without any.
    """

    name: str
    expected_drawn: float
    drawn: float
    expected_crop: float
    crop: float
    expected_voxels: float | None
    voxels: float
    shown: float
    shown_if_drawn: float


@dataclass(frozen=True)
class ClassFrequencies:
    """Result of `class_frequencies`; its text is a table; see docs/sampling.md.

    Attributes:
        strategy: description of the strategy.
        samples: number of samples that were drawn and read.
        rows: one per class.
    """

    strategy: str
    samples: int
    rows: Sequence[ClassFrequency]

    def error(self, expected: float) -> float:
        """Return the standard deviation of a measured share, by chance alone."""
        return float(np.sqrt(expected * (1 - expected) / self.samples))

    def __str__(self) -> str:
        width = max(5, *(len(row.name) for row in self.rows))
        lines = [
            f"{self.strategy}: {self.samples} samples; expected and measured shares in % (-: not computed)",
            f"{'class':<{width}}  drawn for it   crop holds it  its voxels     patch shows it  if drawn",
        ]
        for row in self.rows:
            pairs = [
                f"{'-' if expected is None else f'{100 * expected:.2f}':>6} {100 * measured:>6.2f}"
                for expected, measured in (
                    (row.expected_drawn, row.drawn),
                    (row.expected_crop, row.crop),
                    (row.expected_voxels, row.voxels),
                )
            ]
            share = "-" if np.isnan(row.shown_if_drawn) else f"{100 * row.shown_if_drawn:.2f}"
            lines.append(f"{row.name:<{width}}  {'  '.join(pairs)}  {100 * row.shown:>14.2f}  {share:>8}")
        return "\n".join(lines)


def class_frequencies(
    dataset: SampleSource, samples: int = 1000, seed: int | None = None, strategy: object = None
) -> ClassFrequencies:
    """Draw and read samples without augmentation, and count the classes in them.

    The expected share of voxels can be computed if every position of a crop is equally likely: from the foreground
    index of each crop, and the number of positions that cover each voxel.

    Args:
        dataset: source of the samples; its first target must be of the kind ``binary``.
        samples: number of samples.
        seed: random seed; by default that of the dataset.
        strategy: see `CellMapMultiDataset`; by default that of the dataset.

    Raises:
        CellMapValueError: the dataset has no binary target.

    Example:
        >>> print(class_frequencies(datamodule.train_dataset, strategy="class_balanced"))  # doctest: +SKIP
    """
    first = next(iter(dataset.layout.targets), None)
    if first is None or dataset.layout.targets[first].kind.name != "binary":
        raise CellMapValueError(f"{dataset}: class frequencies need a target of the kind 'binary'")
    bound = dataset.strategy if strategy is None else parse_strategy(strategy).bind(dataset.crop_table)
    seed = dataset.seed if seed is None else seed
    numbers = range(samples)
    places = bound.choose(uniforms(seed, PLACE, numbers, NUMBERS), [None] * samples)
    positions = (np.asarray(dataset.first_positions)[places.crops] + places.positions).tolist()
    shown, voxels = [], []
    for start in numbers[::_BATCH]:
        draws = [Draw(n, positions[n], None) for n in numbers[start : start + _BATCH]]
        target = dataset.layout.finish(dataset.read(draws))[first].numpy()
        present = (target == 1).reshape(*target.shape[:2], -1)
        shown.append(present.any(axis=2))
        voxels.append(present.mean(axis=2))
    is_shown, voxel_share = np.concatenate(shown), np.concatenate(voxels)
    in_crop = dataset.crop_table.counts > 0
    expected_voxels = _expected_voxels(dataset, bound)
    rows = []
    for i, name in enumerate(dataset.classes):
        drawn = places.classes == i
        rows.append(
            ClassFrequency(
                name,
                expected_drawn=float(bound.class_chances[i]),
                drawn=float(drawn.mean()),
                expected_crop=float(bound.crop_chances @ in_crop[:, i]),
                crop=float(in_crop[places.crops, i].mean()),
                expected_voxels=None if expected_voxels is None else float(expected_voxels[i]),
                voxels=float(voxel_share[:, i].mean()),
                shown=float(is_shown[:, i].mean()),
                shown_if_drawn=float(is_shown[drawn, i].mean()) if drawn.any() else float("nan"),
            )
        )
    return ClassFrequencies(repr(bound), samples, rows)


def _expected_voxels(dataset: SampleSource, strategy: Strategy) -> FloatArray | None:
    """Return ``[classes]``, the expected share of the voxels of all patches; None if it is unknown."""
    chances = strategy.even_chances
    if chances is None:
        return None
    shares = np.zeros(len(dataset.classes))
    for number, crop in enumerate(dataset.crops):
        for i in np.flatnonzero(dataset.crop_table.counts[number] > 0).tolist():
            index, placement = dataset.crop_table.index(number, i), crop.placement
            points = index.lattice.points(index.voxels)
            extent = crop.plane.in_volume(crop.target_window).extent
            # First and last position along each axis whose patch covers the voxel.
            low = np.ceil((points - extent / 2 - placement.first) / placement.step - 1e-6)
            high = np.floor((points + extent / 2 - placement.first) / placement.step - 1e-6)
            covers = np.clip(np.minimum(high, np.subtract(placement.counts, 1)) - np.maximum(low, 0) + 1, 0, None)
            covered = float((index.weights * covers.prod(axis=1)).sum()) / len(placement)
            shares[i] += chances[number] * covered * index.lattice.voxel_volume / float(np.prod(extent))
    return shares
