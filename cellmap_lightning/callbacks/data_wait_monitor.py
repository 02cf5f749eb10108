"""Monitoring of the time that training steps wait for data, with advice where it is long."""

import dataclasses
import logging
import os
import time
from typing import Any

import lightning as L

from cellmap_lightning.datasets.source import SampleSource
from cellmap_lightning.errors import CellMapValueError, install_command
from cellmap_lightning.loading.prefetch import PrefetchDecision
from cellmap_lightning.loading.waiting import WaitTimes
from cellmap_lightning.validation import int_at_least

log = logging.getLogger(__name__)

#: First steps, which decode, compile and allocate, and are not part of the statistics.
WARM_UP = 3
#: Names of the metrics: seconds of waiting, and of copying and finishing.
METRICS = ("data/wait_s", "data/copy_s")


class DataWaitMonitor(L.Callback):
    """Logs, per training step, the seconds of waiting for its batch and of copying and finishing it.

    The metrics are ``data/wait_s`` and ``data/copy_s``, in the logger. Both are seconds of the
    thread that runs the steps. The device loses less if it has queued work during a wait, or if a copy is asynchronous.
    The hint therefore counts only waits after which the device was idle.

    Args:
        hint_after: number of steps after which a hint may be logged, once per run.
        hint_above: fraction of the time of these steps, spent waiting, above which a hint is logged.

    Attributes:
        hint: the hint that was logged in this run, or None.

    Raises:
        CellMapValueError: a number is out of range.

    Example:
        >>> Trainer(callbacks=[DataWaitMonitor(hint_above=0.1)])
    """

    def __init__(self, hint_after: int = 20, hint_above: float = 0.25) -> None:
        if not 0 < hint_above <= 1:
            raise CellMapValueError(f"hint_above must be in (0, 1], got {hint_above!r}")
        self.hint_after, self.hint_above = int_at_least("hint_after", hint_after, 1), hint_above
        self.hint: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the statistics."""
        self.hint = None
        self._steps, self._seconds, self._starved = -WARM_UP, 0.0, 0.0
        self._mark(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Exclude the validation from the time of the next step."""
        self._mark(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Measure the wait for this batch."""
        waiting = _waiting(trainer)
        self._step = waiting - self._before if waiting is not None else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the wait of this step, and the hint once enough steps were measured."""
        step = self._step
        if step is None:
            return
        pl_module.log(METRICS[0], step.waited, batch_size=1)
        pl_module.log(METRICS[1], step.moved, batch_size=1)
        self._steps += 1
        if self._steps > 0:  # after the warm-up
            self._seconds += time.perf_counter() - self._since
            self._starved += step.starved
        if self._steps == self.hint_after and self._starved > self.hint_above * self._seconds:
            self.hint = (
                f"{self._starved / self._seconds:.0%} of a training step is waiting for data "
                f"({self._starved / self._steps:.3g} of {self._seconds / self._steps:.3g} s, mean of {self._steps} "
                f"steps): {'; '.join(advice(trainer))}"
            )
            log.warning("%s", self.hint)
        self._mark(trainer)

    def _mark(self, trainer: L.Trainer) -> None:
        """Store the counters and the time at the start of a step."""
        waiting = _waiting(trainer)
        # A copy: the data module continues to count in the same object.
        self._before = dataclasses.replace(waiting) if waiting is not None else WaitTimes()
        self._since = time.perf_counter()


def _waiting(trainer: L.Trainer) -> WaitTimes | None:
    """Return the counters of a `CellMapDataModule`; None for other data."""
    times = getattr(getattr(trainer, "datamodule", None), "waiting", None)
    return times if isinstance(times, WaitTimes) else None


def advice(trainer: L.Trainer) -> list[str]:
    """Return settings that could make loading faster, the most likely first."""
    data: Any = getattr(trainer, "datamodule", None)
    dataset = data.train_dataset
    decision: PrefetchDecision | None = getattr(trainer.train_dataloader, "decision", None)
    hints = [_cache_hint(dataset)]
    if decision is None:
        hints.append("the callback StreamPrefetch(enabled=True) reads ahead of the step")
    elif not decision.enabled:
        hints.append(f"StreamPrefetch does not read ahead ({decision.reason})")
    else:
        hints.append(f"a depth above {decision.depth} evens out batches that take long")
    cores = os.cpu_count() or 1
    if data.num_workers == 0 and cores > 2:
        hints.append(f"num_workers=2 or more reads and transforms patches in worker processes ({cores} cores)")
    if dataset.max_workers < cores:
        hints.append(f"max_workers={cores} instead of {dataset.max_workers} decodes in more threads")
    if any(crop.reader == "zarr" for crop in dataset.crops):
        hints.append(f"reader=tensorstore decodes faster ({install_command('fast')})")
    return hints


def _cache_hint(dataset: SampleSource) -> str:
    if dataset.cache == "none":
        return "cache=auto keeps what was decoded, cache=none decodes it again for every patch"
    if dataset.cache == "chunks":
        return "cache=auto keeps all that was decoded, cache=chunks decodes again what does not fit into memory"
    if not dataset.is_cached:
        return "the cache is too small for these crops (cache_bytes, or CELLMAP_CACHE_DIR on a larger disk)"
    return "voxels are decoded when they are first read, so that later epochs wait less"
