"""Prefetching of batches: the decision, and the copies on a side stream.

A `PrefetchDecision` depends on numbers alone: bytes of a batch, type and memory of the device, settings. `prefetch`
carries it out: one thread reads the next batches and queues their copies on a side stream, while the step computes.
"""

import contextlib
import dataclasses
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.memory import BatchMemory
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.loading.resident_decision import ResidentDecision, ResidentRequest, decide_resident
from cellmap_lightning.runtime.thread_pool import end_threads

#: Types of device whose copies can overlap with compute.
STREAM_DEVICES = ("cuda", "xpu")
_END: Any = object()


@dataclass(frozen=True)
class PrefetchSettings:
    """The settings of prefetching; see docs/streams.md.

    Attributes:
        min_batch_mb: smallest size of a finished batch, in MiB, for which a stream is used.
        max_streams: largest number of side streams.
        depth: batches ahead, or ``"auto"``.
        memory_fraction: fraction of the device's memory that batches may take.
        enabled: ``"auto"``, or True (for any size and device), or False.
        max_depth: largest depth that ``"auto"`` chooses.
    """

    min_batch_mb: float = 100.0
    max_streams: int = 8
    depth: int | str = "auto"
    memory_fraction: float = 0.2
    enabled: bool | str = "auto"
    max_depth: int = 2


@dataclass(frozen=True)
class PrefetchDecision:
    """The decision about prefetching; see docs/streams.md.

    Attributes:
        enabled: batches are prefetched.
        depth: batches ahead.
        streams: number of side streams; 0 if a thread only reads ahead.
        reason: the reason, with the numbers.
        resident: the decision about regions on the device.
    """

    enabled: bool
    depth: int
    streams: int
    reason: str
    resident: ResidentDecision = field(default_factory=ResidentDecision)


def decide(
    memory: BatchMemory,
    device_type: str,
    device_bytes: int | None,
    settings: PrefetchSettings,
    request: ResidentRequest | None = None,
) -> PrefetchDecision:
    """Decide about prefetching and regions on the device, as a function of the arguments alone: all ranks agree.

    Args:
        memory: bytes of a batch.
        device_type: type of device, such as ``cuda``.
        device_bytes: total memory of the device; None if it is unknown.
        settings: see `PrefetchSettings`.
        request: see `decide_resident`; None without regions on the device.
    """
    decision = _decide_prefetch(memory, device_type, device_bytes, settings)
    if request is None:
        return decision
    resident = decide_resident(request, memory, decision.depth, device_type, device_bytes)
    return dataclasses.replace(decision, resident=resident)


def _decide_prefetch(
    memory: BatchMemory, device_type: str, device_bytes: int | None, settings: PrefetchSettings
) -> PrefetchDecision:
    """Decide about prefetching.

    On CUDA and XPU devices batches of at least ``min_batch_mb`` are copied on a side stream. On other devices there is
    no copy to overlap; with ``enabled=True`` a thread reads (and finishes) them ahead, ``"auto"`` starts nothing.

    Args:
        memory: bytes of a batch.
        device_type: type of device, such as ``cuda``.
        device_bytes: total memory of the device; None if it is unknown.
        settings: see `PrefetchSettings`.

    Returns:
        The decision. The device's memory holds ``depth`` queued batches, the one in use and the one whose memory is
        freed when its step has run, in the form in which they are queued, and one finished batch. A queue for training
        stays full while the Trainer validates in the middle of an epoch: validation has a separate budget.
    """

    def off(reason: str) -> PrefetchDecision:
        return PrefetchDecision(False, 0, 0, reason)

    copies = device_type in STREAM_DEVICES
    size = f"a finished batch is {memory.total_mb:.1f} MiB"
    if settings.enabled is False:
        return off("switched off")
    if settings.enabled == "auto" and not copies:
        return off(
            f"a {device_type} device has no copies to overlap; StreamPrefetch(enabled=True) reads ahead in a thread"
        )
    if settings.enabled == "auto" and memory.total_mb < settings.min_batch_mb:
        return off(f"{size}, below the threshold of {settings.min_batch_mb:g} MiB")
    if copies and settings.max_streams < 1:
        return off("max_streams is 0")
    depth = settings.max_depth if settings.depth == "auto" else int(settings.depth)
    if depth < 1:
        return off(f"depth is {depth}")
    # Without a stream batches are finished before they are queued.
    queued = memory.compact.total_bytes if copies else memory.total_bytes
    share = f"{settings.memory_fraction:.0%} of the {'device' if copies else 'memory'}"
    if device_bytes:
        budget = int(settings.memory_fraction * device_bytes)
        share += f" is {budget / 2**20:.0f} MiB"
        # Besides the queue: one finished batch, the one in use and the one that is freed when its step has run.
        fits = (budget - memory.total_bytes) // queued - 2
        if fits < 1:
            return off(f"{size}, and {share}: too little for one batch ahead")
        depth = min(depth, fits)
    cause = "switched on" if settings.enabled is True else f"threshold {settings.min_batch_mb:g} MiB"
    transfer = f"{queued / 2**20:.1f} MiB are copied" if copies else "a thread reads, nothing is copied"
    return PrefetchDecision(True, depth, int(copies), f"{size} ({cause}), {transfer}, {share}")


class ReadAhead:
    """The engine of `prefetch` if nothing is copied to a device; see docs/streams.md.

    Args:
        prepare: called with each batch in the prefetching thread.
    """

    held = 0.0

    def __init__(self, prepare: Callable[[Any], Any] | None = None) -> None:
        self.prepare = prepare

    def bind(self) -> None:
        """Do nothing: there is no device to select in the thread."""

    def copy(self, batch: Any) -> tuple[Any]:
        """Return the prepared batch."""
        return (self.prepare(batch) if self.prepare else batch,)

    def acquire(self, batch: Any) -> Any:
        """Return the batch."""
        return batch

    def idle(self) -> bool:
        """Return True: a CPU is always idle while waiting."""
        return True


class SideStream:
    """The engine of `prefetch` that copies batches to a device on a side stream; see docs/streams.md.

    `copy` runs in the prefetching thread, `acquire` in the thread that uses the batch.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device)
        #: Seconds that the host was throttled, so that it does not run ahead of the device.
        self.held = 0.0
        self._idle = False
        self._before: torch.Event | None = None

    def bind(self) -> None:
        """Select the device in the calling thread: a new thread would use device 0."""
        if self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)

    def copy(self, batch: Any) -> tuple[Any, torch.Event]:
        """Queue the copies of a `CompactBatch`, or of the tensors in any collection.

        Returns:
            The batch on the device, and the event that marks the end of the copies.
        """
        with self.stream:
            if isinstance(batch, CompactBatch):
                moved: Any = batch.to(self.device)
            else:
                moved = apply_to_collection(batch, torch.Tensor, torch.Tensor.to, self.device, non_blocking=True)
        return moved, self.stream.record_event()

    def acquire(self, batch: Any, copied: torch.Event) -> Any:
        """Make the current stream wait for the copies, and hold their memory until it has used them."""
        current = torch.accelerator.current_stream(self.device)
        self._idle = current.query()
        # A host that queues step after step would hold a batch in memory for each of them. So at most two steps are
        # in flight: when one is queued, the one before may still run, and the earlier ones have ended.
        queued, self._before = self._before, current.record_event()
        if queued is not None:
            began = time.perf_counter()
            queued.synchronize()
            self.held += time.perf_counter() - began
        current.wait_event(copied)
        # Without this, memory that Python frees while the step's kernels still run would be reused by the side stream.
        if isinstance(batch, CompactBatch):
            for tensor in batch.tensors.values():
                tensor.record_stream(current)
        else:
            apply_to_collection(batch, torch.Tensor, torch.Tensor.record_stream, current)
        return batch

    def idle(self) -> bool:
        """Return True if the device had no queued work when the last batch was acquired."""
        return self._idle


class NoPrefetch:
    """The load of a device without prefetching; see docs/streams.md.

    Args:
        device: the device that uses the batches.
    """

    held = 0.0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def idle(self) -> bool:
        """Return True if the device has no queued work; a CPU that asks never has."""
        return self.device.type not in STREAM_DEVICES or bool(torch.accelerator.current_stream(self.device).query())


def _begin(threads: list[threading.Thread], engine: Any) -> None:
    """Register the new thread and bind the engine.

    A function and no method: a thread that references its `_Ahead` would prevent the end of an abandoned one.
    """
    threads.append(threading.current_thread())
    engine.bind()


class _Ahead:
    """The queue of batches ahead, and the thread that fills it.

    The thread has one task at a time, the next batch: an interpreter that exits still runs all queued tasks, and that
    should not be ``depth`` batches. Each task queues the next one when it ends, if there is room; else `take` does.
    """

    def __init__(self, batches: Iterator[Any], engine: Any, depth: int, cancel: Callable[[int], None] | None) -> None:
        self._batches: Iterator[Any] | None = batches
        self._engine, self._depth, self._cancel = engine, depth, cancel
        self._futures: deque[Future[Any]] = deque()
        self._lock = threading.RLock()
        self._threads: list[threading.Thread] = []
        self._pool = ThreadPoolExecutor(1, "cellmap-copy", initializer=_begin, initargs=(self._threads, engine))
        self._pid = os.getpid()

    def _step(self) -> Any:
        batches = self._batches
        batch = _END if batches is None else next(batches, _END)
        return _END if batch is _END else self._engine.copy(batch)

    def queue(self, done: Future[Any] | None = None) -> None:
        """Queue the read of the next batch, if there is room for it and the last read has ended."""
        with self._lock:
            if self._batches is None or len(self._futures) >= self._depth:
                return
            last = self._futures[-1] if self._futures else done  # `done` may have been taken already
            if last is not None and (not last.done() or last.exception() is not None or last.result() is _END):
                return
            try:
                future = self._pool.submit(self._step)
            except RuntimeError:  # the interpreter exits
                return
            self._futures.append(future)
        future.add_done_callback(self.queue)

    def take(self) -> Any:
        """Return the next batch, or `_END`, or raise the error of the source. The batch is not referenced afterwards.

        Raises:
            CellMapError: the thread is in another process, or the interpreter exits.
        """
        if self._pid != os.getpid():
            raise CellMapError("a pass with prefetched batches cannot continue in a forked process; begin a new one")
        if not self._futures:
            raise CellMapError("no batch can be prefetched: the interpreter exits")
        try:
            item = self._futures[0].result()
        finally:
            with self._lock:
                if self._futures and self._futures[0].done():
                    self._futures.popleft()
        if item is _END:
            return _END
        batch = self._engine.acquire(*item)
        self.queue()
        return batch

    def close(self) -> None:
        """End the thread, after its current read has ended or been cancelled; drop every batch."""
        if self._pid != os.getpid():
            return  # the thread is in the parent, and may have held the locks during the fork
        with self._lock:
            batches, self._batches = self._batches, None
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._cancel is not None:
            for thread in self._threads:
                self._cancel(thread.ident or 0)
        end_threads(self._threads, "a batch is read ahead")
        self._futures.clear()
        if isinstance(batches, Generator):
            # Closed now and not with the last reference, which a traceback may have.
            with contextlib.suppress(ValueError):  # it is running: a read hangs
                batches.close()


def prefetch(
    source: Callable[[], Iterable[Any]], engine: Any, depth: int, cancel: Callable[[int], None] | None = None
) -> Generator[Any, None, None]:
    """Yield the batches of ``source`` in order, up to ``depth`` of them prefetched by one thread.

    Nothing starts before the first batch is requested. An error of the source is raised at its place in the order. The
    thread and the batches ahead end with the iteration, in every case. Batches that were yielded are not referenced.

    Args:
        source: returns the batches; called in the caller's thread, where worker processes are started.
        engine: has ``bind()``, ``copy(batch)`` and ``acquire(*copied)``, as `SideStream` and `ReadAhead` have.
        depth: batches ahead.
        cancel: cancels the reads that a thread waits for, by its identity.
    """
    ahead = _Ahead(iter(source()), engine, depth, cancel)
    try:
        ahead.queue()
        yield from iter(ahead.take, _END)
    finally:
        ahead.close()
