"""Batches ahead of the step: whether it pays, and the copy itself.

A `PrefetchDecision` follows from numbers alone: bytes of a batch, kind of device, its memory, settings. `prefetch`
carries it out: one thread reads the next batches and queues their copies on a stream of its own, while the step
computes.
"""

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from cellmap_lightning.batches.compact_batch import CompactBatch
from cellmap_lightning.batches.memory import BatchMemory
from cellmap_lightning.errors import CellMapError
from cellmap_lightning.runtime.thread_pool import end_threads

#: Kinds of device whose copies can overlap with compute.
STREAM_DEVICES = ("cuda", "xpu")
_END: Any = object()


@dataclass(frozen=True)
class PrefetchSettings:
    """What a user may choose.

    Attributes:
        min_batch_mb: finished MiB from which a stream is used.
        max_streams: side streams at most.
        depth: batches ahead, or ``"auto"``.
        memory_fraction: part of the device's memory that batches may take.
        enabled: ``"auto"``, or True (whatever the size and the device), or False.
        max_depth: what ``"auto"`` chooses at most.
    """

    min_batch_mb: float = 100.0
    max_streams: int = 8
    depth: int | str = "auto"
    memory_fraction: float = 0.2
    enabled: bool | str = "auto"
    max_depth: int = 2


@dataclass(frozen=True)
class PrefetchDecision:
    """Whether batches are copied ahead.

    Attributes:
        enabled: whether they are.
        depth: batches ahead.
        streams: side streams; 0 where a thread only reads ahead.
        reason: why, with the numbers.
    """

    enabled: bool
    depth: int
    streams: int
    reason: str


def decide(
    memory: BatchMemory, device_type: str, device_bytes: int | None, settings: PrefetchSettings
) -> PrefetchDecision:
    """Whether to have batches ahead of the step: a function of its arguments alone, the same on every rank.

    On CUDA and XPU devices they are copied on a side stream, from a size on. Elsewhere there is no copy to overlap;
    ``enabled=True`` has a thread read (and finish) them ahead, ``"auto"`` starts nothing.

    Args:
        memory: bytes of a batch.
        device_type: kind of device, such as ``cuda``.
        device_bytes: total memory of the device; None where it is not known.
        settings: see `PrefetchSettings`.

    Returns:
        The decision. Held in the device's memory are ``depth`` queued batches, the one in use and the one whose memory
        is freed when its step has run, in the form in which they are queued, and one finished. A queue for training
        stays full while the Trainer validates in the middle of an epoch: validation has a budget of its own.
    """

    def off(reason: str) -> PrefetchDecision:
        return PrefetchDecision(False, 0, 0, reason)

    copies = device_type in STREAM_DEVICES
    size = f"a finished batch is {memory.total_mb:.1f} MiB"
    if settings.enabled is False:
        return off("switched off")
    if settings.enabled == "auto" and not copies:
        return off(f"a {device_type} device has no copies to overlap; enabled=True reads ahead all the same")
    if settings.enabled == "auto" and memory.total_mb < settings.min_batch_mb:
        return off(f"{size}, below the threshold of {settings.min_batch_mb:g} MiB")
    if copies and settings.max_streams < 1:
        return off("max_streams is 0")
    depth = settings.max_depth if settings.depth == "auto" else int(settings.depth)
    if depth < 1:
        return off(f"depth is {depth}")
    # Without a stream batches are finished before they are queued.
    queued = memory.compact.total_bytes if copies else memory.total_bytes
    room = f"{settings.memory_fraction:.0%} of the {'device' if copies else 'memory'}"
    if device_bytes:
        budget = int(settings.memory_fraction * device_bytes)
        room += f" is {budget / 2**20:.0f} MiB"
        fits = (budget - memory.total_bytes) // queued - 2
        if fits < 1:
            return off(f"{size}, and {room}: too little for one batch ahead")
        depth = min(depth, fits)
    why = "switched on" if settings.enabled is True else f"threshold {settings.min_batch_mb:g} MiB"
    what = f"{queued / 2**20:.1f} MiB travel" if copies else "a thread reads, nothing is copied"
    return PrefetchDecision(True, depth, int(copies), f"{size} ({why}), {what}, {room}")


class ReadAhead:
    """What `prefetch` does with each batch where nothing is copied to a device.

    Args:
        prepare: called with each batch in the thread that reads ahead.
    """

    held = 0.0

    def __init__(self, prepare: Callable[[Any], Any] | None = None) -> None:
        self.prepare = prepare

    def bind(self) -> None:
        """Nothing belongs to the thread."""

    def copy(self, batch: Any) -> tuple[Any]:
        """The batch, prepared."""
        return (self.prepare(batch) if self.prepare else batch,)

    def acquire(self, batch: Any) -> Any:
        """The batch."""
        return batch

    def idle(self) -> bool:
        """Whoever waits here computes nothing."""
        return True


class SideStream:
    """What `prefetch` does with each batch for a device: copies it on a stream of its own.

    `copy` runs in the copying thread, `acquire` in the thread that uses the batch.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device)
        #: Seconds that the host was held back, so that it does not run ahead of the device.
        self.held = 0.0
        self._idle = False
        self._before: torch.Event | None = None

    def bind(self) -> None:
        """Make the device current in the calling thread: a new thread would use device 0."""
        if self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)

    def copy(self, batch: Any) -> tuple[Any, torch.Event]:
        """Queue the copies of a `CompactBatch`, or of the tensors in any collection.

        Returns:
            The batch on the device, and the event that the copies are done.
        """
        with self.stream:
            if isinstance(batch, CompactBatch):
                moved: Any = batch.to(self.device)
            else:
                moved = apply_to_collection(batch, torch.Tensor, torch.Tensor.to, self.device, non_blocking=True)
        return moved, self.stream.record_event()

    def acquire(self, batch: Any, copied: torch.Event) -> Any:
        """Let the current stream wait for the copies, and keep their memory until it has used them."""
        current = torch.accelerator.current_stream(self.device)
        self._idle = current.query()
        # A host that queues step after step would have a batch in memory for each of them: when it queues a step, the
        # one before may still run, and those before that have ended.
        queued, self._before = self._before, current.record_event()
        if queued is not None:
            began = time.perf_counter()
            queued.synchronize()
            self.held += time.perf_counter() - began
        current.wait_event(copied)
        # Freed by Python while the step's kernels still run, a block would return to the side stream at once.
        if isinstance(batch, CompactBatch):
            for tensor in batch.tensors.values():
                tensor.record_stream(current)
        else:
            apply_to_collection(batch, torch.Tensor, torch.Tensor.record_stream, current)
        return batch

    def idle(self) -> bool:
        """Whether the device had nothing left to do when the last batch was acquired."""
        return self._idle


class NothingAhead:
    """What is known of a device where `prefetch` is not used.

    Args:
        device: where the batches are used.
    """

    held = 0.0

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def idle(self) -> bool:
        """Whether the device has nothing left to do; a CPU that asks has not."""
        return self.device.type not in STREAM_DEVICES or bool(torch.accelerator.current_stream(self.device).query())


def _begin(threads: list[threading.Thread], engine: Any) -> None:
    """In the new thread, which holds it as long as it lives: an `_Ahead` that is lost, and so its thread, must end."""
    threads.append(threading.current_thread())
    engine.bind()


class _Ahead:
    """The batches ahead, and the thread that gets them.

    The thread has one task at a time, the next batch: an interpreter that exits runs what is queued, and that should
    not be ``depth`` batches. The task that ends queues the next one, if there is room; else whoever takes a batch does.
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
        """Have the next batch got, if there is room for it and the last one is there."""
        with self._lock:
            if self._batches is None or len(self._futures) >= self._depth:
                return
            last = self._futures[-1] if self._futures else done  # which may have been taken
            if last is not None and (not last.done() or last.exception() is not None or last.result() is _END):
                return
            try:
                future = self._pool.submit(self._step)
            except RuntimeError:  # the interpreter exits
                return
            self._futures.append(future)
        future.add_done_callback(self.queue)

    def take(self) -> Any:
        """The next batch, or `_END`; an error of the source at its place. Nothing here holds it afterwards.

        Raises:
            CellMapError: there will be none, since the thread is not in this process or the interpreter exits.
        """
        if self._pid != os.getpid():
            raise CellMapError("a pass with batches ahead cannot go on in a forked process; begin one there")
        if not self._futures:
            raise CellMapError("no batch can be read ahead any more: the interpreter exits")
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
        """End the thread, after what it is reading now has ended or been cancelled; drop every batch."""
        if self._pid != os.getpid():  # the thread is not here, and may have held the locks when the process was forked
            return
        with self._lock:
            batches, self._batches = self._batches, None
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._cancel is not None:
            for thread in self._threads:
                self._cancel(thread.ident or 0)
        end_threads(self._threads, "a batch is read ahead")
        self._futures.clear()
        if isinstance(batches, Generator):
            # What it holds ends now and not with the last reference, which a traceback may have.
            with contextlib.suppress(ValueError):  # a read hangs in it
                batches.close()


def prefetch(
    source: Callable[[], Iterable[Any]], engine: Any, depth: int, cancel: Callable[[int], None] | None = None
) -> Generator[Any, None, None]:
    """Yield the batches of ``source`` in order, up to ``depth`` of them got ahead by one thread.

    Nothing starts before the first batch is asked for. An error of the source is raised at its place in the order.
    However the iteration ends, the thread and the batches ahead end with it. A batch that was yielded is held by nobody
    but its user.

    Args:
        source: makes the batches, called in the caller's thread, where worker processes are started.
        engine: has ``bind()``, ``copy(batch)`` and ``acquire(*copied)``, as `SideStream` and `ReadAhead` have.
        depth: batches ahead.
        cancel: given the identity of the thread, cancels the reads that it waits for.
    """
    ahead = _Ahead(iter(source()), engine, depth, cancel)
    try:
        ahead.queue()
        yield from iter(ahead.take, _END)
    finally:
        ahead.close()
