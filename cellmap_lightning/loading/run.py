"""Stage, device and ranks of a Trainer, for the loaders of a data module."""

from dataclasses import dataclass

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus


@dataclass(frozen=True)
class Run:
    """The run that the loaders of a data module are part of; a single process on the CPU without a Trainer.

    Args:
        trainer: the Trainer that runs, or ran last; None without one.

    Example:
        >>> Run(None).world, Run(None).is_running
        (1, False)
    """

    trainer: L.Trainer | None

    @property
    def is_running(self) -> bool:
        """True while the Trainer runs: only then do batches pass through its hooks."""
        return self.trainer is not None and self.trainer.state.status == TrainerStatus.RUNNING

    @property
    def is_fit(self) -> bool:
        """True if the Trainer's stage is ``fit``, with the validation inside of it."""
        return self.trainer is not None and self.trainer.state.fn == TrainerFn.FITTING

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.trainer.strategy.root_device if self.trainer is not None else torch.device("cpu")

    @property
    def world(self) -> int:
        """The number of processes."""
        return self.trainer.world_size if self.trainer is not None else 1

    @property
    def rank(self) -> int | None:
        """The number of this process; None without a Trainer."""
        return self.trainer.global_rank if self.trainer is not None else None

    @property
    def reports(self) -> bool:
        """True on the one rank that logs what is the same on all."""
        return self.trainer is None or self.trainer.is_global_zero
