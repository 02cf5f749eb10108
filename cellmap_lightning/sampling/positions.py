"""Samplers of positions, under the names that users of cellmap-data know."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import Sampler

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.sampling.class_strategies import ClassBalanced
from cellmap_lightning.sampling.crop_table import CropTable
from cellmap_lightning.sampling.strategy import Strategy

#: Positions that are drawn at a time.
_TOGETHER = 1024


class DrawsPositions(Protocol):
    """The part of a dataset that samplers use."""

    @property
    def tile_count(self) -> int:
        """Number of patches that together cover every crop."""

    @property
    def strategy(self) -> Strategy:
        """The source of random samples."""

    @property
    def crop_table(self) -> CropTable:
        """The crops."""

    def draw(self, samples: Sequence[int], shuffle: bool, seed: int, strategy: Strategy | None = None) -> list[Any]:
        """Describe samples by their numbers; each has a ``position``."""


class PositionSampler(Sampler[int]):
    """Random positions of a dataset, by a strategy; each pass goes on where the last one ended.

    For a `torch.utils.data.DataLoader` over the dataset itself. A `CellMapDataLoader` that is given one takes its
    dataset's samples by its strategy, its number and its seed.

    Args:
        dataset: a `CellMapDataset` or `CellMapMultiDataset`.
        samples_per_epoch: positions of a pass; by default as many as tiles cover every crop once.
        seed: what everything random follows from.
        strategy: which crops, and where in them; by default as the dataset's own.

    Raises:
        CellMapValueError: ``samples_per_epoch`` is not positive.
    """

    def __init__(
        self,
        dataset: DrawsPositions,
        samples_per_epoch: int | None = None,
        seed: int = 42,
        strategy: Strategy | None = None,
    ) -> None:
        count = dataset.tile_count if samples_per_epoch is None else samples_per_epoch
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise CellMapValueError(f"samples_per_epoch must be a whole number of at least 1, got {count!r}")
        self.dataset = dataset
        self.samples_per_epoch = count
        self.seed = seed
        self.strategy = dataset.strategy if strategy is None else strategy.bind(dataset.crop_table)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.samples_per_epoch
        self.epoch += 1
        for start in range(first, first + self.samples_per_epoch, _TOGETHER):
            numbers = range(start, min(start + _TOGETHER, first + self.samples_per_epoch))
            yield from (draw.position for draw in self.dataset.draw(numbers, True, self.seed, self.strategy))

    def __len__(self) -> int:
        return self.samples_per_epoch


class ClassBalancedSampler(PositionSampler):
    """Every class that has voxels anywhere as often as every other; see `strategies.ClassBalanced`.

    Args:
        dataset: a `CellMapDataset` or `CellMapMultiDataset`.
        samples_per_epoch: positions of a pass; by default as many as tiles cover every crop once.
        seed: what everything random follows from.

    Raises:
        CellMapValueError: nothing is annotated.
    """

    def __init__(self, dataset: DrawsPositions, samples_per_epoch: int | None = None, seed: int = 42) -> None:
        super().__init__(dataset, samples_per_epoch, seed, ClassBalanced())
