"""Choose CUDA-stream prefetching from the computed memory of a batch."""

import dataclasses
import logging
import os
from typing import Any

import lightning as L
import torch

from cellmap_lightning.batches.memory import BatchMemory, device_memory
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.loading.prefetch import PrefetchDecision, PrefetchSettings, decide

log = logging.getLogger(__name__)


def _from_environment(name: str, default: float) -> float:
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise CellMapValueError(f"the environment's {name} must be a number, got {text!r}") from None


class StreamPrefetch(L.Callback):
    """Copies batches to the device ahead of the step, where that pays and fits.

    Each loader is judged when it is built, from numbers alone (see `prefetch.decide`), so that every rank decides the
    same. On a CPU or MPS device nothing is started, unless ``enabled=True`` asks for a thread that reads ahead.

    Args:
        min_batch_mb: MiB of a finished batch from which a side stream is used; by default the environment's
            ``MIN_BATCH_MEMORY_FOR_STREAMS_MB``, else 100.
        max_streams: side streams at most; by default the environment's ``MAX_CONCURRENT_CUDA_STREAMS``, else 8. One is
            used: the copies of a batch share one copy engine.
        depth: batches ahead; ``"auto"`` for as many as fit, at most 2.
        memory_fraction: part of the device's total memory that the batches of a loader may take.
        enabled: ``"auto"``, True (whatever the size of a batch, on any device), or False.

    Attributes:
        decisions: the decision for each split whose loader was built, also a line of the log. The settings are logged
            as hyperparameters.

    Raises:
        CellMapValueError: a setting that cannot be one.
    """

    def __init__(
        self,
        min_batch_mb: float | None = None,
        max_streams: int | None = None,
        depth: int | str = "auto",
        memory_fraction: float = 0.2,
        enabled: bool | str = "auto",
    ) -> None:
        if min_batch_mb is None:
            min_batch_mb = _from_environment("MIN_BATCH_MEMORY_FOR_STREAMS_MB", 100.0)
        if max_streams is None:
            max_streams = int(_from_environment("MAX_CONCURRENT_CUDA_STREAMS", 8))
        if enabled not in ("auto", True, False):
            raise CellMapValueError(f"enabled must be 'auto', true or false, got {enabled!r}")
        if depth != "auto" and (not isinstance(depth, int) or depth < 0):
            raise CellMapValueError(f"depth must be 'auto' or a whole number of batches, got {depth!r}")
        if min_batch_mb < 0 or max_streams < 0 or not 0 < memory_fraction <= 1:
            raise CellMapValueError(
                "min_batch_mb and max_streams cannot be negative and memory_fraction must be in (0, 1], got "
                f"{min_batch_mb}, {max_streams} and {memory_fraction}"
            )
        self.settings = PrefetchSettings(min_batch_mb, max_streams, depth, memory_fraction, enabled)
        self.decisions: dict[str, PrefetchDecision] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Hand the policy to the datamodule, which asks it whenever it builds a loader.

        Raises:
            CellMapTypeError: the Trainer runs without a datamodule that can be asked.
        """
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not hasattr(datamodule, "prefetch"):
            if self.settings.enabled is True:
                raise CellMapTypeError(
                    "StreamPrefetch(enabled=True) needs a CellMapDataModule as the Trainer's datamodule"
                )
            log.info("stream prefetch: off, since the Trainer's data is not a CellMapDataModule")
            return
        datamodule.prefetch = self._decide
        # Not the decisions: they may differ between two runs of one Trainer, and loggers refuse values that change.
        settings = {f"stream_prefetch/{name}": value for name, value in dataclasses.asdict(self.settings).items()}
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the policy back: another Trainer may run the datamodule without this callback."""
        self._forget(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same where a run ends early, and ``teardown`` is not called."""
        self._forget(trainer)

    def _forget(self, trainer: L.Trainer) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if getattr(datamodule, "prefetch", None) == self._decide:
            datamodule.prefetch = None

    def _decide(self, split: str, memory: BatchMemory, device: torch.device) -> PrefetchDecision:
        decision = decide(memory, device.type, device_memory(device), self.settings)
        if self.decisions.get(split) != decision:
            how = f"{decision.depth} ahead " + ("on a stream" if decision.streams else "in a thread")
            log.info(
                "stream prefetch for %s: %s, %s", split, f"on, {how}" if decision.enabled else "off", decision.reason
            )
        self.decisions[split] = decision
        return decision
