"""Lines about the epochs of a training, where no progress bar is shown."""

import logging
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch

log = logging.getLogger(__name__)

#: Characters of a line: 80 with the time and the level of ``hh:mm:ss INFO`` before it.
WIDTH = 66


class EpochLines(L.Callback):
    """A callback that logs a line at the end of each epoch, on the first process, unless a progress bar is shown.

    A line has the epoch, the step, the mean loss of the steps of the epoch, the monitored metric if it was measured in
    the epoch, and the time of the epoch with its validation.

    Args:
        monitor: name of the monitored metric.

    Example:
        >>> Trainer(callbacks=[EpochLines("val/dice")])  # doctest: +SKIP
        epoch 1/50 (step 1000): loss 0.512, val/dice 0.61, 93 s
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor
        self._began = 0.0
        self._total: torch.Tensor | None = None
        self._count = 0
        self._is_validated = False

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reset the time and the mean loss."""
        self._began = time.perf_counter()
        self._total, self._count, self._is_validated = None, 0, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of a step, which stays on its device: copying it would wait for the step."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor) and loss.numel() == 1:
            loss = loss.detach().reshape(()).double() if loss.device.type != "mps" else loss.detach().reshape(())
            self._total = loss if self._total is None else self._total + loss
            self._count += 1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record that the monitored metric is that of this epoch."""
        self._is_validated = True

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the line of the epoch."""
        bar = trainer.progress_bar_callback
        if not trainer.is_global_zero or (bar is not None and getattr(bar, "is_enabled", True)):
            return
        last = trainer.max_epochs
        epoch = f"{trainer.current_epoch + 1}{f'/{last}' if last is not None and last > 0 else ''}"
        loss = None if self._total is None else float(self._total) / self._count
        # A metric of an earlier epoch stays among the Trainer's.
        score = trainer.callback_metrics.get(self.monitor) if self._is_validated else None
        seconds = time.perf_counter() - self._began
        log.info("%s", epoch_line(epoch, trainer.global_step, loss, self.monitor, score, seconds))


def epoch_line(
    epoch: str, step: int, loss: float | None, monitor: str, score: float | torch.Tensor | None, seconds: float
) -> str:
    """Return the line of an epoch, of at most `WIDTH` characters: a longer name of the metric loses its start.

    Args:
        epoch: the epoch, such as ``3/50``.
        step: steps of the training so far.
        loss: mean loss of the epoch; None if the module returns none.
        monitor: name of the monitored metric.
        score: its value; None if it was not measured in this epoch.
        seconds: time of the epoch.

    Example:
        >>> epoch_line("3/50", 300, 0.5123, "val/dice", 0.6, 90)
        'epoch 3/50 (step 300): loss 0.512, val/dice 0.6, 90 s'
    """
    start = f"epoch {epoch} (step {step}): {'' if loss is None else f'loss {loss:.3g}, '}"
    end = f"{seconds:.0f} s"
    if score is None:
        return start + end
    end = f" {float(score):.3g}, {end}"
    room = max(WIDTH - len(start + end), 4)
    return start + (monitor if len(monitor) <= room else f"..{monitor[2 - room :]}") + end
