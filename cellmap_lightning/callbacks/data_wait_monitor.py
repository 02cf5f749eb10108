"""Say how long steps wait for their data, and what to change where that is long."""

import dataclasses
import logging
import os
import time
from typing import Any

import lightning as L

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.loading.prefetch import PrefetchDecision
from cellmap_lightning.loading.waiting import WaitTimes

log = logging.getLogger(__name__)

#: First steps, which decode, compile and allocate: nothing is judged by them.
WARM_UP = 3


class DataWaitMonitor(L.Callback):
    """Logs per training step the seconds that it waited for its batch and that copying and finishing it took.

    The metrics are ``data/wait_s`` and ``data/copy_s``, in the progress bar and the logger. Both are seconds of the
    thread that runs the steps. Where the device has work left while it waits, or a copy is only queued, the device
    loses less; the hint counts only waits at whose end it had nothing left to do.

    Args:
        hint_after: steps by which the hint is judged.
        hint_above: part of the time of the steps from which there is a hint, once per run.

    Raises:
        CellMapValueError: a number that cannot be one.
    """

    def __init__(self, hint_after: int = 20, hint_above: float = 0.25) -> None:
        if isinstance(hint_after, bool) or not isinstance(hint_after, int) or hint_after < 1:
            raise CellMapValueError(f"hint_after must be a whole number of at least 1, got {hint_after!r}")
        if not 0 < hint_above <= 1:
            raise CellMapValueError(f"hint_above must be in (0, 1], got {hint_above!r}")
        self.hint_after, self.hint_above = hint_after, hint_above
        #: The hint that was given.
        self.hint: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin."""
        self.hint = None
        self._steps, self._seconds, self._starved = -WARM_UP, 0.0, 0.0
        self._mark(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What happened since the last step belongs to no step."""
        self._mark(trainer)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """The batch has come."""
        waiting = _waiting(trainer)
        self._step = waiting - self._before if waiting is not None else None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step has ended."""
        step = self._step
        if step is None:
            return
        pl_module.log("data/wait_s", step.waited, prog_bar=True, batch_size=1)
        pl_module.log("data/copy_s", step.moved, prog_bar=True, batch_size=1)
        self._steps += 1
        if self._steps > 0:
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
        waiting = _waiting(trainer)
        self._before = dataclasses.replace(waiting) if waiting is not None else WaitTimes()
        self._since = time.perf_counter()


def _waiting(trainer: L.Trainer) -> WaitTimes | None:
    """What a `CellMapDataModule` counts; None for other data."""
    found = getattr(getattr(trainer, "datamodule", None), "waiting", None)
    return found if isinstance(found, WaitTimes) else None


def advice(trainer: L.Trainer) -> list[str]:
    """What could make the data come sooner, the most likely first."""
    data: Any = getattr(trainer, "datamodule", None)
    dataset = data.train_dataset
    decision: PrefetchDecision | None = getattr(trainer.train_dataloader, "decision", None)
    said = []
    if dataset.cache == "none":
        said.append("cache=auto keeps what was decoded, cache=none decodes it again for every patch")
    elif dataset.cache == "chunks":
        said.append("cache=auto keeps all that was decoded, cache=chunks decodes again what does not fit into memory")
    elif not dataset.is_cached:
        said.append("the cache is too small for these crops (cache_bytes, or CELLMAP_CACHE_DIR on a larger disk)")
    else:
        said.append("voxels are decoded when they are first read, so that later epochs wait less")
    if decision is None:
        said.append("the callback StreamPrefetch(enabled=True) reads ahead of the step")
    elif not decision.enabled:
        said.append(f"StreamPrefetch does not read ahead ({decision.reason})")
    else:
        said.append(f"a depth above {decision.depth} evens out batches that take long")
    cores = os.cpu_count() or 1
    if data.num_workers == 0 and cores > 2:
        said.append(f"num_workers=2 or more reads and turns patches in other processes ({cores} cores are here)")
    if dataset.max_workers < cores:
        said.append(f"max_workers={cores} instead of {dataset.max_workers} decodes in more threads")
    if any(crop.reader == "zarr" for crop in dataset.crops):
        said.append('reader=tensorstore decodes faster (pip install "cellmap-lightning[fast]")')
    return said
