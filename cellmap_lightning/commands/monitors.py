"""Check of the metrics that checkpoints, early stopping and schedulers of a training depend on."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint

from cellmap_lightning.callbacks import LastCheckpoint
from cellmap_lightning.callbacks.data_wait_monitor import METRICS as WAIT_METRICS
from cellmap_lightning.commands.logging_code import logs_metrics, may_log, own_classes
from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.validation import did_you_mean, first_few

#: Names that Lightning's checkpoints know without a metric.
_ALWAYS = ("epoch", "step")
#: Metrics that a message lists.
_LISTED = 12
_HOW_TO_SKIP = (
    "trainer.num_sanity_val_steps=0 skips the validation before training, in which this was found; for metrics that "
    "are logged at times alone"
)
#: Texts in Lightning's errors for a metric that is not there.
_NOT_THERE = ("could not find the monitored key", "conditioned on metric")


class MonitorCheck(Callback):
    """Raises an error for a metric that is not logged, as early as that is certain.

    All that is logged is known of the tasks of this package, and of classes derived from them that log nothing
    themselves: their names are compared before the first step. Of any other module the sanity validation shows what is
    logged; a name that is not there is an error if neither the code of the module nor that of the callbacks may log it
    later. Else Lightning meets it at the end of an epoch, which is saved before the run ends.

    Args:
        monitor: the setting ``monitor``.
        callbacks: the callbacks of the configuration by their keys.

    Attributes:
        error: the error in place of Lightning's, if one of its errors was for such a name; else None.

    Example:
        >>> Trainer(callbacks=[checkpoint, MonitorCheck("val/dice", {"checkpoint": checkpoint})])
    """

    def __init__(self, monitor: str, callbacks: Mapping[str, Any]) -> None:
        self._monitor, self._callbacks = monitor, dict(callbacks)
        self.error: CellMapKeyError | None = None

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the names of a module of other code with those that the sanity validation has logged.

        Raises:
            CellMapKeyError: one is not logged, and will not be; the message has the closest name that is.
        """
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        if not trainer.callback_metrics or logged_names(pl_module, callbacks) is not None:
            return
        of_task: list[str] = getattr(pl_module, "metric_names", list)()
        known = [*trainer.callback_metrics, *of_task, *WAIT_METRICS, *_ALWAYS]
        wrong = [
            (where, name) for where, name in self._wrong(trainer, known) if not may_log(name, pl_module, callbacks)
        ]
        if wrong:
            measured = sorted({*trainer.callback_metrics, *of_task})
            raise _error(wrong, measured, pl_module, _HOW_TO_SKIP)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the names of a task of this package.

        Raises:
            CellMapKeyError: one is not logged; the message has the closest name that is.
        """
        known = logged_names(pl_module, trainer.callbacks)  # type: ignore[attr-defined]
        wrong = [] if known is None else self._wrong(trainer, known)
        if known is not None and wrong:
            raise _error(wrong, [name for name in known if name not in _ALWAYS], pl_module, "")

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the names after an epoch without validation."""
        self._check_without_validation(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the names after the last epoch without validation."""
        self._check_without_validation(trainer, pl_module)

    def _check_without_validation(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Raise the error for checkpoints of a metric that no epoch has logged; Lightning would save none of them."""
        if trainer.enable_validation or not trainer.callback_metrics:
            return
        saving = [key for key, callback in self._callbacks.items() if isinstance(callback, ModelCheckpoint)]
        places = {"monitor", *(f"callbacks.{key}.monitor" for key in saving)}
        wrong = [
            (where, name)
            for where, name in self._wrong(trainer, [*trainer.callback_metrics, *_ALWAYS])
            # Of a run that is not to validate `describe_best` logs that they are not saved.
            if where in places and not (of_validation(name) and trainer.limit_val_batches == 0)
        ]
        if wrong:
            raise _error(wrong, sorted(trainer.callback_metrics), pl_module, _how_to_continue(trainer))

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save the newest state where Lightning's error for a metric that is not there would lose an epoch."""
        if not any(text in str(exception) for text in _NOT_THERE):
            return
        metrics = trainer.callback_metrics
        wrong = self._wrong(trainer, [*metrics, *_ALWAYS])
        last = _last_checkpoint(trainer)
        if last is not None:
            last.save(trainer)
        if wrong:
            self.error = _error(wrong, sorted(metrics), pl_module, _how_to_continue(trainer))

    def _wrong(self, trainer: L.Trainer, known: Sequence[str]) -> list[tuple[str, str]]:
        """Return place and value of each setting that names none of the known metrics."""
        rates = any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        # The names of learning rates follow from the optimizers.
        return [
            (where, name)
            for where, name in self._monitors(trainer)
            if name not in known and not (rates and name.startswith("lr"))
        ]

    def _monitors(self, trainer: L.Trainer) -> Iterator[tuple[str, str]]:
        """Yield place and value of each setting that names a metric."""
        yield "monitor", self._monitor
        for key, callback in self._callbacks.items():
            name = getattr(callback, "monitor", None)
            if isinstance(name, str) and name != self._monitor:
                yield f"callbacks.{key}.monitor", name
        for config in trainer.lr_scheduler_configs:
            if config.reduce_on_plateau and isinstance(config.monitor, str):
                yield f"monitor of the scheduler {type(config.scheduler).__name__}", config.monitor


def of_validation(name: str) -> bool:
    """Return True if a metric is one of the validation by its name, such as ``val/dice``."""
    return name.startswith("val")


def describe_best(callbacks: Sequence[Any], validates: bool) -> Iterator[str]:
    """Yield a log line for each checkpoint of best weights: which value of its metric is best, or why there is none.

    Args:
        callbacks: the callbacks of the Trainer.
        validates: False if ``trainer.limit_val_batches`` is 0.
    """
    for callback in callbacks:
        if not isinstance(callback, ModelCheckpoint) or callback.monitor is None:
            continue
        if of_validation(callback.monitor) and not validates:
            yield (
                f"no {callback.filename}.ckpt: with trainer.limit_val_batches=0 {callback.monitor} is not measured; "
                "last.ckpt has the newest weights, and monitor=train/loss saves those of the lowest loss"
            )
        else:
            yield f"{callback.filename}.ckpt: the {best_of(callback)}; callbacks.checkpoint.mode changes it"


def best_of(checkpoint: ModelCheckpoint) -> str:
    """Return which value of its metric a checkpoint is best in, as ``lowest val/loss``."""
    return f"{'lowest' if checkpoint.mode == 'min' else 'highest'} {checkpoint.monitor}"


def _error(
    wrong: Sequence[tuple[str, str]], measured: Sequence[str], module: L.LightningModule, more: str
) -> CellMapKeyError:
    lines = [f"{where}={name} is not measured{did_you_mean(name, measured)}" for where, name in wrong]
    lines.append(f"{type(module).__name__} measures {first_few(measured, _LISTED)}")
    return CellMapKeyError("\n".join([*lines, *([more] if more else [])]))


def _last_checkpoint(trainer: L.Trainer) -> LastCheckpoint | None:
    return next((c for c in trainer.callbacks if isinstance(c, LastCheckpoint)), None)  # type: ignore[attr-defined]


def _how_to_continue(trainer: L.Trainer) -> str:
    last = _last_checkpoint(trainer)
    if last is None:
        return ""
    return f"{last.path(trainer)} has the state of this epoch; resume=auto and the right name continue from it"


def logged_names(task: L.LightningModule, callbacks: Sequence[Any]) -> list[str] | None:
    """Return the names of all metrics of a training; None where other code may log more.

    Args:
        task: the module.
        callbacks: the callbacks of the Trainer.
    """
    of_task: Callable[[], list[str]] | None = getattr(task, "metric_names", None)
    own = next((cls for cls in type(task).__mro__ if "metric_names" in vars(cls)), None)
    if of_task is None or own is None or not own.__module__.startswith("cellmap_lightning."):
        return None
    derived = type(task).__mro__[: type(task).__mro__.index(own)]
    others = [cls for callback in callbacks for cls in own_classes(type(callback))]
    if any(logs_metrics(cls) for cls in (*derived, *others)):
        return None
    names = of_task()
    if not names:
        return None
    return [*names, *WAIT_METRICS, *_ALWAYS]
