"""A run that has all of its epochs and its results, and is started again."""

import json
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from cellmap_lightning.commands.run_folder import overrides_of_run
from cellmap_lightning.commands.sweep_table import SCORES
from cellmap_lightning.wording import plural


def finished_text(cfg: DictConfig, checkpoint: Path | None, folder: Path) -> str | None:
    """Return the message for a finished run, with the way to continue it; None if the run is unfinished.

    Args:
        cfg: the configuration, with ``trainer.max_epochs`` and ``trainer.max_steps``.
        checkpoint: the newest of the run; None if it has none.
        folder: the run's folder. Its scores are written at the end; those of an earlier start are older than the
            checkpoint.
    """
    scores = folder / SCORES
    if checkpoint is None or cfg.trainer.get("fast_dev_run") or not scores.is_file():
        return None
    if scores.stat().st_mtime_ns < checkpoint.stat().st_mtime_ns:
        return None
    content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    progress = content["loops"]["fit_loop"]["epoch_progress"]["current"]
    for key, done, unit in (
        ("max_epochs", int(progress["processed"]), "epoch"),
        ("max_steps", int(content["global_step"]), "step"),
    ):
        wanted = cfg.trainer.get(key)
        if wanted is not None and 0 <= wanted <= done:
            return (
                f"already finished: {done} of {plural(wanted, unit)}; to continue, raise trainer.{key}, with "
                f"{overrides_of_run(folder)} resume=auto"
            )
    return None


def finished_value(folder: Path) -> float | None:
    """Return the monitored metric of a finished run; None where nothing was validated."""
    value = json.loads((folder / SCORES).read_text(encoding="utf-8"))["value"]
    return None if value is None else float(value)
