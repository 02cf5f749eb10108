"""A warning about weights that are NaN, for a Trainer without `LossMonitor`."""

import logging
from typing import Any

import torch
from torch.nn.parameter import UninitializedParameter

log = logging.getLogger(__name__)

_ADVICE = (
    "targets are NaN where unannotated, so leave these voxels out before the loss is differentiated "
    "(training.masked.masked_bce, masked_dice); Trainer(callbacks=[LossMonitor()]) of cellmap_lightning.callbacks ends "
    "such a training in its first steps"
)


class WeightCheck:
    """A check of the weights once per training epoch, with one warning.

    A loss that is NaN makes the weights NaN in its step, and the training would go on without any sign of it.
    """

    def __init__(self) -> None:
        self._epoch: int | None = None
        self._warned = False

    def at_batch(self, trainer: Any) -> None:
        """Check the weights before the first batch of a training epoch after the first one.

        Args:
            trainer: the Trainer that gets the batch.
        """
        if not trainer.training or trainer.current_epoch == self._epoch:
            return
        begun, self._epoch = self._epoch is not None, trainer.current_epoch
        if begun:
            self._check(trainer)

    def at_end(self, trainer: Any) -> None:
        """Check the weights after the last epoch, and forget the training."""
        self._check(trainer)
        self._epoch, self._warned = None, False

    def _check(self, trainer: Any) -> None:
        if self._warned or any(map(_is_loss_monitor, trainer.callbacks)):
            return
        module = trainer.lightning_module
        wrong = [name for name, weight in module.named_parameters() if not _is_finite(weight)]
        if wrong:
            self._warned = True
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            log.warning(
                "epoch %d, optimizer step %d: the weights of %s are NaN or infinite (%s%s); %s",
                trainer.current_epoch, trainer.global_step, type(module).__name__, wrong[0], more, _ADVICE,
            )  # fmt: skip


def _is_loss_monitor(callback: Any) -> bool:
    """Return True for `LossMonitor` and classes derived from it; callbacks are above this package, so by name."""
    return any(cls.__name__ == "LossMonitor" for cls in type(callback).__mro__)


def _is_finite(weight: torch.nn.Parameter) -> bool:
    return isinstance(weight, UninitializedParameter) or bool(torch.isfinite(weight.detach()).all())
