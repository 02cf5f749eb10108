"""Samples as batches: a `DataLoader` that a Trainer, or a plain loop, can use."""

import itertools
import multiprocessing
import os
import time
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, DistributedSampler

from cellmap_lightning.errors import CellMapError, CellMapKeyError, CellMapTypeError, CellMapValueError, WorkerError
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
from cellmap_lightning.volumes.store import Remote


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
    if given is None and not unsafe and not any(isinstance(d.raw_at, Remote) for d in source.datasets):
        return None  # connections to elsewhere stay behind in a fork, and are made anew in the child
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


def _end_workers(iterator: Iterator[Any]) -> None:
    """End the worker processes of an iterator of torch's, if it has any."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()


class Steps(Protocol):
    """A Trainer's own count of the training batches of an epoch.

    Attributes:
        done: batches whose step has ended.
        ended: whether the last of them was the last of its epoch.
    """

    @property
    def done(self) -> int: ...  # noqa: D102

    @property
    def ended(self) -> bool: ...  # noqa: D102

    def go_on_from(self, done: int) -> None:
        """A run goes on with as many batches done, of the size that they have now."""


#: Seconds after which a worker process that delivers nothing is an error: first batches may decode for minutes.
WORKER_TIMEOUT = 1200.0
_SHARED = (
    "passes of one loader at a time cannot share its worker processes (persistent_workers=False: each has its own)"
)


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
        self.finish = finish
        self.device = device or torch.device("cpu")
        self.carry = carry
        self.decision = decision
        self.waiting = waiting or Waiting()
        self.steps = steps
        #: What the next pass goes on from, if it is that epoch.
        self._resume: dict[str, int] | None = None
        self._delivered = self._steps_before = 0
        self._under_way = False
        self._nothing_under_way()

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
        return state | {"dataset": samples, "steps": None, "_iterator": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._nothing_under_way()

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
        # Workers are told to end. To drop the iterator would end them with its last reference, and Lightning may have
        # one: an error in a hook that makes loaders leaves it recording whatever is set on any of them.
        iterator, self._iterator = self._iterator, None
        for started in list(self._passes):
            try:
                started.close()
            except ValueError:  # somebody waits for a batch in it right now, and will be told that reading ended
                continue
        samples: Samples = self.dataset  # type: ignore[assignment]
        samples.slots = None
        # Whoever still waits for a batch of theirs would wait for ever, and ends them afterwards.
        if iterator is not None and not any(reading.gi_running for reading in list(self._readings)):
            _end_workers(iterator)

    def _batches(self, start: Any) -> Generator[Any, None, None]:
        """The batches of a pass, as they were read; worker processes are started here."""
        samples: Samples = self.dataset  # type: ignore[assignment]
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
                    self.finish and samples.layout.custom,
                )  # fmt: skip
            samples.slots = slots
        reading = self._read(start(), partial(self._taken, slots, samples.pin))
        self._readings.add(reading)
        return reading

    def _read(self, iterator: Iterator[Any], taken: Any) -> Generator[Any, None, None]:
        pid, done = os.getpid(), 0

        def counted(batch: Any) -> Any:
            nonlocal done
            done += 1
            return taken(batch)

        try:
            yield from map(counted, iterator)  # and holds no batch while it waits to be asked for the next
        except RuntimeError as e:
            explained = self._explained(e, done)
            if explained is None:
                raise
            raise explained from e
        finally:
            # Also where the traceback of an error holds on to the iterator. Persistent ones are the loader's to end,
            # and in a forked process they are the parent's.
            if iterator is not self._iterator and pid == os.getpid():
                _end_workers(iterator)

    def _explained(self, error: RuntimeError, done: int) -> CellMapError | None:
        """What torch says of a worker that is gone or silent, with the crops that were waited for."""
        text = str(error)
        if isinstance(error, CellMapError) or not any(
            words in text for words in ("timed out after", "exited unexpectedly", "is killed by signal")
        ):
            return None
        crops = str(self.source)
        if self._own_sampler() is not None:  # nobody else's order is gone through twice
            samples: Samples = self.dataset  # type: ignore[assignment]
            numbers = next(itertools.islice(iter(self.batch_sampler or ()), done, None), [])
            crops = ", ".join(dict.fromkeys(samples.crop(number) for number in numbers))
        if "timed out after" in text:
            what, advice = f"delivered nothing for {self.timeout:g} s", "timeout says how long to wait"
        else:
            what = "ended unexpectedly: it was killed, perhaps for memory"
            advice = "fewer workers or a smaller batch_size need less"
        return WorkerError(
            f"a worker process {what}, while batch {done} of the pass was waited for, which shows {crops}; {advice} "
            f"({text.splitlines()[0]})"
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
        check_fits(self.batch_memory(), self._most, self.device, device_memory(self.device), str(self.source))
        self._start()
        present: Any = self._present
        engine: SideStream | ReadAhead | NothingAhead
        if self.persistent_workers:
            self._take_over()
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
        self._streams.add(stream)
        timed = Timed(stream, self.waiting, engine)
        try:
            # Neither keeps a batch that it has handed out: its memory is the step's alone.
            yield from map(self._delivering, timed if present is None else map(self._timed_present, timed))
            if stream not in self._streams:
                raise CellMapError(f"{self.source}: {_SHARED}, and another one was begun before this one had ended")
            self._under_way = False
        except RuntimeError as e:  # torch's handler of signals raises it wherever the main thread is
            explained = self._explained(e, self._delivered)
            if explained is None:
                raise
            raise explained from e
        finally:
            stream.close()

    def _delivering(self, batch: Any) -> Any:
        self.__dict__["_delivered"] += (
            1  # not by setattr: where Lightning records what is set, each batch would add to it
        )
        return batch

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

    def numbers(self, batch: int) -> list[int]:
        """The numbers of the samples of a batch of the pass under way, else of the next one; counted from 0.

        Empty where somebody else's sampler gives the order.
        """
        sampler = self._own_sampler()
        if sampler is None:
            return []
        epoch, skip = sampler.epoch, sampler.skip
        if not self._under_way:
            sampler.epoch, sampler.skip = sampler.next_epoch, 0
        try:
            return list(itertools.islice(sampler, batch * self._most, (batch + 1) * self._most))
        finally:
            sampler.epoch, sampler.skip = epoch, skip

    def set_epoch(self, epoch: int) -> None:
        """The next pass is this epoch."""
        sampler = self._own_sampler()
        if sampler is not None:
            sampler.set_epoch(epoch)

    # -- going on where a run has stopped

    def _start(self) -> None:
        """A pass begins, in the middle of its epoch if a run goes on there."""
        sampler = self._own_sampler()
        if sampler is None:
            return
        resume, self._resume = self._resume, None
        skip = 0
        if resume is not None and resume["epoch"] == sampler.next_epoch:
            skip = resume["samples"]
        elif resume is not None and self._batches_left(resume["samples"]) == 0:
            # With max_steps, Lightning numbers an epoch too many where a checkpoint was saved at the end of one.
            sampler.begin_at(sampler.next_epoch, resume["first"] + sampler.count)
        sampler.start(skip)
        self._delivered, self._under_way = 0, True
        self._steps_before = self.steps.done if self.steps is not None else 0

    def _batches_left(self, samples: int) -> int:
        """Batches of this rank in an epoch of which so many samples are done, over all ranks."""
        sampler = self._own_sampler()
        left = sampler.left(samples) if sampler is not None else 0
        return left // self._most if self.drop_last else -(-left // self._most)

    def state_dict(self) -> dict[str, int]:
        """How far the samples have come: for `load_state_dict` of another loader, also one with other batches or ranks.

        Returns:
            ``epoch``, the number of its ``first`` sample, and how many ``samples`` of it are done, over all ranks: read
            and delivered, and under a Trainer those whose step has ended.
        """
        sampler = self._own_sampler()
        if sampler is None:  # somebody else's order, of which nothing is known
            return {}
        if self._resume is not None:
            return dict(self._resume)
        epoch, samples = sampler.next_epoch, 0
        if self._under_way:
            done = self._delivered if self.steps is None else self.steps.done - self._steps_before
            epoch, samples = sampler.epoch, sampler.skip + done * self._most * sampler.num_replicas
        return {"epoch": epoch, "first": sampler.first(epoch), "samples": min(samples, sampler.count)}

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        """Go on from where `state_dict` was taken: the next pass begins at the next sample of that epoch.

        Raises:
            CellMapKeyError: it is no such state.
        """
        sampler = self._own_sampler()
        if sampler is None or not state_dict:
            return
        missing = sorted({"epoch", "first", "samples"} - set(state_dict))
        if missing:
            raise CellMapKeyError(
                f"the state of a loader has epoch, first and samples; {', '.join(missing)} is missing"
            )
        epoch, first, samples = (int(state_dict[name]) for name in ("epoch", "first", "samples"))
        # Epochs may have another length now. More may be done than they have, or their end may have been reached: then
        # this epoch has ended, and the next one begins behind what is done.
        ended = self.steps is not None and self.steps.ended and self._batches_left(samples) > 0
        if samples > sampler.count or ended:
            first, samples = first + samples - sampler.count, sampler.count
        sampler.begin_at(epoch, first)
        sampler.set_epoch(epoch)
        self._resume = {"epoch": epoch, "first": first, "samples": samples}
        self._under_way = False
        if self.steps is not None:
            self.steps.go_on_from(len(self) - self._batches_left(samples))
