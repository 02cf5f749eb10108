"""Checkpoints to resume a run from, or to initialize its weights with."""

import io
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cellmap_lightning.checkpointing.checkpoint_config import START_KEY
from cellmap_lightning.checkpointing.data_match import Purpose, check_data, check_weights, data_record, recorded
from cellmap_lightning.checkpointing.unreadable import unreadable
from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapTypeError, CellMapValueError
from cellmap_lightning.io.missing_paths import similar_path
from cellmap_lightning.training.restorable import RestorableTask

log = logging.getLogger(__name__)

_HOOKS = (L.LightningModule.on_load_checkpoint, RestorableTask.on_load_checkpoint)


@dataclass(frozen=True, order=True)
class SavedCheckpoint:
    """A checkpoint from which training can resume, ordered by age: the newest one is the largest.

    ``docs/runs.md`` describes how a run is resumed.

    Attributes:
        start: number of the start of the run that saved it; see `CheckpointConfig`.
        step: finished optimizer steps.
        time: modification time of the file, ns, to compare checkpoints of one step.
        path: the file.
    """

    start: int
    step: int
    time: int
    path: Path


def saved_checkpoints(folder: Path) -> list[SavedCheckpoint]:
    """Return the checkpoints below a run's folder from which training can continue, the newest one last.

    A file that cannot be read, such as one whose job was killed while it was written, is skipped with a warning.
    """
    checkpoints = []
    for path in folder.rglob("*.ckpt"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # weights stay on disk
        except Exception as error:  # torch raises what its readers raise
            log.warning("%s cannot be read and is skipped (%s)", path, str(error).splitlines()[0])
            continue
        if isinstance(content, dict) and {"state_dict", "loops", "optimizer_states"} <= set(content):
            start, step = content.get(START_KEY, 0), content.get("global_step", 0)
            checkpoints.append(SavedCheckpoint(int(start), int(step), path.stat().st_mtime_ns, path))
        else:
            log.info("%s holds only weights, which are not enough to resume training", path)
    return sorted(checkpoints)


def check_hyperparameters(task: L.LightningModule) -> None:
    """Check that checkpoints of a module can be read again: that its hyperparameters are tensors and plain values.

    Raises:
        CellMapTypeError: ``save_hyperparameters`` of the module stores other objects, such as its network.
    """
    hparams: Any = task.hparams
    if not isinstance(hparams, dict):
        objects = {} if _is_readable(hparams) else {"hparams": hparams}
    else:
        objects = {name: value for name, value in hparams.items() if not _is_readable(value)}
    if objects:
        listed = ", ".join(f"{name} ({type(value).__name__})" for name, value in objects.items())
        raise CellMapTypeError(
            f"{type(task).__name__}: save_hyperparameters() stores {listed} in the checkpoints, which then cannot be "
            f"read without running code from them; use save_hyperparameters(ignore={list(objects)})"
        )


def _is_readable(value: Any) -> bool:
    """Return True for a value that a checkpoint can hold: one that `torch.load` reads with ``weights_only``."""
    if value is None or isinstance(value, bool | int | float | str):
        return True
    if isinstance(value, torch.nn.Module):  # it may be large
        return False
    buffer = io.BytesIO()
    try:
        torch.save(value, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception:  # torch raises what pickle and its readers raise
        return False
    return True


def check_checkpoint(path: Path, data: Any, task: Any, purpose: Purpose, setting: str) -> list[str]:
    """Compare a checkpoint with the data and the task of a command, before a Trainer starts.

    Args:
        path: the checkpoint; nothing but tensors and plain values is read from it.
        data: the data module.
        task: the module that gets the weights.
        purpose: what it is loaded for.
        setting: the setting that names it, for messages.

    Returns:
        The classes of its training; an empty list where it does not record them.

    Raises:
        CellMapFileNotFoundError: there is no such checkpoint.
        CellMapValueError: it cannot be read, or was trained with other data or another network; see `check_data`.
    """
    content, where = read_checkpoint(path, setting), f"{setting}={path}"
    saved = recorded(content)
    if saved is None:
        log.info("%s: the data of its training are not recorded, and not compared", where)
    elif isinstance(data, CellMapDataModule):
        for warning in check_data(saved, data_record(data), purpose, where, command=True):
            if purpose == "begin":  # otherwise the data module warns when its state is loaded
                log.warning("%s: %s", where, warning)
    if purpose != "begin" and type(task).on_load_checkpoint in _HOOKS:
        check_weights(content["state_dict"], task, where)  # a task with another hook may change the weights
    return list((saved or {}).get("classes") or [])


def read_checkpoint(path: Path, setting: str) -> dict[str, Any]:
    """Read a checkpoint of Lightning; nothing but tensors and plain values.

    Args:
        path: the checkpoint.
        setting: the setting that names it, for messages.

    Raises:
        CellMapFileNotFoundError: there is no such checkpoint.
        CellMapValueError: it cannot be read without running code from it, or is not a checkpoint.
    """
    check_exists(path, setting)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises what its readers raise
        with path.open("rb") as file:
            first = file.read(8)
        raise CellMapValueError(f"{setting}={path} {unreadable(first, e)}") from e
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise CellMapValueError(f"{setting}={path} is not a checkpoint of Lightning: it has no 'state_dict'")
    return checkpoint


def check_exists(path: Path, setting: str, hint: str = "") -> None:
    """Check that a checkpoint exists.

    Args:
        path: the checkpoint.
        setting: the setting that names it, for the message.
        hint: end of the message.

    Raises:
        CellMapFileNotFoundError: it does not; the message lists the checkpoints beside it.
    """
    if path.is_dir():
        inside = [*sorted(path.glob("*.ckpt")), *sorted(path.glob("checkpoints/*.ckpt"))]
        advice = f"did you mean {' or '.join(map(str, inside[:3]))}?" if inside else "it holds no checkpoints"
        raise CellMapFileNotFoundError(f"{setting}={path} is a folder; {advice}{hint}")
    if not path.is_file():
        # A run has its checkpoints one folder below, where a path of the run's folder misses them.
        beside = sorted(path.parent.glob("*.ckpt")) or sorted(path.parent.glob("checkpoints/*.ckpt"))
        below = [other for other in path.parent.glob("checkpoints/*.ckpt") if other.name == path.name]
        if below:
            raise CellMapFileNotFoundError(
                f"{setting}={path}: there is no such checkpoint; did you mean {below[0]}?{hint}"
            )
        others = ", ".join(map(str, beside)) or "none"
        raise CellMapFileNotFoundError(
            f"{setting}={path}: there is no such checkpoint{similar_path(path)}; checkpoints beside it: {others}{hint}"
        )
