"""Check of the metrics that checkpoints, early stopping and schedulers of a training depend on."""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import CodeType, FunctionType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, LearningRateMonitor

from cellmap_lightning.callbacks.data_wait_monitor import METRICS as WAIT_METRICS
from cellmap_lightning.errors import CellMapKeyError
from cellmap_lightning.validation import did_you_mean, first_few

#: Names that Lightning's checkpoints know without a metric.
_ALWAYS = ("epoch", "step")
#: Names by which code logs a metric.
_LOGGING = {"log", "log_dict", "callback_metrics", "log_metrics"}
#: Metrics that a message lists.
_LISTED = 12


class MonitorCheck(Callback):
    """Raises an error for a metric that is not logged, before the first training step.

    What is logged is known of the tasks of this package, and of classes derived from them that log nothing themselves.
    Any other module may log a metric later, or under conditions: there nothing is checked.

    Args:
        monitor: the setting ``monitor``.
        callbacks: the callbacks of the configuration by their keys.

    Example:
        >>> Trainer(callbacks=[checkpoint, MonitorCheck("val/dice", {"checkpoint": checkpoint})])
    """

    def __init__(self, monitor: str, callbacks: Mapping[str, Any]) -> None:
        self._monitor, self._callbacks = monitor, dict(callbacks)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compare the names after the sanity validation.

        Raises:
            CellMapKeyError: one is not logged; the message has the closest name that is.
        """
        known = logged_names(pl_module, trainer.callbacks)  # type: ignore[attr-defined]
        if known is None:
            return
        rates = any(isinstance(callback, LearningRateMonitor) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        # The names of learning rates follow from the optimizers.
        wrong = [
            (where, name)
            for where, name in self._monitors(trainer)
            if name not in known and not (rates and name.startswith("lr"))
        ]
        if not wrong:
            return
        measured = [name for name in known if name not in _ALWAYS]
        lines = [f"{where}={name} is not measured{did_you_mean(name, measured)}" for where, name in wrong]
        listed = first_few(measured, _LISTED)
        raise CellMapKeyError("\n".join([*lines, f"{type(pl_module).__name__} measures {listed}"]))

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
    others = [cls for callback in callbacks for cls in type(callback).__mro__ if not _is_known(cls)]
    if any(_logs(cls) for cls in (*derived, *others)):
        return None
    names = of_task()
    if not names:
        return None
    return [*names, *WAIT_METRICS, *_ALWAYS]


def _is_known(cls: type) -> bool:
    return cls is object or cls.__module__.partition(".")[0] in ("cellmap_lightning", "lightning", "abc", "builtins")


def _logs(cls: type) -> bool:
    """Return True if the code of a class, without that of its bases, may log a metric."""
    members = [inspect.unwrap(getattr(member, "__func__", member)) for member in vars(cls).values()]
    return any(_names_logging(member.__code__) for member in members if isinstance(member, FunctionType))


def _names_logging(code: CodeType) -> bool:
    inner = [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    return bool(_LOGGING & set(code.co_names)) or any(map(_names_logging, inner))
