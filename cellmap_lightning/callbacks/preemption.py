"""Checkpoint on preemption of a job by SIGTERM."""

from pathlib import Path

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

#: Name of the checkpoint, without its suffix.
PREEMPTED = "preempted"


class PreemptionCheckpoint(L.Callback):
    """Saves a checkpoint and ends the run after the step in which SIGTERM arrives.

    With several processes Lightning itself ends a run between two steps, on all of them. Under Slurm, Lightning
    answers the signal of ``#SBATCH --signal=SIGUSR1@90`` with its own checkpoint and requeues the job.

    Args:
        dirpath: folder of ``preempted.ckpt``; by default the Trainer's ``default_root_dir``.

    Attributes:
        saved: the checkpoint that was saved, or None.

    Example:
        >>> Trainer(callbacks=[PreemptionCheckpoint("runs/mito/checkpoints")])
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self.saved: Path | None = None

    # At the start of a batch and not at its end, so that all callbacks have processed the last step.

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """End before the next step; Lightning alone ends a single process after the epoch."""
        self._end(trainer)

    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """End before the next batch of a validation in a training."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._end(trainer)

    def _end(self, trainer: L.Trainer) -> None:
        if trainer.received_sigterm and trainer.world_size == 1:
            raise SIGTERMException

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Save if the signal ended a training; a sanity check or a validation alone has no new state."""
        training = trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking
        if isinstance(exception, SIGTERMException) and training:
            path = Path(self.dirpath or trainer.default_root_dir) / f"{PREEMPTED}.ckpt"
            trainer.save_checkpoint(path, weights_only=False)
            self.saved = path
