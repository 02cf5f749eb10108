"""Samples as batches: a `DataLoader` that a Trainer, or a plain loop, can use."""

import multiprocessing
import time
import weakref
from collections.abc import Generator, Iterable, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.sampling.arrays import BatchLayout, CompactBatch
from cellmap_lightning.sampling.memory import BatchMemory, check_fits, device_memory
from cellmap_lightning.sampling.positions import PositionSampler
from cellmap_lightning.sampling.prefetch import (
    STREAM_DEVICES,
    NothingAhead,
    PrefetchDecision,
    ReadAhead,
    SideStream,
    prefetch,
)
from cellmap_lightning.sampling.sampler import StreamSampler
from cellmap_lightning.sampling.slots import SlotBatch, Slots
from cellmap_lightning.sampling.source import Samples, SampleSource
from cellmap_lightning.sampling.waiting import Timed, Waiting


def _as_read(batch: Any) -> Any:
    """The dataset reads whole batches, so there is nothing left to collate."""
    return batch


def _begin(worker: int) -> None:
    """In a new worker process: one thread for torch, as `DataLoader` itself sets."""


def _start_method(source: SampleSource, given: Any) -> Any:
    """How worker processes are started.

    Raises:
        CellMapValueError: by a fork, with a reader whose threads would be missing in the child.
    """
    unsafe = any(dataset.reader == "tensorstore" for dataset in source.datasets)
    if given is None and not unsafe:
        return None
    context = multiprocessing.get_context("forkserver") if given is None else given
    if isinstance(context, str):
        context = multiprocessing.get_context(context)
    method = context.get_start_method()
    if unsafe and method == "fork":
        raise CellMapValueError(
            "reader='tensorstore' does not work in forked processes; leave multiprocessing_context out, or say "
            "'forkserver' or 'spawn'"
        )
    if method == "forkserver":
        # Imported once, in the process that workers are forked from.
        context.set_forkserver_preload(["cellmap_lightning.sampling.dataset"])
    return context


class CellMapDataLoader(DataLoader[Any]):
    """Batches of a `CellMapDataset` or `CellMapMultiDataset`.

    Batches are read by the dataset's own threads, so ``num_workers=0`` is the fast way. Value transforms run where the
    batch is finished, in the main process.

    Args:
        dataset: where the samples come from. ``loader.dataset`` is a view of it with as many items as an epoch has
            samples; its ``.dataset`` is this one.
        batch_size: samples of a batch, per rank.
        num_workers: worker processes.
        samples_per_epoch: samples of an epoch over all ranks; by default as many as tiles cover every crop once.
        is_train: draw samples at random, augmented if the dataset is for training; otherwise go through the tiles, in
            an order of which every beginning is spread over all crops. Where a tile overlaps the one before it its
            targets are unknown, so that all tiles together show each voxel of a target once.
        seed: what everything random follows from; by default the dataset's.
        finish: yield finished batches (float32); False leaves them compact, for `BatchLayout.finish`.
        drop_last: leave an incomplete last batch out; by default while training.
        rank: this process among ``world``; by default that of `torch.distributed`.
        world: number of processes.
        pin_memory: read into page-locked memory.
        device: where the batches are used; they are copied to it if ``decision`` says so.
        decision: have batches ahead, see `prefetch.decide`; by default none are.
        carry: compact batches carry the means to finish them, and their floats as integers of the same bits, since
            Lightning would convert them to the precision of the model before: for `CellMapDataModule`, see
            `CompactBatch.carried`.
        waiting: counts up while batches are waited for.
        persistent_workers: keep worker processes between epochs; by default where there are any.
        prefetch_factor: batches ahead per worker process.
        timeout: seconds after which a worker that delivers nothing is an error; 0 waits for ever.
        multiprocessing_context: how worker processes are started; by default as is safe with the reader.
        worker_init_fn: called in each worker process.
        sampler: replaces the loader's own, as Lightning does for ``overfit_batches``; or a `PositionSampler`, such as
            `ClassBalancedSampler`, whose strategy, seed and number of samples are then the loader's.
        batch_sampler: likewise, as Lightning does to predict.
        shuffle: taken for torch's sake; the order follows from ``is_train``.
        tiles: the tiles to go through, in this order, such as ``range(dataset.tile_count)``.

    Raises:
        CellMapValueError: the numbers do not fit together.
        CellMapMemoryError: a batch is larger than the whole memory of ``device``; raised when a pass begins.
    """

    def __init__(
        self,
        dataset: SampleSource | Samples,
        batch_size: int = 1,
        num_workers: int = 0,
        samples_per_epoch: int | None = None,
        is_train: bool = True,
        seed: int | None = None,
        finish: bool = True,
        *,
        drop_last: bool | None = None,
        rank: int | None = None,
        world: int | None = None,
        pin_memory: bool = False,
        device: torch.device | None = None,
        decision: PrefetchDecision | None = None,
        carry: bool = False,
        waiting: Waiting | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        timeout: float = 0,
        multiprocessing_context: Any = None,
        worker_init_fn: Any = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[list[int]] | None = None,
        shuffle: bool | None = None,
        tiles: Sequence[int] | None = None,
    ) -> None:
        source = dataset.dataset if isinstance(dataset, Samples) else dataset
        if not isinstance(source, SampleSource):
            raise CellMapTypeError(f"CellMapDataLoader needs a CellMapDataset, got {type(dataset).__name__}")
        strategy = None
        if isinstance(sampler, PositionSampler):  # it says how to draw; the numbers of the samples are the loader's own
            if sampler.dataset is not source:
                raise CellMapValueError(f"the sampler draws positions of {sampler.dataset}, not of {source}")
            strategy, seed, samples_per_epoch = sampler.strategy, sampler.seed, sampler.samples_per_epoch
            sampler, shuffle, is_train = None, None, True
        if isinstance(dataset, Samples) and strategy is None:
            samples = copy(dataset)  # with other workers than the loader that it was taken from
            samples.slots = None
        else:
            seed = source.seed if seed is None else seed
            samples = Samples(source, samples_per_epoch, is_train, seed, pin_memory, tiles, strategy)
        slots = num_workers > 0 and Slots.possible()
        if num_workers > 0:
            # Not None: Lightning would add one that makes every worker import it.
            worker_init_fn = worker_init_fn or _begin
            multiprocessing_context = _start_method(source, multiprocessing_context)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise CellMapValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if shuffle is not None and shuffle != is_train and sampler is None and batch_sampler is None:
            raise CellMapValueError(f"shuffle={shuffle} contradicts is_train={is_train}, from which the order follows")
        common: dict[str, Any] = {
            "num_workers": num_workers,
            "collate_fn": _as_read,
            # Batches are read, or copied out of a slot, into page-locked memory.
            "pin_memory": samples.pin and num_workers > 0 and not slots,
            "timeout": timeout if num_workers else 0,  # without workers there is nobody to wait for
            "worker_init_fn": worker_init_fn,
            # Where each pass would otherwise take a number from the global one, which is the user's.
            "generator": torch.Generator().manual_seed(samples.seed & 0x7FFFFFFFFFFFFFFF),
            "multiprocessing_context": multiprocessing_context,
            "prefetch_factor": prefetch_factor,
            "persistent_workers": num_workers > 0 if persistent_workers is None else persistent_workers,
        }
        if batch_sampler is not None:
            super().__init__(samples, batch_sampler=batch_sampler, **common)
        else:
            order = sampler if sampler is not None else StreamSampler(len(samples), is_train, rank, world)
            drop = is_train and len(order) >= batch_size if drop_last is None else drop_last  # type: ignore[arg-type]
            super().__init__(samples, batch_size=batch_size, sampler=order, drop_last=drop, **common)
        self._by_slots = slots
        self._slots: Slots | None = None
        self.finish = finish
        self.device = device or torch.device("cpu")
        self.carry = carry
        self.decision = decision
        self.waiting = waiting or Waiting()
        self._passes: weakref.WeakSet[Any] = weakref.WeakSet()

    @property
    def source(self) -> SampleSource:
        """The dataset that was given."""
        samples: Samples = self.dataset  # type: ignore[assignment]
        return samples.dataset

    @property
    def layout(self) -> BatchLayout:
        """How its batches are laid out and finished."""
        samples: Samples = self.dataset  # type: ignore[assignment]
        return samples.layout

    @property
    def _most(self) -> int:
        """Samples of a batch at most; Lightning gives a batch sampler instead to predict."""
        size: Any = self.batch_size or getattr(self.batch_sampler, "batch_size", 1)
        return int(size)

    def batch_memory(self) -> BatchMemory:
        """The bytes of a batch, known before anything is read."""
        return self.source.batch_memory(self._most)

    def __iter__(self) -> Generator[dict[str, torch.Tensor], None, None]:  # type: ignore[override]
        # A generator: Lightning asks twice for the iterator of one epoch and abandons one of them. Nothing starts, and
        # no epoch is counted, before the first batch is asked for.
        started = self._pass(partial(self._batches, partial(super().__iter__)))
        self._passes.add(started)
        self.source.follow(self)
        return started

    def close(self) -> None:
        """End every pass under way, its thread, and the worker processes. A later pass begins anew."""
        for started in list(self._passes):
            try:
                started.close()
            except ValueError:  # somebody waits for a batch in it right now, and will be told that reading ended
                continue
        self._slots = None
        self._iterator = None  # persistent workers end with it

    def _batches(self, start: Any) -> Generator[Any, None, None]:
        """The batches of a pass, as they were read; worker processes are started here."""
        samples: Samples = self.dataset  # type: ignore[assignment]
        if self.num_workers > 0:
            samples.prepare()  # before they begin, so that all of them share what is kept
        slots = None
        if self._by_slots:
            # Workers count their batches from their own beginning: only those that live on may use the same slots.
            slots = self._slots if self.persistent_workers else None
            if slots is None:
                samples.room = self._most
                slots = Slots(
                    samples.layout, samples.room, self.num_workers, self.prefetch_factor or 2,
                    self.finish and samples.layout.custom,
                )  # fmt: skip
            self._slots = samples.slots = slots
        pin = samples.pin
        return (slots.take(b, pin) if slots is not None and isinstance(b, SlotBatch) else b for b in start())

    def _pass(self, batches: Any) -> Generator[dict[str, torch.Tensor], None, None]:
        # Here and not where the loader is made, since Lightning's tuner makes loaders that it does not use.
        check_fits(self.batch_memory(), self._most, self.device, device_memory(self.device), str(self.source))
        sampler = self._own_sampler()
        if sampler is not None:
            sampler.start()
        present: Any = self._present
        engine: SideStream | ReadAhead | NothingAhead
        if self.decision is None or not self.decision.enabled:
            engine, stream = NothingAhead(self.device), batches()
        else:
            if self.device.type in STREAM_DEVICES:
                engine = SideStream(self.device)
            elif self.layout.custom:
                engine = ReadAhead()  # somebody's own functions may use torch's generator, as the step does
            else:
                engine, present = ReadAhead(present), None
            stream = prefetch(batches, engine, self.decision.depth, self.source.cancel)
        timed = Timed(stream, self.waiting, engine)
        try:
            # Neither keeps a batch that it has handed out: its memory is the step's alone.
            yield from timed if present is None else map(self._timed_present, timed)
        finally:
            stream.close()

    def _timed_present(self, batch: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._present(batch)
        finally:
            self.waiting.moved += time.perf_counter() - began

    def _present(self, batch: Any) -> Any:
        """A batch in the form that was asked for."""
        if self.finish:
            return self.layout.finish(batch)
        return batch.carried(self.layout) if self.carry and isinstance(batch, CompactBatch) else batch

    def _own_sampler(self) -> StreamSampler | None:
        """The loader's own sampler, also where Lightning has wrapped it to predict."""
        sampler: Any = self.sampler
        if not isinstance(sampler, DistributedSampler):
            sampler = getattr(self.batch_sampler, "sampler", None)
        return sampler if isinstance(sampler, StreamSampler) else None

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch."""
        sampler = self._own_sampler()
        if sampler is not None:
            sampler.set_epoch(epoch)
