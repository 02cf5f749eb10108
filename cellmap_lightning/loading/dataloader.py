"""A `DataLoader` of a dataset's samples, for a Trainer or a plain loop."""

import os
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, Unpack

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cellmap_lightning.batches.compact_batch import CompactBatch, CompactRequest
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.batches.memory import BatchMemory, check_fits, device_memory
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapError, CellMapValueError, WorkerError
from cellmap_lightning.loading.options import LoaderOptions, TorchOptions, check_torch_options
from cellmap_lightning.loading.prefetch import (
    STREAM_DEVICES,
    NoPrefetch,
    PrefetchDecision,
    ReadAhead,
    SideStream,
    prefetch,
)
from cellmap_lightning.loading.resident_reader import ResidentReader
from cellmap_lightning.loading.resume import StreamPosition
from cellmap_lightning.loading.sampler import StreamSampler
from cellmap_lightning.loading.samples import NumberedSamples, Samples, WrappedSamples, number_samples
from cellmap_lightning.loading.slots import SlotBatch, Slots
from cellmap_lightning.loading.waiting import TimedBatches, WaitTimes
from cellmap_lightning.loading.workers import describe_failure, end_workers, torch_arguments, watched
from cellmap_lightning.resident.device_cache import DeviceCache
from cellmap_lightning.sampling.torch_samplers import PositionSampler
from cellmap_lightning.validation import int_at_least


class _CompactRequests:
    """The batches of a batch sampler, as requests for compact batches.

    Args:
        batches: the batch sampler.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[CompactRequest]:
        return map(CompactRequest, self._batches)

    def __len__(self) -> int:
        return len(self._batches)


_SHARED_WORKERS = "persistent workers serve one pass at a time; use persistent_workers=False for passes side by side"


def _use_resident(samples: NumberedSamples, resident: DeviceCache | None, num_workers: int) -> None:
    """Gather batches from voxels on a device, unless user code overrides the reading of samples.

    Raises:
        CellMapValueError: there are worker processes.
    """
    if resident is None:
        return
    if num_workers > 0:
        raise CellMapValueError(
            f"resident needs num_workers=0, since one process uses the device, got num_workers={num_workers}"
        )
    if isinstance(samples, Samples) and not samples.overridden:
        samples.resident = ResidentReader(samples.dataset, resident, samples.pin)


def _without_run(options: LoaderOptions) -> LoaderOptions:
    """Return options without the Trainer and the voxels on a device, which other processes cannot use."""
    return replace(options, steps=None, resident=None)


class CellMapDataLoader(DataLoader[Any]):
    """Batches of a `CellMapDataset` or `CellMapMultiDataset`, or of any dataset that wraps one.

    Batches are read by the dataset's own threads, so ``num_workers=0`` is usually fastest. Value transforms run where
    the batch is finished, in the main process.

    A subclass that overrides ``__getitem__`` is read through it, and so is any other map-style dataset, such as a
    `torch.utils.data.Subset`: one finished sample after the other. ``loader.dataset`` can be passed to other loaders,
    which read finished samples too.

    Example:
        >>> loader = CellMapDataLoader(dataset, batch_size=4)  # doctest: +SKIP
        >>> for batch in loader:  # doctest: +SKIP
        ...     loss = criterion(model(batch["raw"]), batch["label"])

    Args:
        dataset: the source of samples. ``loader.dataset`` is a view of it with as many items as an epoch has samples;
            its ``.dataset`` is this one.
        batch_size: samples per batch and rank.
        num_workers: number of worker processes.
        samples_per_epoch: samples per epoch over all ranks; by default as many as tiles cover every crop once.
        is_train: draw samples at random, augmented if the dataset is for training; otherwise iterate over the tiles, in
            an order whose every beginning is spread over all crops. Where a tile overlaps the one before it its
            targets are unknown, so that all tiles together show each voxel of a target once.
        seed: seed of everything random; by default the dataset's.
        finish: yield finished batches (float32); False leaves them compact, for `BatchLayout.finish`. Or a function of
            the loader that returns this when a pass begins.
        tiles: the tiles to iterate over, in this order, such as ``range(dataset.tile_count)``.
        sampler: replaces the loader's own, as Lightning does for ``overfit_batches``; or a `PositionSampler`, such as
            `ClassBalancedSampler`, whose strategy, seed and number of samples the loader then uses.
        batch_sampler: likewise, as Lightning does to predict.
        options: ranks, device and prefetching, see `LoaderOptions`.
        torch_options: ``drop_last``, ``pin_memory``, ``persistent_workers`` and other arguments of torch's loader, see
            `TorchOptions`.

    Raises:
        CellMapValueError: the arguments contradict each other.
        CellMapMemoryError: a batch is larger than the whole memory of ``device``; raised when a pass begins.
    """

    def __init__(
        self,
        dataset: SampleSource | NumberedSamples | Dataset[Any],
        batch_size: int = 1,
        num_workers: int = 0,
        samples_per_epoch: int | None = None,
        is_train: bool = True,
        seed: int | None = None,
        finish: "bool | Callable[[CellMapDataLoader], bool]" = True,
        *,
        tiles: Sequence[int] | None = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[list[int]] | None = None,
        options: LoaderOptions | None = None,
        **torch_options: Unpack[TorchOptions],
    ) -> None:
        given = check_torch_options(torch_options, isinstance(dataset, NumberedSamples))
        options = options or LoaderOptions()
        strategy = None
        if isinstance(sampler, PositionSampler):
            # It decides how samples are drawn; the loader itself numbers them.
            source = dataset.dataset if isinstance(dataset, NumberedSamples) else dataset
            if sampler.dataset is not source:
                raise CellMapValueError(f"the sampler draws positions of {sampler.dataset}, not of {source}")
            strategy, seed, samples_per_epoch = sampler.strategy, sampler.seed, sampler.samples_per_epoch
            sampler, is_train = None, True
            given["shuffle"] = None
        int_at_least("batch_size", batch_size, 1)
        shuffle = given.get("shuffle")
        if shuffle is not None and shuffle != is_train and sampler is None and batch_sampler is None:
            raise CellMapValueError(f"shuffle={shuffle} contradicts is_train={is_train}, from which the order follows")
        pin = given.get("pin_memory", False)
        samples = number_samples(dataset, samples_per_epoch, is_train, seed, pin, tiles, strategy)
        _use_resident(samples, options.resident, num_workers)
        slots = num_workers > 0 and Slots.possible() and not samples.overridden
        arguments = torch_arguments(samples, num_workers, slots, given)
        if batch_sampler is not None:
            super().__init__(samples, batch_sampler=batch_sampler, **arguments)
        else:
            order = sampler
            if order is None:
                order = StreamSampler(len(samples), is_train, options.rank, options.world)
            drop = given.get("drop_last")
            drop = is_train and len(order) >= batch_size if drop is None else drop  # type: ignore[arg-type]
            super().__init__(samples, batch_size=batch_size, sampler=order, drop_last=drop, **arguments)
        self._by_slots = slots
        self.finish = finish
        self.options = replace(
            options, device=options.device or torch.device("cpu"), waiting=options.waiting or WaitTimes()
        )
        self._finishes = True
        stream = self._stream_sampler()
        #: None if another sampler defines the order.
        self._position = None
        if stream is not None:
            self._position = StreamPosition(stream, self._batch_limit, bool(self.drop_last), options.steps)
        self._follow_sampler()
        self._reset_passes()

    @property
    def device(self) -> torch.device:
        """The device that uses the batches."""
        return self.options.device or torch.device("cpu")

    @property
    def decision(self) -> PrefetchDecision | None:
        """The prefetching of batches."""
        return self.options.decision

    @property
    def waiting(self) -> WaitTimes:
        """The counters of seconds that batches are waited for."""
        assert self.options.waiting is not None
        return self.options.waiting

    def _follow_sampler(self) -> None:
        """Have the sampler ask the position for the epoch of the next pass, by a weak reference: no cycle."""
        position = self._position
        if position is not None:
            reference = weakref.ref(position)

            def epoch_of(epoch: int) -> int:
                alive = reference()
                return epoch if alive is None else alive.epoch_of(epoch)

            position.sampler.epoch_of = epoch_of

    def _reset_passes(self) -> None:
        #: Running passes over the loader.
        self._passes: weakref.WeakSet[Any] = weakref.WeakSet()
        #: The streams of batches that they consume.
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()
        #: The readers of these streams.
        self._readers: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # Without running passes, and without the Trainer, which cannot always be pickled.
        samples = copy(self.dataset)
        samples.slots = None  # type: ignore[attr-defined]
        local = {"_passes", "_streams", "_readers", "__pl_attrs_record"}  # the last is Lightning's, see `close`
        state = {name: value for name, value in self.__dict__.items() if name not in local}
        for name, value in state.items():  # the arguments that Lightning has recorded, while it replaces loaders
            if name.startswith("__pl_saved") and isinstance(value, dict):
                state[name] = {
                    key: _without_run(item) if isinstance(item, LoaderOptions) else item for key, item in value.items()
                }
        finish = self.finish if isinstance(self.finish, bool) else True
        options = _without_run(self.options)
        return state | {"dataset": samples, "finish": finish, "options": options, "_iterator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow_sampler()
        self._reset_passes()

    @property
    def _samples(self) -> NumberedSamples:
        samples: NumberedSamples = self.dataset  # type: ignore[assignment]
        return samples

    @property
    def _index_sampler(self) -> Any:
        # Iterators of this loader request compact batches. Those of loaders that are built from its parts do not, since
        # they could not finish one.
        return _CompactRequests(super()._index_sampler)

    @property
    def source(self) -> Any:
        """The dataset that the loader was made with."""
        return self._samples.dataset

    @property
    def layout(self) -> BatchLayout:
        """The layout of the batches.

        Raises:
            CellMapTypeError: the dataset is not one of this package, but a wrapper.
        """
        return self._samples.layout

    @property
    def _batch_limit(self) -> int:
        """The largest number of samples in a batch; Lightning passes a batch sampler instead to predict."""
        size: Any = self.batch_size or getattr(self.batch_sampler, "batch_size", 1)
        return int(size)

    def batch_memory(self) -> BatchMemory:
        """Return the bytes of a batch, before anything is read.

        Raises:
            CellMapTypeError: the dataset is not one of this package, but a wrapper.
        """
        return self.layout.memory(self._batch_limit)

    def __iter__(self) -> Generator[dict[str, torch.Tensor], None, None]:  # type: ignore[override]
        # A generator: Lightning asks twice for the iterator of one epoch and abandons one of them. Nothing starts, and
        # no epoch is counted, before the first batch is requested.
        started = self._pass(partial(self._batches, partial(super().__iter__)))
        self._passes.add(started)
        for source in self._samples.sources:
            source.follow(self)
        return started

    def close(self) -> None:
        """End every running pass, its thread, and the worker processes. The loader can be used again."""
        # Workers are shut down explicitly. Dropping the iterator would end them with its last reference, and Lightning
        # may hold one: after an error in a hook that makes loaders it records every attribute that is set on a loader.
        iterator, self._iterator = self._iterator, None
        for started in list(self._passes):
            try:
                started.close()
            except ValueError:  # it is running: another thread waits for a batch, and gets an error
                continue
        self._samples.slots = None
        # A consumer blocked on these workers would hang; it shuts them down itself.
        if iterator is not None and not any(reading.gi_running for reading in list(self._readers)):
            end_workers(iterator)

    def _batches(self, start: Callable[[], Iterator[Any]]) -> Generator[Any, None, None]:
        """Return the batches of a pass, as they are read. Worker processes are started here."""
        samples = self._samples
        if self.num_workers > 0:
            samples.prepare()  # before the workers start, so that all of them share the caches
        slots = None
        if self._by_slots:
            # Workers count their batches from their start: only persistent ones may reuse the same slots.
            slots = samples.slots if self.persistent_workers else None
            if slots is None:
                samples.room = self._batch_limit
                finished = self._finishes and samples.layout.custom
                slots = Slots(samples.layout, samples.room, self.num_workers, self.prefetch_factor or 2, finished)
            samples.slots = slots
        with torch.device("cpu"):  # torch draws a seed on its default device, with the CPU's generator
            iterator = start()
        reading = self._read(iterator, partial(self._from_slot, slots, samples.pin))
        self._readers.add(reading)
        return reading

    def _read(self, iterator: Iterator[Any], take: Callable[[Any], Any]) -> Generator[Any, None, None]:
        pid, done = os.getpid(), 0

        def counted(batch: Any) -> Any:
            nonlocal done
            done += 1
            return take(batch)

        try:
            with self._worker_errors(lambda: done):
                # `map`, so that this frame references no batch while it waits for the next request.
                yield from map(counted, watched(iterator, self.timeout))
        finally:
            # Also if the traceback of an error references the iterator. Persistent workers are ended by the loader, and
            # in a forked process they belong to the parent.
            if iterator is not self._iterator and pid == os.getpid():
                end_workers(iterator)

    @contextmanager
    def _worker_errors(self, batch: Callable[[], int]) -> Iterator[None]:
        """Turn torch's errors about dead or silent workers into a `WorkerError` that names the crops being read.

        Args:
            batch: the number of the batch of the pass that is waited for.
        """
        try:
            yield
        except RuntimeError as error:
            failure = describe_failure(error, self.timeout)
            if failure is None:
                raise
            problem, advice = failure
            crops = str(self.source)
            if self._position is not None:  # another sampler may not be iterated twice
                crops = ", ".join(dict.fromkeys(self._samples.crop(number) for number in self.numbers(batch())))
            raise WorkerError(
                f"a worker process {problem} during batch {batch()} of the pass, with samples of {crops}; {advice}"
            ) from error

    @staticmethod
    def _from_slot(slots: Slots | None, pin: bool, batch: Any) -> Any:
        return slots.take(batch, pin) if slots is not None and isinstance(batch, SlotBatch) else batch

    def _end_earlier_passes(self) -> None:
        """End earlier passes, which would take batches meant for this one: persistent workers serve one at a time.

        Raises:
            CellMapError: another thread waits for a batch of one of them right now.
        """
        for stream in list(self._streams):
            try:
                stream.close()
            except ValueError:
                raise CellMapError(
                    f"{self.source}: a second pass was begun while another thread waits for a batch of the first; "
                    f"{_SHARED_WORKERS}"
                ) from None
            self._streams.discard(stream)

    def _pass(self, batches: Any) -> Generator[dict[str, torch.Tensor], None, None]:
        # Checked here and not in the constructor, since Lightning's tuner makes loaders that it does not use.
        if not isinstance(self._samples, WrappedSamples):
            check_fits(
                self.batch_memory(), self._batch_limit, self.device, device_memory(self.device), str(self.source)
            )
        if self._position is not None:
            self._position.start()
        # Past torch's and Lightning's `__setattr__`.
        self.__dict__["_finishes"] = self.finish if isinstance(self.finish, bool) else self.finish(self)
        if self.persistent_workers:
            self._end_earlier_passes()
        timed, stream = self._timed_stream(batches)
        self._streams.add(stream)
        try:
            with self._worker_errors(lambda: self._position.delivered if self._position is not None else 0):
                # Nothing here references a batch that was yielded: its memory is the step's alone. The errors are
                # caught here too, as torch's signal handler raises them wherever the main thread is.
                yield from map(self._count_delivered, timed)
            if stream not in self._streams:
                raise CellMapError(f"{self.source}: a second pass was begun before this one ended; {_SHARED_WORKERS}")
            if self._position is not None:
                self._position.running = False
        finally:
            stream.close()

    def _timed_stream(self, batches: Any) -> tuple[Iterator[Any], Generator[Any, None, None]]:
        """Return the presented batches of a pass with their waits timed, and the stream that they come from."""
        engine: SideStream | ReadAhead | NoPrefetch
        present_here = True
        if self.decision is None or not self.decision.enabled:
            engine = NoPrefetch(self.device)
            stream = batches()
        else:
            if self.device.type in STREAM_DEVICES:
                engine = SideStream(self.device)
            elif self._samples.overridden or self.layout.custom:
                engine = ReadAhead()  # user code may use torch's generator, as the step does: not in a second thread
            else:
                engine, present_here = ReadAhead(self._present), False
            stream = prefetch(batches, engine, self.decision.depth, self._cancel)
        timed = TimedBatches(stream, self.waiting, engine)
        return map(self._timed_present, timed) if present_here else timed, stream

    def _cancel(self, thread: int) -> None:
        for source in self._samples.sources:
            source.cancel(thread)

    def _count_delivered(self, batch: Any) -> Any:
        if self._position is not None:
            self._position.delivered += 1
        return batch

    def _timed_present(self, batch: Any) -> Any:
        began = time.perf_counter()
        try:
            return self._present(batch)
        finally:
            self.waiting.moved += time.perf_counter() - began

    def _present(self, batch: Any) -> Any:
        """Return a batch in the form that was requested."""
        if not isinstance(batch, CompactBatch):
            return batch  # by user code
        if batch.layout is None:  # from another process
            batch.layout = self.layout
        return batch.finish() if self._finishes else batch

    def _stream_sampler(self) -> StreamSampler | None:
        """Return the loader's own sampler, also if Lightning has wrapped it to predict."""
        sampler: Any = self.sampler
        if not isinstance(sampler, DistributedSampler):
            sampler = getattr(self.batch_sampler, "sampler", None)
        return sampler if isinstance(sampler, StreamSampler) else None

    def numbers(self, batch: int) -> list[int]:
        """Return the numbers of the samples of a batch of the running pass, else of the next one; counted from 0.

        Empty if another sampler defines the order.
        """
        return self._position.numbers(batch) if self._position is not None else []

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next pass."""
        if self._position is not None:
            self._position.sampler.set_epoch(epoch)

    # -- resuming

    def state_dict(self) -> dict[str, int]:
        """Return the position in the samples, for another loader, also one with other batches or ranks.

        Returns:
            ``epoch``, the number of its ``first`` sample, and how many ``samples`` of it are done, over all ranks: read
            and delivered, and under a Trainer those whose step has ended; the samples of an epoch (``count``), and the
            epoch that was set last (``given``). Empty if another sampler defines the order.
        """
        return self._position.state() if self._position is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue from a state of `state_dict`: the next pass begins at the next sample of that epoch.

        Raises:
            CellMapKeyError: keys of the state are missing.
        """
        if self._position is not None and state_dict:
            self._position.load(state_dict)
