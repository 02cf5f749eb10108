"""Timing of the waits for batches, and of their transfer to the device."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class Device(Protocol):
    """The load of the device that batches are read for; see docs/streams.md.

    Attributes:
        held: seconds that the host was throttled because enough work is queued on the device.
    """

    held: float

    def idle(self) -> bool:
        """Return True if the device had no queued work when the last batch was acquired."""


@dataclass
class WaitTimes:
    """Cumulative seconds of the thread that runs the steps; subtract two snapshots for an interval.

    See docs/streams.md.

    Attributes:
        batches: batches that were delivered.
        waited: seconds until the next batch was available.
        starved: the part of ``waited`` during which the device was idle. A CPU is always idle while waiting.
        moved: seconds to copy batches to the device and to finish them in this thread. Of asynchronous copies, as from
            page-locked memory, only the queueing counts.
    """

    batches: int = 0
    waited: float = 0.0
    starved: float = 0.0
    moved: float = 0.0

    def __sub__(self, before: "WaitTimes") -> "WaitTimes":
        return WaitTimes(
            self.batches - before.batches,
            self.waited - before.waited,
            self.starved - before.starved,
            self.moved - before.moved,
        )


class TimedBatches:
    """An iterator whose waits are timed; it references no batch that it has returned. See docs/streams.md.

    Args:
        batches: the batches.
        waiting: the counters to increase.
        device: the device that uses the batches.
    """

    def __init__(self, batches: Iterator[Any], waiting: WaitTimes, device: Device) -> None:
        self._batches, self._waiting, self._device = batches, waiting, device

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> Any:
        began, held = time.perf_counter(), self._device.held
        batch = next(self._batches)
        # Throttling is no waiting for data.
        took = time.perf_counter() - began - (self._device.held - held)
        self._waiting.batches += 1
        self._waiting.waited += took
        if self._device.idle():
            self._waiting.starved += took
        return batch
