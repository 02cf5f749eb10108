"""Report of a training that ended at its time limit."""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Timer

from cellmap_lightning.commands.run_folder import overrides_of_run
from cellmap_lightning.wording import plural


def describe_time_limit(trainer: L.Trainer, folder: Path) -> str | None:
    """Return what a training did until its time limit, and how to continue it; None if no limit has ended it.

    Args:
        trainer: the Trainer, after ``fit``.
        folder: the run's folder.
    """
    over = any((left := c.time_remaining()) is not None and left <= 0 for c in _timers(trainer))
    if not over or not trainer.should_stop or _is_complete(trainer):
        return None
    return (
        f"training ended at the time limit, trainer.max_time, after {plural(trainer.global_step, 'step')} "
        f"({_epochs(trainer)}); to continue, repeat the command with {overrides_of_run(folder)} resume=auto and a "
        "larger trainer.max_time, which counts the time until now too"
    )


def _timers(trainer: L.Trainer) -> list[Timer]:
    return [c for c in trainer.callbacks if isinstance(c, Timer)]  # type: ignore[attr-defined]


def _is_complete(trainer: L.Trainer) -> bool:
    """Return True if a training has all of its epochs or steps; the limit may be reached in the last one."""
    last = trainer.max_epochs
    epochs = last is not None and last >= 0 and _finished_epochs(trainer) >= last
    return epochs or 0 <= trainer.max_steps <= trainer.global_step


def _finished_epochs(trainer: L.Trainer) -> int:
    """Return the number of epochs with all batches."""
    return trainer.fit_loop.epoch_progress.current.ready - (_batches(trainer) > 0)


def _batches(trainer: L.Trainer) -> int:
    """Return the number of batches of the epoch that the limit has ended; 0 if it has all."""
    # A checkpoint that is saved after a batch does not count it as completed yet.
    count = trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]
    return count if count < trainer.num_training_batches else 0


def _epochs(trainer: L.Trainer) -> str:
    last = trainer.max_epochs
    done = _finished_epochs(trainer)
    epochs = f"{done} of {plural(last, 'epoch')}" if last is not None and last >= 0 else plural(done, "epoch")
    batches = _batches(trainer)
    if not batches:
        return epochs
    total = trainer.num_training_batches
    of = f"{batches:,} of {total:,} batches" if total != float("inf") else plural(batches, "batch", "batches")
    return f"{epochs}, and {of} of the next"
