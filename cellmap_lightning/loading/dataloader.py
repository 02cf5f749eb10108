"""Samples as batches: a `DataLoader` that a Trainer, or a plain loop, can use."""

import os
import time
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from cellmap_lightning.batches.compact_batch import CompactBatch, CompactRequest
from cellmap_lightning.batches.layout import BatchLayout
from cellmap_lightning.batches.memory import BatchMemory, check_fits, device_memory
from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapError, CellMapValueError, WorkerError
from cellmap_lightning.loading.prefetch import (
    STREAM_DEVICES,
    NothingAhead,
    PrefetchDecision,
    ReadAhead,
    SideStream,
    prefetch,
)
from cellmap_lightning.loading.resume import Steps, StreamPosition
from cellmap_lightning.loading.sampler import StreamSampler
from cellmap_lightning.loading.samples import NumberedSamples, Samples, WrappedSamples, collate
from cellmap_lightning.loading.slots import SlotBatch, Slots
from cellmap_lightning.loading.waiting import TimedBatches, WaitTimes
from cellmap_lightning.loading.workers import TIMED_OUT, begin_worker, end_workers, start_method, watched
from cellmap_lightning.sampling.positions import PositionSampler


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


#: Seconds after which a worker process that delivers nothing is an error: first batches may decode for minutes.
WORKER_TIMEOUT = 1200.0
_SHARED = (
    "passes of one loader at a time cannot share its worker processes (persistent_workers=False: each has its own)"
)


class CellMapDataLoader(DataLoader[Any]):
    """Batches of a `CellMapDataset` or `CellMapMultiDataset`, or of any dataset around one.

    Batches are read by the dataset's own threads, so ``num_workers=0`` is the fast way. Value transforms run where the
    batch is finished, in the main process.

    A subclass that overrides ``__getitem__`` is read through it, and so is any other map-style dataset, such as a
    `torch.utils.data.Subset`: one sample after the other, finished. ``loader.dataset`` can be given to other loaders,
    whose samples are finished too.

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
        finish: yield finished batches (float32); False leaves them compact, for `BatchLayout.finish`. Or a function of
            the loader that returns this when a pass begins.
        drop_last: leave an incomplete last batch out; by default while training.
        rank: this process among ``world``; by default that of `torch.distributed`.
        world: number of processes.
        pin_memory: read into page-locked memory.
        device: where the batches are used; they are copied to it if ``decision`` says so.
        decision: have batches ahead, see `prefetch.decide`; by default none are.
        waiting: counts up while batches are waited for.
        steps: the Trainer's count of batches, by which `state_dict` says how far a pass has come; by default as many as
            were delivered.
        persistent_workers: keep worker processes between epochs; by default where there are any.
        prefetch_factor: batches ahead per worker process.
        timeout: seconds after which a worker that delivers nothing is an error; 0 waits for ever. Reads of single
            objects have a shorter one, see `CellMapDataset`.
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
        dataset: SampleSource | NumberedSamples | Dataset[Any],
        batch_size: int = 1,
        num_workers: int = 0,
        samples_per_epoch: int | None = None,
        is_train: bool = True,
        seed: int | None = None,
        finish: "bool | Callable[[CellMapDataLoader], bool]" = True,
        *,
        drop_last: bool | None = None,
        rank: int | None = None,
        world: int | None = None,
        pin_memory: bool = False,
        device: torch.device | None = None,
        decision: PrefetchDecision | None = None,
        waiting: WaitTimes | None = None,
        steps: Steps | None = None,
        persistent_workers: bool | None = None,
        prefetch_factor: int | None = None,
        timeout: float = WORKER_TIMEOUT,
        multiprocessing_context: Any = None,
        worker_init_fn: Any = None,
        sampler: Iterable[int] | None = None,
        batch_sampler: Iterable[list[int]] | None = None,
        shuffle: bool | None = None,
        tiles: Sequence[int] | None = None,
    ) -> None:
        source: Any = dataset.dataset if isinstance(dataset, NumberedSamples) else dataset
        strategy = None
        if isinstance(sampler, PositionSampler):  # it says how to draw; the numbers of the samples are the loader's own
            if sampler.dataset is not source:
                raise CellMapValueError(f"the sampler draws positions of {sampler.dataset}, not of {source}")
            strategy, seed, samples_per_epoch = sampler.strategy, sampler.seed, sampler.samples_per_epoch
            sampler, shuffle, is_train = None, None, True
        samples: NumberedSamples
        if isinstance(dataset, NumberedSamples) and strategy is None:
            samples = copy(dataset)  # with other workers than the loader that it was taken from
            samples.slots = None
        elif isinstance(source, SampleSource):
            seed = source.seed if seed is None else seed
            samples = Samples(source, samples_per_epoch, is_train, seed, pin_memory, tiles, strategy)
        else:
            samples = WrappedSamples(source, samples_per_epoch, is_train, seed or 0, pin_memory)
        slots = num_workers > 0 and Slots.possible() and not samples.overridden
        if num_workers > 0:
            # Not None: Lightning would add one that makes every worker import it.
            worker_init_fn = worker_init_fn or begin_worker
            multiprocessing_context = start_method(samples.sources, multiprocessing_context)
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise CellMapValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if shuffle is not None and shuffle != is_train and sampler is None and batch_sampler is None:
            raise CellMapValueError(f"shuffle={shuffle} contradicts is_train={is_train}, from which the order follows")
        common: dict[str, Any] = {
            "num_workers": num_workers,
            "collate_fn": collate,
            # Batches are read, or copied out of a slot, into page-locked memory.
            "pin_memory": samples.pin and num_workers > 0 and not slots,
            "timeout": timeout if num_workers else 0,  # without workers there is nobody to wait for
            "worker_init_fn": worker_init_fn,
            # Where each pass would otherwise take a number from the global one, which is the user's.
            "generator": torch.Generator("cpu").manual_seed(samples.seed & 0x7FFFFFFFFFFFFFFF),
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
        self.finish = finish
        self.device = device or torch.device("cpu")
        self.decision = decision
        self.waiting = waiting or WaitTimes()
        self.steps = steps
        self._finishes = True
        own = self._own_sampler()
        #: None where the order is that of another sampler.
        self._position = StreamPosition(own, self._most, bool(self.drop_last), steps) if own is not None else None
        self._follow_sampler()
        self._nothing_under_way()

    def _follow_sampler(self) -> None:
        position = self._position
        if position is not None:
            follow = weakref.ref(position)

            def epoch_of(epoch: int) -> int:
                found = follow()
                return epoch if found is None else found.epoch_of(epoch)

            position.sampler.epoch_of = epoch_of

    def _nothing_under_way(self) -> None:
        #: The passes that were begun, what each takes its batches from, and what reads these.
        self._passes: weakref.WeakSet[Any] = weakref.WeakSet()
        self._streams: weakref.WeakSet[Any] = weakref.WeakSet()
        self._readings: weakref.WeakSet[Any] = weakref.WeakSet()

    def __getstate__(self) -> dict[str, Any]:
        # What is under way stays behind, and so does the Trainer, which cannot always be pickled.
        samples = copy(self.dataset)
        samples.slots = None  # type: ignore[attr-defined]
        here = {"_passes", "_streams", "_readings", "__pl_attrs_record"}  # the last is Lightning's, see `close`
        state = {name: value for name, value in self.__dict__.items() if name not in here}
        finish = self.finish if isinstance(self.finish, bool) else True
        return state | {"dataset": samples, "finish": finish, "steps": None, "_iterator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._follow_sampler()
        self._nothing_under_way()

    @property
    def _samples(self) -> NumberedSamples:
        samples: NumberedSamples = self.dataset  # type: ignore[assignment]
        return samples

    @property
    def _index_sampler(self) -> Any:
        # Iterators of this loader request compact batches. Those of loaders that are built from its parts do not, since
        # they would not know how to finish one.
        return _CompactRequests(super()._index_sampler)

    @property
    def source(self) -> Any:
        """The dataset that was given."""
        return self._samples.dataset

    @property
    def layout(self) -> BatchLayout:
        """How its batches are laid out and finished.

        Raises:
            CellMapTypeError: the dataset is not one of this package, but a wrapper.
        """
        return self._samples.layout

    @property
    def _most(self) -> int:
        """Samples of a batch at most; Lightning gives a batch sampler instead to predict."""
        size: Any = self.batch_size or getattr(self.batch_sampler, "batch_size", 1)
        return int(size)

    def batch_memory(self) -> BatchMemory:
        """The bytes of a batch, known before anything is read.

        Raises:
            CellMapTypeError: the dataset is not one of this package, but a wrapper.
        """
        return self.layout.memory(self._most)

    def __iter__(self) -> Generator[dict[str, torch.Tensor], None, None]:  # type: ignore[override]
        # A generator: Lightning asks twice for the iterator of one epoch and abandons one of them. Nothing starts, and
        # no epoch is counted, before the first batch is asked for.
        started = self._pass(partial(self._batches, partial(super().__iter__)))
        self._passes.add(started)
        for source in self._samples.sources:
            source.follow(self)
        return started

    def close(self) -> None:
        """End every pass under way, its thread, and the worker processes. A later pass begins anew."""
        # Workers are told to end. To drop the iterator would end them with its last reference, and Lightning may have
        # one: an error in a hook that makes loaders leaves it recording whatever is set on any of them.
        iterator, self._iterator = self._iterator, None
        for started in list(self._passes):
            try:
                started.close()
            except ValueError:  # somebody waits for a batch in it right now, and will be told that reading ended
                continue
        self._samples.slots = None
        # Whoever still waits for a batch of theirs would wait for ever, and ends them afterwards.
        if iterator is not None and not any(reading.gi_running for reading in list(self._readings)):
            end_workers(iterator)

    def _batches(self, start: Any) -> Generator[Any, None, None]:
        """The batches of a pass, as they were read; worker processes are started here."""
        samples = self._samples
        if self.num_workers > 0:
            samples.prepare()  # before they begin, so that all of them share what is kept
        slots = None
        if self._by_slots:
            # Workers count their batches from their own beginning: only those that live on may use the same slots.
            slots = samples.slots if self.persistent_workers else None
            if slots is None:
                samples.room = self._most
                slots = Slots(
                    samples.layout, samples.room, self.num_workers, self.prefetch_factor or 2,
                    self._finishes and samples.layout.custom,
                )  # fmt: skip
            samples.slots = slots
        with torch.device("cpu"):  # torch draws a seed on its default device, by the CPU's generator
            iterator = start()
        reading = self._read(iterator, partial(self._taken, slots, samples.pin))
        self._readings.add(reading)
        return reading

    def _read(self, iterator: Iterator[Any], taken: Any) -> Generator[Any, None, None]:
        pid, done = os.getpid(), 0

        def counted(batch: Any) -> Any:
            nonlocal done
            done += 1
            return taken(batch)

        try:
            # It holds no batch while it waits to be asked for the next.
            yield from map(counted, watched(iterator, self.timeout))
        except RuntimeError as e:
            explained = self._explained(e, done)
            if explained is None:
                raise
            raise explained from e
        finally:
            # Also where the traceback of an error holds on to the iterator. Persistent ones are the loader's to end,
            # and in a forked process they are the parent's.
            if iterator is not self._iterator and pid == os.getpid():
                end_workers(iterator)

    def _explained(self, error: RuntimeError, done: int) -> CellMapError | None:
        """What torch says of a worker that is gone or silent, with the crops that were waited for."""
        text = str(error)
        of_user_code = isinstance(error, CellMapError) or text.startswith("Caught ")  # in a worker
        if of_user_code or not any(
            words in text for words in (TIMED_OUT, "exited unexpectedly", "is killed by signal")
        ):
            return None
        crops = str(self.source)
        if self._position is not None:  # another sampler may not be iterated twice
            numbers = self.numbers(done)
            crops = ", ".join(dict.fromkeys(self._samples.crop(number) for number in numbers))
        if TIMED_OUT in text:
            what, advice = f"delivered nothing for {self.timeout:g} s", "timeout says how long to wait"
        else:
            what = "ended unexpectedly: it was killed, perhaps for memory"
            advice = f"fewer workers or a smaller batch_size need less ({text.splitlines()[0]})"
        return WorkerError(
            f"a worker process {what}, while batch {done} of the pass was waited for, which shows {crops}; {advice}"
        )

    @staticmethod
    def _taken(slots: Slots | None, pin: bool, batch: Any) -> Any:
        return slots.take(batch, pin) if slots is not None and isinstance(batch, SlotBatch) else batch

    def _take_over(self) -> None:
        """Persistent workers serve one pass at a time: end those before, which would take batches meant for this one.

        Raises:
            CellMapError: one of them waits for a batch right now.
        """
        for stream in list(self._streams):
            try:
                stream.close()
            except ValueError:
                raise CellMapError(f"{self.source}: {_SHARED}, and another thread waits for a batch in one") from None
            self._streams.discard(stream)

    def _pass(self, batches: Any) -> Generator[dict[str, torch.Tensor], None, None]:
        # Here and not where the loader is made, since Lightning's tuner makes loaders that it does not use.
        if not isinstance(self._samples, WrappedSamples):
            check_fits(self.batch_memory(), self._most, self.device, device_memory(self.device), str(self.source))
        if self._position is not None:
            self._position.start()
        self.__dict__["_finishes"] = self.finish if isinstance(self.finish, bool) else self.finish(self)
        present: Any = self._present
        engine: SideStream | ReadAhead | NothingAhead
        if self.persistent_workers:
            self._take_over()
        if self.decision is None or not self.decision.enabled:
            engine, stream = NothingAhead(self.device), batches()
        else:
            if self.device.type in STREAM_DEVICES:
                engine = SideStream(self.device)
            elif self._samples.overridden or self.layout.custom:
                engine = ReadAhead()  # somebody's own functions may use torch's generator, as the step does
            else:
                engine, present = ReadAhead(present), None
            stream = prefetch(batches, engine, self.decision.depth, self._cancel)
        self._streams.add(stream)
        timed = TimedBatches(stream, self.waiting, engine)
        try:
            # Neither keeps a batch that it has handed out: its memory is the step's alone.
            yield from map(self._delivering, timed if present is None else map(self._timed_present, timed))
            if stream not in self._streams:
                raise CellMapError(f"{self.source}: {_SHARED}, and another one was begun before this one had ended")
            if self._position is not None:
                self._position.under_way = False
        except RuntimeError as e:  # torch's handler of signals raises it wherever the main thread is
            explained = self._explained(e, self._position.delivered if self._position is not None else 0)
            if explained is None:
                raise
            raise explained from e
        finally:
            stream.close()

    def _cancel(self, thread: int) -> None:
        for source in self._samples.sources:
            source.cancel(thread)

    def _delivering(self, batch: Any) -> Any:
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
        """A batch in the form that was asked for."""
        if not isinstance(batch, CompactBatch):
            return batch  # by user code
        if batch.layout is None:  # from another process
            batch.layout = self.layout
        return batch.finish() if self._finishes else batch

    def _own_sampler(self) -> StreamSampler | None:
        """The loader's own sampler, also where Lightning has wrapped it to predict."""
        sampler: Any = self.sampler
        if not isinstance(sampler, DistributedSampler):
            sampler = getattr(self.batch_sampler, "sampler", None)
        return sampler if isinstance(sampler, StreamSampler) else None

    def numbers(self, batch: int) -> list[int]:
        """The numbers of the samples of a batch of the pass under way, else of the next one; counted from 0.

        Empty where somebody else's sampler gives the order.
        """
        return self._position.numbers(batch) if self._position is not None else []

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch."""
        if self._position is not None:
            self._position.sampler.set_epoch(epoch)

    # -- resuming

    def state_dict(self) -> dict[str, int]:
        """How far the samples have come: for `load_state_dict` of another loader, also one with other batches or ranks.

        Returns:
            ``epoch``, the number of its ``first`` sample, and how many ``samples`` of it are done, over all ranks: read
            and delivered, and under a Trainer those whose step has ended; the samples of an epoch (``count``), and the
            epoch that was set last (``given``). Empty where the order is that of another sampler.
        """
        return self._position.state() if self._position is not None else {}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Continue from where `state_dict` was taken: the next pass begins at the next sample of that epoch.

        Raises:
            CellMapKeyError: it is no such state.
        """
        if self._position is not None and state_dict:
            self._position.load(state_dict)
