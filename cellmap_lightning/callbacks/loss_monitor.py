"""A check that the losses, the weights and the monitored metrics of a training are finite."""

import logging
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.validation import int_at_least

log = logging.getLogger(__name__)

_ADVICE = (
    "targets are NaN where unannotated, so leave these voxels out before the loss is differentiated "
    "(training.masked.masked_bce, masked_dice); with a loss that does so, lower the learning rate, set "
    "gradient_clip_val, or in 16-true the optimizer's eps to 1e-4"
)

_VALIDATION_ADVICE = (
    "targets are NaN where unannotated, and a class or a batch can be so throughout: leave these voxels out before "
    "values are averaged"
)
_SCORE_ADVICE = (
    "a score is NaN where no class occurs in the validated samples, and then ranks no weights; validate more of them, "
    "or choose another monitor"
)
#: The metric that is compared beside the monitored ones.
_LOSS = "val/loss"


class LossMonitor(L.Callback):
    """Ends a training whose weights or validation loss are NaN or infinite, and warns once about a loss that is.

    A loss that is NaN makes all weights NaN in its step, unless a gradient scaler leaves the step out; all that is
    computed and saved afterwards is useless. The flag of each step stays on the device, and reading it waits for the
    device: it is read after 1, 2, 4, 8, ... steps of an epoch, after every ``every_n_steps`` of them, at its end, and
    before any checkpoint is written. Ranks decide together. With manual optimization the loss is what ``training_step``
    returns.

    After a validation in a training, ``val/loss`` and the metrics that callbacks monitor (``best.ckpt``, early
    stopping) are compared. It is an error where both are NaN or infinite, and else a warning, once: a score is NaN
    where no class occurs in the validation.

    Args:
        every_n_steps: number of steps after which the flags are read; reading waits for the device.

    Raises:
        CellMapValueError: the number is below 1; in a training, the weights are NaN or infinite after such a loss, or
            ``val/loss`` is and a monitored metric too.

    Example:
        >>> Trainer(callbacks=[LossMonitor()])
    """

    def __init__(self, every_n_steps: int = 50) -> None:
        self.every_n_steps = int_at_least("every_n_steps", every_n_steps, 1)

        self._infinite: Tensor | None = None
        self._warned = self._warned_of_validation = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Forget the steps of earlier trainings."""
        self._infinite, self._warned, self._warned_of_validation = None, False, False

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note whether the loss is finite, and read it in some of the steps."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            infinite = ~torch.isfinite(loss.detach()).all()
            self._infinite = infinite if self._infinite is None else self._infinite | infinite
        steps = batch_idx + 1
        # Powers of two: a loss that diverges in the first steps is met soon, at few of them.
        if steps % self.every_n_steps == 0 or steps & (steps - 1) == 0:
            self._check(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the monitored metrics and ``val/loss``, before a checkpoint is ranked by them."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        monitors = {name for callback in callbacks if isinstance(name := getattr(callback, "monitor", None), str)}
        values = {name: float(trainer.callback_metrics.get(name, 0.0)) for name in sorted({*monitors, _LOSS})}
        wrong = [name for name, value in values.items() if not math.isfinite(value)]
        where = f"epoch {trainer.current_epoch}, optimizer step {trainer.global_step}"
        together = trainer.strategy.reduce_boolean_decision
        # A score alone is NaN where no class occurs in the validation, which is no fault of the network.
        if together(bool(monitors & {*wrong}) and _LOSS in wrong, all=False):
            name = next((name for name in wrong if name in monitors), "a monitored metric of another process")
            value = values.get(name, math.nan)
            raise CellMapValueError(
                f"{where}: {name}={value} in the validation, by which the best weights are chosen; "
                f"{_VALIDATION_ADVICE}, or choose another monitor"
            )
        if wrong and not self._warned_of_validation:
            self._warned_of_validation = True
            name = _LOSS if _LOSS in wrong else wrong[0]
            advice = _VALIDATION_ADVICE if name == _LOSS else _SCORE_ADVICE
            log.warning("%s: %s=%s in the validation; %s", where, name, values[name], advice)

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
