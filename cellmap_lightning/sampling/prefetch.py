"""Batches ahead of the step: whether it pays, and the copy itself.

A `PrefetchDecision` follows from numbers alone: bytes of a batch, kind of device, its memory, settings. `prefetch`
carries it out: one thread reads the next batches and queues their copies on a stream of its own, while the step
computes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from cellmap_lightning.sampling.memory import BatchMemory

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
        enabled: ``"auto"``, or True (whatever the size), or False.
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
        streams: side streams.
        reason: why, with the numbers.
    """

    enabled: bool
    depth: int
    streams: int
    reason: str


def decide(
    memory: BatchMemory, device_type: str, device_bytes: int | None, settings: PrefetchSettings
) -> PrefetchDecision:
    """Whether to copy batches ahead on a side stream: a function of its arguments alone, the same on every rank.

    Args:
        memory: bytes of a batch.
        device_type: kind of device, such as ``cuda``.
        device_bytes: total memory of the device; None where it is not known.
        settings: see `PrefetchSettings`.

    Returns:
        The decision. Held on the device are ``depth`` queued batches, the one in use and the one whose memory is freed
        when its step has run, in the form in which they travel, and one finished.
    """

    def off(reason: str) -> PrefetchDecision:
        return PrefetchDecision(False, 0, 0, reason)

    if settings.enabled is False:
        return off("switched off")
    if device_type not in STREAM_DEVICES:
        return off(f"a {device_type} device has no copies to overlap")
    size = f"a finished batch is {memory.total_mb:.1f} MiB"
    if settings.enabled == "auto" and memory.total_mb < settings.min_batch_mb:
        return off(f"{size}, below the threshold of {settings.min_batch_mb:g} MiB")
    budget = int(settings.memory_fraction * device_bytes) if device_bytes else None
    queued = memory.compact.total_bytes
    depth = settings.max_depth if settings.depth == "auto" else int(settings.depth)
    room = f"{settings.memory_fraction:.0%} of the device"
    if budget is not None:
        room += f" is {budget / 2**20:.0f} MiB"
        fits = (budget - memory.total_bytes) // queued - 2
        if fits < 1:
            return off(f"{size}, and {room}: too little for one batch ahead")
        depth = min(depth, fits)
    if depth < 1:
        return off(f"depth is {depth}")
    why = "switched on" if settings.enabled is True else f"threshold {settings.min_batch_mb:g} MiB"
    streams = min(1, settings.max_streams)
    if streams < 1:
        return off("max_streams is 0")
    return PrefetchDecision(True, depth, streams, f"{size} ({why}), {queued / 2**20:.1f} MiB travel, {room}")


class SideStream:
    """Copies to a device on a stream of its own.

    `copy` runs in the copying thread, `acquire` in the thread that uses the batch.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.Stream(device)

    def bind(self) -> None:
        """Make the device current in the calling thread: a new thread would use device 0."""
        if self.device.index is not None:
            torch.accelerator.set_device_index(self.device.index)

    def copy(self, batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], torch.Event]:
        """Queue the copies; the event says when they are done."""
        moved = type(batch)()
        with self.stream:
            for name, tensor in batch.items():
                moved[name] = tensor.to(self.device, non_blocking=True)
        return moved, self.stream.record_event()

    def acquire(self, batch: dict[str, torch.Tensor], copied: torch.Event) -> dict[str, torch.Tensor]:
        """Let the current stream wait for the copies, and keep their memory until it has used them."""
        current = torch.accelerator.current_stream(self.device)
        current.wait_event(copied)
        for tensor in batch.values():
            # Freed by Python while the step's kernels still run, the block would return to the side stream at once.
            tensor.record_stream(current)
        return batch


def prefetch(source: Callable[[], Iterable[Any]], engine: Any, depth: int) -> Iterator[Any]:
    """Yield the batches of ``source`` in order, up to ``depth`` of them copied ahead by one thread.

    Nothing starts before the first batch is asked for. An error of the source is raised at its place in the order.
    However the iteration ends, the thread ends with it.

    Args:
        source: makes the batches, called in the caller's thread, where worker processes are started.
        engine: has ``bind()``, ``copy(batch)`` and ``acquire(*copied)``, as `SideStream` has.
        depth: batches ahead.
    """
    batches = iter(source())

    def step() -> Any:
        batch = next(batches, _END)
        return _END if batch is _END else engine.copy(batch)

    pool = ThreadPoolExecutor(1, "cellmap-copy", initializer=engine.bind)
    try:
        ahead: deque[Future[Any]] = deque(pool.submit(step) for _ in range(depth))
        while (item := ahead.popleft().result()) is not _END:
            ahead.append(pool.submit(step))
            yield engine.acquire(*item)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
