"""Samplers of positions for plain PyTorch data loaders, named as in cellmap-data."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from torch.utils.data import Sampler

from cellmap_lightning.sampling.class_strategies import ClassBalanced
from cellmap_lightning.sampling.crop_table import CropTable
from cellmap_lightning.sampling.strategy import Strategy
from cellmap_lightning.validation import int_at_least

#: Positions drawn per call.
_BLOCK = 1024


class DrawsPositions(Protocol):
    """The part of a dataset that samplers use."""

    @property
    def tile_count(self) -> int:
        """Number of tiles, which together cover every crop."""

    @property
    def strategy(self) -> Strategy:
        """The source of random samples."""

    @property
    def crop_table(self) -> CropTable:
        """The crops."""

    def draw(self, samples: Sequence[int], shuffle: bool, seed: int, strategy: Strategy | None = None) -> list[Any]:
        """Describe samples by their numbers; each has a ``position``."""


class PositionSampler(Sampler[int]):
    """Random positions of a dataset, drawn by a strategy; each pass continues the stream of the previous one.

    For a `torch.utils.data.DataLoader` over the dataset. A `CellMapDataLoader` with this sampler uses its strategy,
    number of samples and seed instead of the sampler.

    Args:
        dataset: a `CellMapDataset` or `CellMapMultiDataset`.
        samples_per_epoch: positions of a pass; by default the number of tiles.
        seed: random seed.
        strategy: strategy that chooses crops and positions; by default the dataset's.

    Raises:
        CellMapValueError: ``samples_per_epoch`` is not positive.

    Example:
        >>> loader = DataLoader(dataset, batch_size=4, sampler=PositionSampler(dataset, 1000))  # doctest: +SKIP
    """

    def __init__(
        self,
        dataset: DrawsPositions,
        samples_per_epoch: int | None = None,
        seed: int = 42,
        strategy: Strategy | None = None,
    ) -> None:
        count = dataset.tile_count if samples_per_epoch is None else samples_per_epoch
        self.dataset = dataset
        self.samples_per_epoch = int_at_least("samples_per_epoch", count, 1)
        self.seed = seed
        self.strategy = dataset.strategy if strategy is None else strategy.bind(dataset.crop_table)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        self.epoch = int(epoch)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * self.samples_per_epoch
        self.epoch += 1
        for start in range(first, first + self.samples_per_epoch, _BLOCK):
            numbers = range(start, min(start + _BLOCK, first + self.samples_per_epoch))
            yield from (draw.position for draw in self.dataset.draw(numbers, True, self.seed, self.strategy))

    def __len__(self) -> int:
        return self.samples_per_epoch


class ClassBalancedSampler(PositionSampler):
    """Positions that show every class with voxels equally often; see `ClassBalanced`.

    Args:
        dataset: a `CellMapDataset` or `CellMapMultiDataset`.
        samples_per_epoch: positions of a pass; by default the number of tiles.
        seed: random seed.

    Raises:
        CellMapValueError: nothing is annotated.

    Example:
        >>> loader = DataLoader(dataset, batch_size=4, sampler=ClassBalancedSampler(dataset, 1000))  # doctest: +SKIP
    """

    def __init__(self, dataset: DrawsPositions, samples_per_epoch: int | None = None, seed: int = 42) -> None:
        super().__init__(dataset, samples_per_epoch, seed, ClassBalanced())
