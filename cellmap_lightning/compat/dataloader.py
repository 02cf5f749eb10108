"""`cellmap_data.dataloader`."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import RandomSampler, Sampler, Subset

from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.memory import device_memory
from cellmap_lightning.compat.older_arguments import check_loader_arguments
from cellmap_lightning.compat.sampler import ClassBalancedSampler
from cellmap_lightning.datasets.source import Draw, SampleSource
from cellmap_lightning.errors import CellMapIndexError, CellMapTypeError
from cellmap_lightning.loading.dataloader import CellMapDataLoader as DataLoader
from cellmap_lightning.loading.prefetch import PrefetchSettings, decide
from cellmap_lightning.loading.samples import Samples
from cellmap_lightning.sampling.torch_samplers import PositionSampler
from cellmap_lightning.wording import plural

log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


class _Chosen(Samples):
    """Samples at positions from a third-party sampler, numbered by `_Numbered`.

    Args:
        dataset: where they are.
        positions: the positions that there are to choose from; None for all.
        pin: read into page-locked memory.
    """

    def __init__(self, dataset: SampleSource, positions: Sequence[int] | None, pin: bool) -> None:
        super().__init__(dataset, 1, False, dataset.seed, pin, range(1))
        self.positions = range(len(dataset)) if positions is None else positions

    def __len__(self) -> int:
        return len(self.positions)

    def draws(self, samples: Sequence[int]) -> list[Draw]:
        """Return the samples at the chosen positions."""
        # Randomness is a function of the number; its remainder is the index among the positions.
        places = [int(self.positions[n % len(self)]) for n in samples]
        draws: list[Draw] = self.dataset.augmented(samples, places, self.seed)
        return draws


class _Numbered(Sampler[int]):
    """Numbers the choices of a sampler on: ``drawn * size + choice``.

    Args:
        sampler: chooses.
        size: how many there are to choose from.
    """

    def __init__(self, sampler: Iterable[int], size: int) -> None:
        self.sampler, self.size, self.drawn = sampler, size, 0

    def __iter__(self) -> Iterator[int]:
        for choice in self.sampler:
            if not 0 <= int(choice) < self.size:
                raise CellMapIndexError(
                    f"the sampler chose {int(choice)}, and there are {plural(self.size, 'position')}"
                )
            self.drawn += 1
            yield (self.drawn - 1) * self.size + int(choice)

    def __len__(self) -> int:
        return len(self.sampler)  # type: ignore[arg-type]


def _samples_of_an_epoch(
    batch_size: int, iterations: int | None, samples: int | None, batches: int | None
) -> int | None:
    """Return the samples of an epoch from ``iterations_per_epoch`` and its newer names; None if none is given.

    Raises:
        CellMapTypeError: several are given.
    """
    given = [n for n in (iterations, samples, batches) if n is not None]
    if len(given) > 1:
        raise CellMapTypeError("samples_per_epoch and batches_per_epoch both give the length of an epoch; give one")
    if iterations is not None:
        # Logged, since programs that hide warnings would not notice an epoch of another length.
        log.warning(
            "iterations_per_epoch=%d counts samples, as in cellmap-data of 2026: an epoch has %d batches of %d; as "
            "batches, which it counted in 2025, give batches_per_epoch=%d, and otherwise samples_per_epoch=%d",
            iterations, -(-iterations // batch_size), batch_size, iterations, iterations,
        )  # fmt: skip
    if batches is not None:
        return batches * batch_size
    return given[0] if given else None


def _chosen_positions(
    dataset: Any,
    source: SampleSource,
    sampler: Any,
    count: int | None,
    is_train: bool,
    rng: torch.Generator | None,
    seed: int,
    pin: bool,
) -> dict[str, Any]:
    """Return ``dataset`` and ``sampler`` of a loader over a subset, or of one with a third-party sampler."""
    positions = list(dataset.indices) if isinstance(dataset, Subset) else None
    chosen = _Chosen(source, positions, pin)
    if sampler is None:
        order = torch.Generator("cpu").manual_seed(seed & 0x7FFFFFFFFFFFFFFF) if rng is None else rng
        sampler = RandomSampler(chosen, num_samples=count, generator=order) if is_train else range(len(chosen))
    return {"dataset": chosen, "sampler": _Numbered(sampler, len(chosen))}


class CellMapDataLoader(DataLoader):
    """A `cellmap_lightning.CellMapDataLoader` with the constructor of cellmap-data, which delivers on a device.

    See docs/migration.md.

    Args:
        dataset: a dataset of this package, or a `CellMapSubset` of one.
        classes: has no effect: they are the dataset's.
        batch_size: samples of a batch.
        num_workers: worker processes; the dataset's threads read without any.
        weighted_sampler: while training, each class as often as every other.
        sampler: chooses positions, instead.
        is_train: draw samples at random.
        rng: gives the seed.
        device: where batches are delivered; by default the CPU. They travel compact, and are finished there.
        iterations_per_epoch: older name of ``samples_per_epoch``.
        samples_per_epoch: samples of an epoch; by default as many as there are tiles, or positions of a subset.
        batches_per_epoch: the same in batches.
        kwargs: see `cellmap_lightning.CellMapDataLoader`.
    """

    def __init__(
        self,
        dataset: Any,
        classes: Sequence[str] | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        weighted_sampler: bool = False,
        sampler: Any = None,
        is_train: bool = True,
        rng: torch.Generator | None = None,
        device: str | torch.device | None = None,
        iterations_per_epoch: int | None = None,
        samples_per_epoch: int | None = None,
        batches_per_epoch: int | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs = check_loader_arguments(kwargs)
        count = _samples_of_an_epoch(batch_size, iterations_per_epoch, samples_per_epoch, batches_per_epoch)
        source = dataset.dataset if isinstance(dataset, Subset) else dataset
        if not isinstance(source, SampleSource):
            raise CellMapTypeError(f"CellMapDataLoader needs a CellMapDataset, got {type(source).__name__}")
        target = torch.device(device) if device is not None else _CPU
        seed = source.seed if rng is None else rng.initial_seed()
        if callable(sampler) and not isinstance(sampler, Sampler):
            sampler = sampler()
        if weighted_sampler and is_train and sampler is None:
            if isinstance(dataset, Subset):
                log.warning("weighted_sampler=True: positions of a subset are drawn uniformly, since they are given")
            else:
                sampler = ClassBalancedSampler(source, count or source.tile_count, seed)
        self._sampler = sampler
        if isinstance(sampler, ClassBalancedSampler) and sampler.by_strategy is not None:
            sampler = sampler.by_strategy
        pin = kwargs.pop("pin_memory", False) or target.type == "cuda"
        source_options: dict[str, Any]
        if isinstance(dataset, Subset) or not (sampler is None or isinstance(sampler, PositionSampler)):
            source_options = _chosen_positions(dataset, source, sampler, count, is_train, rng, seed, pin)
        else:
            if not is_train and count is not None:
                count = min(count, source.tile_count)
            source_options = {
                "dataset": source, "sampler": sampler, "samples_per_epoch": count, "seed": seed, "pin_memory": pin
            }  # fmt: skip
        super().__init__(
            batch_size=batch_size,
            num_workers=num_workers,
            is_train=is_train,
            finish=target.type == "cpu",
            **{"drop_last": False, **source_options, **kwargs},
        )
        self.classes, self.is_train, self.rng = list(source.classes), is_train, rng
        self.iterations_per_epoch = iterations_per_epoch
        self.to(target)

    @property
    def loader(self) -> "CellMapDataLoader":
        """Itself: it is a `torch.utils.data.DataLoader`."""
        return self

    def to(self, device: str | torch.device, non_blocking: bool = True) -> "CellMapDataLoader":
        """Deliver on a device from the next pass on."""
        self.options = replace(self.options, device=torch.device(device))
        self.finish = self.device.type == "cpu"
        memory = self.batch_memory()
        found = decide(memory, self.device.type, device_memory(self.device), PrefetchSettings())
        self.options = replace(self.options, decision=found if found.enabled else None)
        return self

    @staticmethod
    def collate_fn(batch: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Join samples of a dataset: tensors are stacked, anything else is listed."""
        names = list(batch[0]) if batch else []
        joined = {name: [sample[name] for sample in batch] for name in names}
        return {
            name: torch.stack(values) if all(isinstance(v, torch.Tensor) for v in values) else values
            for name, values in joined.items()
        }

    def refresh(self) -> None:
        """Refresh a sampler that has a method for it; other samplers draw again in each pass."""
        refresh = getattr(self._sampler, "refresh", None)
        if refresh is not None:
            refresh()

    def __iter__(self) -> Any:
        return map(self._on_device, super().__iter__()) if self.device.type != "cpu" else super().__iter__()

    def _on_device(self, batch: Any) -> dict[str, torch.Tensor]:
        if isinstance(batch, CompactBatch):
            return batch.to(self.device).finish()
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}

    def __repr__(self) -> str:
        return f"CellMapDataLoader({self.source!r}, batch_size={self.batch_size}, is_train={self.is_train})"
