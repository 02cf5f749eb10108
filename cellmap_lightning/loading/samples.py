"""Datasets whose samples are numbered through the epochs, as `CellMapDataLoader` reads them."""

import dataclasses
import functools
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate, get_worker_info

from cellmap_lightning.batches.compact_batch import CompactBatch, CompactRequest
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.datasets.requests import Request, requesting
from cellmap_lightning.datasets.source import Draw, SampleSource
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.loading.resident_reader import ResidentReader
from cellmap_lightning.loading.slots import SlotBatch, Slots
from cellmap_lightning.runtime.rng import SHUFFLE, hashes
from cellmap_lightning.sampling.strategy import Strategy
from cellmap_lightning.validation import int_at_least

log = logging.getLogger(__name__)


class SampleList(list[Any]):
    """Finished samples that are parts of one batch, so that `collate` need not copy them; see docs/batches.md.

    Args:
        batch: the batch, ``{name: [N, ...]}``.
    """

    def __init__(self, batch: Mapping[str, torch.Tensor]) -> None:
        self.batch = dict(batch)
        super().__init__({n: v[i] for n, v in self.batch.items()} for i in range(len(self.batch["idx"])))


def collate(samples: Any) -> Any:
    """Return the batch of a result of `NumberedSamples`: whole batches unchanged, lists of samples stacked."""
    if isinstance(samples, SampleList):
        return samples.batch
    return default_collate(samples) if isinstance(samples, list) else samples


@functools.cache
def _announce(name: str) -> None:
    log.info("%s has a __getitem__ of user code: samples are read one by one, and transferred finished", name)


def _can_pin(pin: bool) -> bool:
    """Return whether to pin memory; warn, as `torch.utils.data.DataLoader` does, if that is not possible."""
    if not pin:
        return False
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None or accelerator.type == "mps":
        reason = "no accelerator is found" if accelerator is None else "MPS has no pinned memory"
        warnings.warn(f"pin_memory=True, and {reason}: batches are read into pageable memory", stacklevel=3)
        return False
    return True


class NumberedSamples(Dataset[Any], ABC):
    """A view of a dataset with as many items as an epoch has samples, numbered through the epochs.

    It is the ``dataset`` of every `CellMapDataLoader`, see docs/batches.md.

    Args:
        dataset: the source of samples.
        count: samples per epoch.
        shuffle: draw samples at random; otherwise in order.
        seed: seed of everything random.
        pin: read into page-locked memory.
    """

    #: True if ``__getitem__`` of user code reads the samples, which are then finished.
    overridden = True

    def __init__(self, dataset: Any, count: int, shuffle: bool, seed: int, pin: bool = False) -> None:
        self.dataset = dataset
        self.count = int_at_least("samples_per_epoch", count, 1)
        self.shuffle = shuffle
        self.seed = seed
        self.pin = _can_pin(pin)
        #: Shared memory that worker processes write to, set by their loader; and its capacity in samples.
        self.slots: Slots | None = None
        self.room = 0

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the dataset: training code reads its classes and weights from ``loader.dataset``."""
        if name.startswith("_") or "dataset" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.dataset, name)

    @property
    @abstractmethod
    def sources(self) -> Sequence[SampleSource]:
        """The datasets of this package that samples are read from."""

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
        """Prepare the datasets once before worker processes start, which would each repeat the work."""
        for source in self.sources:
            source.prepare()

    @abstractmethod
    def crop(self, sample: int) -> str:
        """Return the label of the crop that a sample shows, for messages."""

    @abstractmethod
    def __getitem__(self, sample: int) -> Any:
        """Return one finished sample."""

    def __getitems__(self, samples: Sequence[int]) -> Any:
        """Return the samples of these numbers as a list; for a `CompactRequest` as one batch."""
        items = [self[n] for n in samples]
        return collate(items) if isinstance(samples, CompactRequest) else items

    def set_random_state(self, seed: int | None = None, state: Any = None) -> "NumberedSamples":
        """Do nothing: see `SampleSource.set_random_state`."""
        return self


class Samples(NumberedSamples):
    """The samples of a dataset of this package; see docs/batches.md.

    Args:
        dataset: the source of samples.
        count: samples per epoch; by default the number of tiles.
        shuffle: draw samples at random; otherwise iterate over the tiles.
        seed: seed of everything random.
        pin: read into page-locked memory.
        tiles: numbers of the tiles, in their order; by default all, see `SampleSource.tile_order`.
        strategy: the strategy that draws random samples; by default the dataset's own.

    Raises:
        CellMapValueError: ``count`` is not positive, or larger than the number of tiles; or ``tiles`` with ``shuffle``.
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
            raise CellMapValueError("tiles need is_train=False; with is_train=True samples are drawn at random")
        tiles = dataset.tile_order() if tiles is None else tiles
        super().__init__(dataset, len(tiles) if count is None else count, shuffle, seed, pin)
        if not shuffle and self.count > len(tiles):
            raise CellMapValueError(
                f"samples_per_epoch must be at most {len(tiles)}, the number of tiles, without is_train=True, "
                f"got {count}"
            )
        self.tiles = tiles
        self.strategy = strategy
        # Random value transforms follow the seed of the loader.
        self._layout = dataclasses.replace(dataset.layout, seed=seed)
        #: Reads what is on a device; set by the loader that uses one.
        self.resident: ResidentReader | None = None
        overriding = dataset.overriding_types()
        self.overridden = bool(overriding)
        if self.overridden:
            _announce(" and ".join(overriding))

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"resident": None}

    @property
    def sources(self) -> Sequence[SampleSource]:
        """The dataset."""
        return (self.dataset,)

    @property
    def layout(self) -> BatchLayout:
        """The layout of the batches."""
        return self._layout

    def prepare(self) -> None:
        """Prepare dataset and strategy once before worker processes start, which would each repeat the work."""
        super().prepare()
        if self.shuffle:
            (self.strategy or self.dataset.strategy).prepare()

    def __getitems__(self, samples: Sequence[int]) -> Any:
        """Return the samples of these numbers as a list, finished.

        For a `CompactRequest`, return one compact batch; in a worker process, its location in shared memory.
        """
        if self.overridden:
            return super().__getitems__(samples)
        draws = self.draws(samples)
        if not isinstance(samples, CompactRequest):
            return SampleList(self._read(draws).finish())
        if self.resident is not None:
            batch = self.resident.read(draws)
            batch.layout = self._layout
            return batch
        worker = get_worker_info()
        # Batches of a foreign sampler may be larger than a slot; torch transfers them.
        if self.slots is None or worker is None or len(draws) > self.room:
            return self._read(draws)
        if self.slots.finished:
            return self.slots.put(worker.id, self._read(draws).finish())
        number, arrays = self.slots.open(worker.id, self.slots.compact_places(len(draws)))
        arrays.pop("idx")[:] = [d.position for d in draws]
        arrays.pop("sample")[:] = [d.sample for d in draws]
        self.dataset.read_into(draws, arrays)
        return SlotBatch(worker.id, number, len(draws))

    def _read(self, draws: Sequence[Draw]) -> CompactBatch:
        batch: CompactBatch = self.dataset.read(draws, self.pin)
        batch.layout = self._layout
        return batch

    def crop(self, sample: int) -> str:
        """Return the label of the crop that a sample shows, for messages."""
        label: str = self.dataset.locate(self.draws([sample])[0].position)[0].label
        return label

    def __getitem__(self, sample: int) -> Any:
        """Return one finished sample."""
        draw = self.draws([sample])[0]
        if not self.overridden:
            return SampleList(self._read([draw]).finish())[0]
        with requesting(Request(draw.sample, self.seed, self.dataset, draw)):
            return self.dataset[draw.position]

    def draws(self, samples: Sequence[int]) -> list[Draw]:
        """Return the positions and orientations at which the samples of these numbers are read."""
        numbers = samples if self.shuffle else [self.tiles[n] for n in samples]
        draws: list[Draw] = self.dataset.draw(numbers, self.shuffle, self.seed, self.strategy)
        return draws


class WrappedSamples(NumberedSamples):
    """The items of any map-style dataset, such as a `torch.utils.data.Subset` of a dataset of this package.

    With ``shuffle`` their order differs in every cycle through all items. Samples of a dataset of this package inside
    of an item are augmented by the number of the sample, and so differently in every epoch. See docs/batches.md.

    Args:
        dataset: has ``__len__`` and ``__getitem__``.
        count: samples per epoch; by default the number of items.
        shuffle: items in random order; otherwise in their own.
        seed: seed of everything random.
        pin: has no effect: batches are made by user code.

    Raises:
        CellMapTypeError: ``dataset`` is no map-style dataset.
        CellMapValueError: ``count`` is not positive, or larger than the number of items without ``shuffle``.
    """

    def __init__(self, dataset: Any, count: int | None, shuffle: bool, seed: int, pin: bool = False) -> None:
        items = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
        if not items or isinstance(dataset, str | list | tuple | Mapping):
            raise CellMapTypeError(
                "dataset must be a CellMapDataset, or a dataset with __len__ and __getitem__ that wraps one, got "
                f"{type(dataset).__name__}"
            )
        self.items = len(dataset)
        if not self.items:
            raise CellMapValueError(f"the dataset {type(dataset).__name__} is empty")
        super().__init__(dataset, self.items if count is None else count, shuffle, seed, pin)
        if not shuffle and self.count > self.items:
            raise CellMapValueError(
                f"samples_per_epoch must be at most {self.items}, the number of items, without is_train=True, "
                f"got {count}"
            )
        _announce(type(dataset).__name__)

    @cached_property
    def sources(self) -> Sequence[SampleSource]:
        """The datasets of this package that are reachable through attributes of the wrapped dataset."""
        sources: list[SampleSource] = []
        seen: set[int] = set()

        def visit(node: Any) -> None:
            if id(node) in seen:  # objects may refer to each other
                return
            seen.add(id(node))
            if isinstance(node, SampleSource):
                sources.append(node)
            elif isinstance(node, list | tuple) and not isinstance(next(iter(node), None), int):  # not indices
                for item in node:
                    visit(item)
            elif isinstance(node, Dataset) or node is self.dataset:
                for value in list(getattr(node, "__dict__", {}).values()):
                    visit(value)

        visit(self.dataset)
        return sources

    @property
    def layout(self) -> BatchLayout:
        """The layout, which is unknown before a batch is read.

        Raises:
            CellMapTypeError: always.
        """
        raise CellMapTypeError(
            f"the layout and the size of batches of a {type(self.dataset).__name__} are unknown before they are read; "
            "use a CellMapDataset for a layout that is known"
        )

    def index(self, sample: int) -> int:
        """Return the index of the item of a sample."""
        cycle, number = divmod(int(sample), self.items)
        return permuted(number, self.items, self.seed, cycle) if self.shuffle else number

    def crop(self, sample: int) -> str:
        """Return a name of the item of a sample, for messages."""
        return f"item {self.index(sample)} of {type(self.dataset).__name__}"

    def __getitem__(self, sample: int) -> Any:
        """Return one item."""
        with requesting(Request(int(sample), self.seed)):
            return self.dataset[self.index(sample)]


def permuted(number: int, length: int, seed: int, cycle: int) -> int:
    """Return the image of a number under a random permutation of ``range(length)``, without a table of it.

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


def number_samples(
    dataset: Any,
    count: int | None,
    shuffle: bool,
    seed: int | None,
    pin: bool,
    tiles: Sequence[int] | None = None,
    strategy: Strategy | None = None,
) -> NumberedSamples:
    """Return the numbered samples of a dataset of this package, of a wrapper around one, or of another loader.

    Args:
        dataset: the source of samples; the samples of another loader are used unchanged, unless ``strategy`` is given.
        count: samples per epoch; by default the number of tiles, or of items.
        shuffle: draw samples at random; otherwise in order.
        seed: seed of everything random; by default the dataset's.
        pin: read into page-locked memory.
        tiles: see `Samples`.
        strategy: see `Samples`.

    Raises:
        CellMapTypeError: see `WrappedSamples`.
        CellMapValueError: see `Samples` and `WrappedSamples`.
    """
    if isinstance(dataset, NumberedSamples):
        if strategy is None:
            samples = copy(dataset)
            samples.slots = None  # those of the workers of the loader that it was taken from
            return samples
        dataset = dataset.dataset
    if isinstance(dataset, SampleSource):
        return Samples(dataset, count, shuffle, dataset.seed if seed is None else seed, pin, tiles, strategy)
    return WrappedSamples(dataset, count, shuffle, seed or 0, pin)
