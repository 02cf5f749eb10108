"""Datasets as `CellMapDataLoader` reads them: samples numbered through the epochs."""

import dataclasses
import functools
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from cellmap_lightning.batches.compact_batch import CompactBatch, CompactRequest
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.datasets.requests import Request, requesting
from cellmap_lightning.datasets.source import Draw, SampleSource
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.loading.slots import SlotBatch, Slots
from cellmap_lightning.runtime.rng import SHUFFLE, hashes
from cellmap_lightning.sampling.strategy import Strategy

log = logging.getLogger(__name__)


class SampleList(list[Any]):
    """Finished samples that are parts of one batch, so that `collate` need not copy them.

    Args:
        batch: the batch, ``{name: [N, ...]}``.
    """

    def __init__(self, batch: Mapping[str, torch.Tensor]) -> None:
        self.batch = dict(batch)
        super().__init__({n: v[i] for n, v in self.batch.items()} for i in range(len(self.batch["idx"])))


def collate(samples: Any) -> Any:
    """Return the batch of what a dataset of this module gave: whole batches as they are, lists of samples stacked."""
    if isinstance(samples, SampleList):
        return samples.batch
    return default_collate(samples) if isinstance(samples, list) else samples


@functools.cache
def _announce(name: str) -> None:
    log.info("%s has a __getitem__ of user code: samples are read one by one, and travel finished", name)


def _can_pin(pin: bool) -> bool:
    """Return whether to pin, with the warning of `torch.utils.data.DataLoader` where that is not possible."""
    if not pin:
        return False
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        found = "no accelerator is found" if accelerator is None else "MPS has no pinned memory"
        warnings.warn(f"pin_memory=True, and {found}: batches are read into ordinary memory", stacklevel=3)
        return False
    return True


class NumberedSamples(Dataset[Any], ABC):
    """A dataset as many items long as an epoch has samples, numbered on through the epochs.

    Args:
        dataset: where the samples come from.
        count: samples of an epoch.
        shuffle: draw samples at random; otherwise in order.
        seed: what everything random follows from.
        pin: read into page-locked memory.
    """

    #: Samples are read by ``__getitem__`` of user code, and are finished.
    overridden = True

    def __init__(self, dataset: Any, count: int, shuffle: bool, seed: int, pin: bool = False) -> None:
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise CellMapValueError(f"samples_per_epoch must be a whole number of at least 1, got {count!r}")
        self.dataset = dataset
        self.count = count
        self.shuffle = shuffle
        self.seed = seed
        self.pin = _can_pin(pin)
        #: Shared memory that worker processes write to, set by their loader; and the samples that it has room for.
        self.slots: Slots | None = None
        self.room = 0

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the dataset: programs look for its classes and weights at ``loader.dataset``."""
        if name.startswith("_") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    @property
    @abstractmethod
    def sources(self) -> Sequence[SampleSource]:
        """The datasets of this package that are read."""

    @property
    @abstractmethod
    def layout(self) -> BatchLayout:
        """The layout of compact batches.

        Raises:
            CellMapTypeError: the batches are made by user code.
        """

    def __len__(self) -> int:
        return self.count

    def prepare(self) -> None:
        """Do once, before worker processes are started, what each of them would otherwise do by itself."""
        for source in self.sources:
            source.prepare()

    @abstractmethod
    def crop(self, sample: int) -> str:
        """The crop that a sample shows, for messages."""

    @abstractmethod
    def __getitem__(self, sample: int) -> Any:
        """One finished sample."""

    def __getitems__(self, samples: Sequence[int]) -> Any:
        """The samples of these numbers as a list; for a `CompactRequest` as one batch."""
        found = [self[n] for n in samples]
        return collate(found) if isinstance(samples, CompactRequest) else found

    def set_random_state(self, seed: int | None = None, state: Any = None) -> "NumberedSamples":
        """Do nothing: see `SampleSource.set_random_state`."""
        return self


class Samples(NumberedSamples):
    """The samples of a dataset of this package.

    Args:
        dataset: where the samples come from.
        count: samples of an epoch; by default as many as there are tiles.
        shuffle: draw samples at random; otherwise go through the tiles.
        seed: what everything random follows from.
        pin: read into page-locked memory.
        tiles: numbers of the tiles, in the order in which they come; by default all, see `SampleSource.tile_order`.
        strategy: where random samples come from; by default as the dataset's own says.

    Raises:
        CellMapValueError: ``count`` is not positive, or larger than there are tiles; tiles are given to be drawn.
    """

    def __init__(
        self,
        dataset: SampleSource,
        count: int | None,
        shuffle: bool,
        seed: int,
        pin: bool = False,
        tiles: Sequence[int] | None = None,
        strategy: Strategy | None = None,
    ) -> None:
        if tiles is not None and shuffle:
            raise CellMapValueError("tiles are gone through without is_train=True; with it samples are drawn")
        tiles = dataset.tile_order() if tiles is None else tiles
        super().__init__(dataset, len(tiles) if count is None else count, shuffle, seed, pin)
        if not shuffle and self.count > len(tiles):
            raise CellMapValueError(
                f"samples_per_epoch={count}, and {len(tiles)} tiles cover everything once; without "
                "is_train=True none is shown twice"
            )
        self.tiles = tiles
        self.strategy = strategy
        self._layout = dataclasses.replace(dataset.layout, seed=seed)
        overriding = dataset.overriding_types()
        self.overridden = bool(overriding)
        if self.overridden:
            _announce(" and ".join(overriding))

    @property
    def sources(self) -> Sequence[SampleSource]:
        """The dataset."""
        return (self.dataset,)

    @property
    def layout(self) -> BatchLayout:
        """How its batches are laid out and finished."""
        return self._layout

    def prepare(self) -> None:
        """Do once, before worker processes are started, what each of them would otherwise do by itself."""
        super().prepare()
        if self.shuffle:
            (self.strategy or self.dataset.strategy).prepare()

    def __getitems__(self, samples: Sequence[int]) -> Any:
        """The samples of these numbers as a list, finished.

        For a `CompactRequest` as one compact batch; in a worker process, where it lies in shared memory.
        """
        if self.overridden:
            return super().__getitems__(samples)
        draws = self._draw(samples)
        if not isinstance(samples, CompactRequest):
            return SampleList(self._read(draws).finish())
        worker = get_worker_info()
        if self.slots is None or worker is None or len(draws) > self.room:
            return self._read(draws)
        if self.slots.finished:
            return self.slots.put(worker.id, self._read(draws).finish())
        turn, arrays = self.slots.open(worker.id, self.slots.compact_places(len(draws)))
        arrays.pop("idx")[:] = [d.position for d in draws]
        arrays.pop("sample")[:] = [d.sample for d in draws]
        self.dataset.read_into(draws, arrays)
        return SlotBatch(worker.id, turn, len(draws))

    def _read(self, draws: Sequence[Draw]) -> CompactBatch:
        batch: CompactBatch = self.dataset.read(draws, self.pin)
        batch.layout = self._layout
        return batch

    def crop(self, sample: int) -> str:
        """The crop that a sample shows, for messages."""
        label: str = self.dataset.locate(self._draw([sample])[0].position)[0].label
        return label

    def __getitem__(self, sample: int) -> Any:
        """One finished sample."""
        draw = self._draw([sample])[0]
        if not self.overridden:
            return SampleList(self._read([draw]).finish())[0]
        with requesting(Request(draw.sample, self.seed, self.dataset, draw)):
            return self.dataset[draw.position]

    def draws(self, samples: Sequence[int]) -> list[Draw]:
        """Where the samples of these numbers are read, and how they are turned."""
        return self._draw(samples)

    def _draw(self, samples: Sequence[int]) -> list[Draw]:
        numbers = samples if self.shuffle else [self.tiles[n] for n in samples]
        found: list[Draw] = self.dataset.draw(numbers, self.shuffle, self.seed, self.strategy)
        return found


class WrappedSamples(NumberedSamples):
    """The items of any map-style dataset, such as a `torch.utils.data.Subset` of a dataset of this package.

    At random they come in another order in every cycle through all items. What a dataset of this package gives inside
    of an item is augmented by the number of the sample, and so in every epoch in another way.

    Args:
        dataset: has ``__len__`` and ``__getitem__``.
        count: samples of an epoch; by default as many as there are items.
        shuffle: items in random order; otherwise in their own.
        seed: what everything random follows from.
        pin: has no effect: batches are made by user code.

    Raises:
        CellMapTypeError: it is no such dataset.
        CellMapValueError: ``count`` is not positive, or larger than there are items without ``shuffle``.
    """

    def __init__(self, dataset: Any, count: int | None, shuffle: bool, seed: int, pin: bool = False) -> None:
        items = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not items or isinstance(dataset, str | list | tuple | Mapping):
            raise CellMapTypeError(
                f"CellMapDataLoader needs a CellMapDataset, or a dataset with __len__ and __getitem__ around one; got "
                f"{type(dataset).__name__}"
            )
        self.items = len(dataset)
        if not self.items:
            raise CellMapValueError(f"the dataset {type(dataset).__name__} is empty")
        super().__init__(dataset, self.items if count is None else count, shuffle, seed, pin)
        if not shuffle and self.count > self.items:
            raise CellMapValueError(
                f"samples_per_epoch={count}, and the dataset has {self.items} items; without is_train=True none is "
                "shown twice"
            )
        _announce(type(dataset).__name__)

    @cached_property
    def sources(self) -> Sequence[SampleSource]:
        """The datasets of this package that the items come from, as far as attributes lead to them."""
        found: list[SampleSource] = []
        seen: set[int] = set()

        def visit(node: Any) -> None:
            if id(node) in seen:
                return
            seen.add(id(node))
            if isinstance(node, SampleSource):
                found.append(node)
            elif isinstance(node, list | tuple) and not isinstance(next(iter(node), None), int):  # not indices
                for one in node:
                    visit(one)
            elif isinstance(node, Dataset) or node is self.dataset:
                for one in list(getattr(node, "__dict__", {}).values()):
                    visit(one)

        visit(self.dataset)
        return found

    @property
    def layout(self) -> BatchLayout:
        """Not known.

        Raises:
            CellMapTypeError: always.
        """
        raise CellMapTypeError(
            f"the layout and the size of the batches of a {type(self.dataset).__name__} are not known before they are "
            "read; those of a CellMapDataset are"
        )

    def index(self, sample: int) -> int:
        """The item of a sample."""
        cycle, number = divmod(int(sample), self.items)
        return _shuffled(number, self.items, self.seed, cycle) if self.shuffle else number

    def crop(self, sample: int) -> str:
        """The item of a sample, for messages."""
        return f"item {self.index(sample)} of {type(self.dataset).__name__}"

    def __getitem__(self, sample: int) -> Any:
        """One item."""
        with requesting(Request(int(sample), self.seed)):
            return self.dataset[self.index(sample)]


def _shuffled(number: int, length: int, seed: int, cycle: int) -> int:
    """Return the place of a number in a random permutation of ``range(length)``, without making the permutation.

    A Feistel network over the next even number of bits, applied until the result is in range ("cycle walking", Black
    and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002, doi:10.1007/3-540-45760-7_9).
    """
    half = max(1, ((length - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    rounds = [int(key) for key in hashes(seed, SHUFFLE, [cycle], 4)[0] >> 1]
    while True:
        left, right = number >> half, number & mask
        for key in rounds:
            left, right = right, left ^ (int(hashes(key, SHUFFLE, [right], 1)[0, 0]) & mask)
        number = (left << half) | right
        if number < length:
            return number
