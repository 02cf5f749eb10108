"""CUDA-stream prefetching, enabled by the computed memory of a batch."""

import dataclasses
import logging
import os
from typing import Any

import lightning as L
import torch

from cellmap_lightning.batches.memory import BatchMemory, device_memory
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError
from cellmap_lightning.loading.prefetch import PrefetchDecision, PrefetchSettings, decide
from cellmap_lightning.loading.resident_decision import ResidentRequest, resident_text

log = logging.getLogger(__name__)


def _from_environment(name: str, default: float) -> float:
    """Return a number in an environment variable, or the default."""
    text = os.environ.get(name)
    if not text:
        return default
    try:
        return float(text)
    except ValueError:
        raise CellMapValueError(f"the environment variable {name} must be a number, got {text!r}") from None


class StreamPrefetch(L.Callback):
    """Prefetches batches to the device on a CUDA side stream, where batches are large and device memory allows it.

    The decision is made per loader when it is built, from sizes alone (see `prefetch.decide`), so that it is the same
    on every rank. On a CPU or MPS device nothing is prefetched, unless ``enabled=True`` starts a thread that reads
    ahead. With it, ``cache=auto`` uses the memory of a CUDA device that holds the voxels of all crops, see
    `resident_decision.decide_resident`.

    Args:
        min_batch_mb: size of a finished batch, MiB, from which a side stream is used; by default the environment
            variable ``MIN_BATCH_MEMORY_FOR_STREAMS_MB``, else 100.
        max_streams: maximum number of side streams; by default the environment variable
            ``MAX_CONCURRENT_CUDA_STREAMS``, else 8. One is used: the copies of a batch share one copy engine.
        depth: batches ahead; ``"auto"`` for as many as fit, at most 2.
        memory_fraction: fraction of the device's total memory that the batches of a loader may use.
        enabled: ``"auto"``, True (for any batch size, on any device), or False.

    Attributes:
        decisions: the decision for each split whose loader was built; it is logged too. The settings are logged as
            hyperparameters.

    Raises:
        CellMapValueError: a setting is invalid.

    Example:
        >>> Trainer(callbacks=[StreamPrefetch(depth=2)])
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
            raise CellMapValueError(f"depth must be 'auto' or a whole number of at least 0, got {depth!r}")
        for name, value in (("min_batch_mb", min_batch_mb), ("max_streams", max_streams)):
            if value < 0:
                raise CellMapValueError(f"{name} must be at least 0, got {value!r}")
        if not 0 < memory_fraction <= 1:
            raise CellMapValueError(f"memory_fraction must be in (0, 1], got {memory_fraction!r}")
        self.settings = PrefetchSettings(min_batch_mb, max_streams, depth, memory_fraction, enabled)
        self.decisions: dict[str, PrefetchDecision] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Register the policy with the data module, which calls it for every loader that it builds.

        Raises:
            CellMapTypeError: ``enabled=True``, and the data module of the Trainer is not a `CellMapDataModule`.
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

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the settings as hyperparameters, once per training and after those of the module."""
        if not hasattr(getattr(trainer, "datamodule", None), "prefetch"):
            return
        # Decisions are not logged: they may differ between runs of one Trainer, and loggers refuse changed values.
        settings = {f"stream_prefetch/{name}": value for name, value in dataclasses.asdict(self.settings).items()}
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Unregister the policy: another Trainer may use the data module without this callback."""
        self._unregister(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Unregister the policy after an error, where ``teardown`` is not called."""
        self._unregister(trainer)

    def _unregister(self, trainer: L.Trainer) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if getattr(datamodule, "prefetch", None) == self._decide:  # not the policy of another callback
            datamodule.prefetch = None

    def _decide(
        self, split: str, memory: BatchMemory, device: torch.device, request: ResidentRequest | None = None
    ) -> PrefetchDecision:
        decision = decide(memory, device.type, device_memory(device), self.settings, request)
        if self.decisions.get(split) != decision:
            state = "off"
            if decision.enabled:
                state = f"on, {decision.depth} ahead {'on a stream' if decision.streams else 'in a thread'}"
            # What a CPU has no use for is no news, unless it was asked for.
            quiet = device.type == "cpu" and not decision.enabled and self.settings.enabled == "auto"
            log.log(
                logging.DEBUG if quiet else logging.INFO,
                "stream prefetch for %s: %s, %s",
                split,
                state,
                decision.reason,
            )
            if request is not None:
                unasked = quiet and not decision.resident.enabled and request.cache == "auto"
                log.log(logging.DEBUG if unasked else logging.INFO, "%s", resident_text(split, decision.resident))
        self.decisions[split] = decision
        return decision
