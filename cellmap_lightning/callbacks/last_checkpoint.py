"""Checkpoint of the newest state, independent of the best one."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn


class LastCheckpoint(Checkpoint):
    """Saves the newest state as ``last.ckpt``: after each epoch, each validation, and the last step of a training.

    Lightning's ``save_last=True`` does so only together with a new best checkpoint.

    Args:
        dirpath: folder of ``last.ckpt``; by default the Trainer's ``default_root_dir``.

    Example:
        >>> Trainer(callbacks=[LastCheckpoint("runs/mito/checkpoints")])
    """

    def __init__(self, dirpath: str | None = None) -> None:
        self.dirpath = dirpath
        self._step = -1

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: object) -> None:
        """Save if ``max_steps``, ``max_time`` or a stop ends the training in the middle of an epoch."""
        if trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step:
            self._save_in_epoch(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after a validation in the middle of an epoch."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._save_in_epoch(trainer)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save after an epoch; the state of an epoch that ended early is saved before, while its position is known."""
        if self._at_end(trainer) or self._step != trainer.global_step:
            self.save(trainer)

    def _save_in_epoch(self, trainer: L.Trainer) -> None:
        if not self._at_end(trainer):
            self.save(trainer)

    @staticmethod
    def _at_end(trainer: L.Trainer) -> bool:
        """Return whether the last batch of the epoch has started."""
        # After the last batch, `on_train_epoch_end` saves instead, with the epoch counted as finished.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        return progress.is_last_batch or progress.current.ready >= trainer.num_training_batches

    def path(self, trainer: L.Trainer) -> Path:
        """Return the path of the checkpoint."""
        return Path(self.dirpath or trainer.default_root_dir) / "last.ckpt"

    def save(self, trainer: L.Trainer) -> None:
        """Save the state of a training, on all of its processes."""
        if not trainer.fast_dev_run:  # type: ignore[attr-defined]
            # Given explicitly: Lightning prints a line on its default with each checkpoint.
            trainer.save_checkpoint(self.path(trainer), weights_only=False)
            self._step = trainer.global_step
