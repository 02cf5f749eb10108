"""`cellmap_data.sampler`."""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.sampling import torch_samplers


class ClassBalancedSampler(Sampler[int]):
    """Random positions, each class as often as every other; see docs/migration.md.

    Positions of a dataset of this package come from `sampling.torch_samplers.ClassBalancedSampler`. For any other
    dataset with a length and ``get_crop_class_matrix()`` they are drawn as in cellmap-data: each sample is of a crop
    that holds the class with the fewest samples so far.

    Args:
        dataset: the dataset.
        samples_per_epoch: positions of a pass; by default as many as there are tiles, or as the length of a dataset
            that is not one of this package.
        seed: what everything random follows from.

    Attributes:
        by_strategy: the sampler of a dataset of this package; None for any other.

    Raises:
        CellMapValueError: no class is in any crop.
    """

    def __init__(self, dataset: Any, samples_per_epoch: int | None = None, seed: int = 42) -> None:
        self.dataset = dataset
        self.rng = np.random.default_rng(seed)
        self.by_strategy: torch_samplers.ClassBalancedSampler | None = None
        if isinstance(dataset, SampleSource):
            self.by_strategy = torch_samplers.ClassBalancedSampler(dataset, samples_per_epoch, seed)
            self.samples_per_epoch = len(self.by_strategy)
        else:
            self.samples_per_epoch = samples_per_epoch or len(dataset)
            if not self.active_classes:
                raise CellMapValueError(
                    "ClassBalancedSampler: no active classes: get_crop_class_matrix() has no True; give crops in which "
                    "at least one class is annotated"
                )

    @cached_property
    def crop_class_matrix(self) -> npt.NDArray[np.bool_]:
        """``[crops, classes]``, which class is in which crop."""
        found: npt.NDArray[np.bool_] = self.dataset.get_crop_class_matrix()
        return found

    @property
    def n_crops(self) -> int:
        """Number of crops."""
        return len(self.crop_class_matrix)

    @property
    def n_classes(self) -> int:
        """Number of classes."""
        return len(self.crop_class_matrix[0])

    @cached_property
    def class_to_crops(self) -> dict[int, npt.NDArray[np.int64]]:
        """Crops of each class that is in any, by their numbers."""
        crops = {number: np.flatnonzero(column) for number, column in enumerate(self.crop_class_matrix.T)}
        return {number: found for number, found in crops.items() if len(found)}

    @property
    def active_classes(self) -> list[int]:
        """Numbers of the classes that are in any crop."""
        return sorted(self.class_to_crops)

    def set_epoch(self, epoch: int) -> None:
        """Make the next pass that of an epoch; has no effect on a dataset that is not one of this package."""
        if self.by_strategy is not None:
            self.by_strategy.set_epoch(epoch)

    def __iter__(self) -> Iterator[int]:
        return iter(self.by_strategy) if self.by_strategy is not None else self._greedy()

    def __len__(self) -> int:
        return self.samples_per_epoch

    def _greedy(self) -> Iterator[int]:
        active = np.asarray(self.active_classes)
        seen = np.zeros(self.n_classes, np.int64)
        for _ in range(self.samples_per_epoch):
            fewest = active[seen[active] == seen[active].min()]
            crop = int(self.rng.choice(self.class_to_crops[int(self.rng.choice(fewest))]))
            seen += self.crop_class_matrix[crop]
            first, end = self._positions(crop)
            yield int(self.rng.integers(first, end))

    def _positions(self, crop: int) -> tuple[int, int]:
        """First position of a crop, and the one behind its last.

        Raises:
            CellMapValueError: the dataset has no positions for it.
        """
        sizes = getattr(self.dataset, "cumulative_sizes", None)
        if len(self.dataset) == self.n_crops:
            first, end = crop, crop + 1
        elif sizes is not None and hasattr(self.dataset, "datasets"):
            if crop >= len(sizes):
                raise CellMapValueError(
                    f"ClassBalancedSampler: crop {crop} is out of range for {len(sizes)} cumulative_sizes; "
                    "get_crop_class_matrix() needs one row for each dataset"
                )
            first, end = (int(sizes[crop - 1]) if crop else 0), int(sizes[crop])
        else:
            ends = np.linspace(0, len(self.dataset), self.n_crops + 1).astype(int)
            first, end = int(ends[crop]), int(ends[crop + 1])
        if not 0 <= first < end <= len(self.dataset):
            raise CellMapValueError(
                f"ClassBalancedSampler: crop {crop} has the positions {first} to {end} of {len(self.dataset)}; each "
                "crop with a class needs at least one"
            )
        return first, end


__all__ = ["ClassBalancedSampler"]
