"""A check that the loss and the weights of a training are finite."""

import logging
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.validation import int_at_least

log = logging.getLogger(__name__)

_ADVICE = (
    "targets are NaN where unannotated, so leave these voxels out before the loss is differentiated "
    "(training.masked.masked_bce, masked_dice); with a loss that does so, lower the learning rate, set "
    "gradient_clip_val, or in 16-true the optimizer's eps to 1e-4"
)


class LossMonitor(L.Callback):
    """Ends a training whose weights are NaN or infinite, and warns once about a loss that is.

    A loss that is NaN makes all weights NaN in its step, unless a gradient scaler leaves the step out; all that is
    computed and saved afterwards is useless. The flag of each step stays on the device and is read in the first step of
    an epoch, after every ``every_n_steps`` of them, at its end, and before any checkpoint is written. Ranks decide
    together. With manual optimization the loss is what ``training_step`` returns.

    Args:
        every_n_steps: number of steps after which the flags are read; reading waits for the device.

    Raises:
        CellMapValueError: the number is below 1; in a training, the weights are NaN or infinite after such a loss.

    Example:
        >>> Trainer(callbacks=[LossMonitor()])
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = int_at_least("every_n_steps", every_n_steps, 1)

        self._infinite: Tensor | None = None
        self._warned = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the steps of earlier trainings."""
        self._infinite, self._warned = None, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the loss is finite, and read it in some of the steps."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            infinite = ~torch.isfinite(loss.detach()).all()
            self._infinite = infinite if self._infinite is None else self._infinite | infinite
        if batch_idx == 0 or (batch_idx + 1) % self.every_n_steps == 0:
            self._check(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Read what the last steps noted."""
        self._check(trainer, pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Read what the last steps noted before a checkpoint of them is written, also in the middle of an epoch."""
        self._check(trainer, pl_module)

    def _check(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        infinite, self._infinite = self._infinite, None
        together = trainer.strategy.reduce_boolean_decision
        if not together(infinite is not None and bool(infinite), all=False):
            return
        names = [name for name, weight in pl_module.named_parameters() if not _is_finite(weight)]
        where = f"epoch {trainer.current_epoch}, optimizer step {trainer.global_step}"
        if together(bool(names), all=False):
            listed = f" ({names[0]} and {len(names) - 1} more)" if names else ""
            raise CellMapValueError(
                f"{where}: the loss of {type(pl_module).__name__} is NaN or infinite, and so are its weights"
                f"{listed}; {_ADVICE}"
            )
        if not self._warned:
            self._warned = True
            log.warning(
                "%s: the loss of %s is NaN or infinite, its weights are not; %s",
                where,
                type(pl_module).__name__,
                _ADVICE,
            )


def _is_finite(weight: nn.Parameter) -> bool:
    """Return True if every value of an initialized parameter is finite."""
    if isinstance(weight, nn.parameter.UninitializedParameter):
        return True
    return bool(torch.isfinite(weight.detach()).all())
