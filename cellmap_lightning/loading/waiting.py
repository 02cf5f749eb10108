"""Seconds that steps wait for their batches, and that bringing these to the device takes."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol


class Device(Protocol):
    """What is known of the device that waits.

    Attributes:
        held: seconds that the thread was held back because the device has enough to do.
    """

    held: float

    def idle(self) -> bool:
        """Whether the device had nothing left to do when the last batch came."""


@dataclass
class WaitTimes:
    """Sums, in seconds of the thread that runs the steps; whoever looks takes differences.

    Attributes:
        batches: batches that were delivered.
        waited: until the next batch was there.
        starved: of these, where the device had nothing left to do when it came. A CPU never has.
        moved: to copy batches to the device and to finish them, where it is this thread that does. Of copies that are
            only queued, as those of page-locked memory are, it is the queueing.
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
    """An iterator whose waiting is counted; it does not hold what it hands out.

    Args:
        batches: the batches.
        waiting: what is counted up.
        device: what waits.
    """

    def __init__(self, batches: Iterator[Any], waiting: WaitTimes, device: Device) -> None:
        self._batches, self._waiting, self._device = batches, waiting, device

    def __iter__(self) -> "TimedBatches":
        return self

    def __next__(self) -> Any:
        began, held = time.perf_counter(), self._device.held
        batch = next(self._batches)
        took = time.perf_counter() - began - (self._device.held - held)
        self._waiting.batches += 1
        self._waiting.waited += took
        if self._device.idle():
            self._waiting.starved += took
        return batch
