"""Which checkpoint a run goes on from, or begins with."""

import logging
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cellmap_lightning.checkpointing.checkpoint_config import START_KEY
from cellmap_lightning.checkpointing.data_match import Purpose, check_data, check_weights, data_record, recorded
from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.errors import CellMapFileNotFoundError, CellMapValueError
from cellmap_lightning.training.restorable import RestorableTask

log = logging.getLogger(__name__)

_HOOKS = (L.LightningModule.on_load_checkpoint, RestorableTask.on_load_checkpoint)


@dataclass(frozen=True, order=True)
class Saved:
    """A checkpoint from which training can continue; the newest one is the largest.

    Attributes:
        start: number of the start of the run that saved it; see `CheckpointConfig`.
        step: optimizer steps that were done.
        time: modification time of the file, ns; for those of one step.
        path: the file.
    """

    start: int
    step: int
    time: int
    path: Path


def saved_checkpoints(folder: Path) -> list[Saved]:
    """Return the checkpoints below a run's folder from which training can continue, the newest one last.

    A file that cannot be read, such as one whose job was killed while it was written, is left out, which is logged.
    """
    found = []
    for path in folder.rglob("*.ckpt"):
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)  # weights stay on disk
        except Exception as error:  # torch raises what its readers raise
            log.warning("%s cannot be read and is passed over (%s)", path, str(error).splitlines()[0])
            continue
        if isinstance(content, dict) and {"state_dict", "loops", "optimizer_states"} <= set(content):
            start, step = content.get(START_KEY, 0), content.get("global_step", 0)
            found.append(Saved(int(start), int(step), path.stat().st_mtime_ns, path))
        else:
            log.info("%s holds weights alone, which are not enough to resume training", path)
    return sorted(found)


def load_weights(module: torch.nn.Module, path: Path, prefix: str = "", anew: Collection[str] = ()) -> str:
    """Begin with the weights of a checkpoint, as far as they fit.

    Args:
        module: what gets them.
        path: the checkpoint; nothing but tensors and plain values is read from it.
        prefix: where the module stands in the checkpoint, such as ``network.``.
        anew: names of weights that are not loaded.

    Returns:
        In a few lines, what was loaded, and what begins anew and why.

    Raises:
        CellMapFileNotFoundError: there is no such checkpoint.
        CellMapValueError: it cannot be read, or nothing in it fits.
    """
    saved = _content(path).get("state_dict", {})
    there = {name.removeprefix(prefix): value for name, value in saved.items() if name.startswith(prefix)}
    own = module.state_dict()
    fits = {n: v for n, v in there.items() if n in own and v.shape == own[n].shape and n not in anew}
    if not fits:
        raise CellMapValueError(
            f"init_from={path}: none of its {len(there)} weights fits the {len(own)} of the model; their names begin "
            f"with {', '.join(list(there)[:3]) or 'nothing'}, those of the model with {', '.join(list(own)[:3])}"
        )
    lines = [f"{len(fits)} of the {len(own)} weights of the model are loaded"]
    for name, value in own.items():
        if name in anew:
            lines.append(f"  {name} begins anew, since its size is that of the classes")
        elif name not in there:
            lines.append(f"  {name} begins anew, since the checkpoint does not have it")
        elif name not in fits:
            lines.append(f"  {name} begins anew: {list(there[name].shape)} there, {list(value.shape)} here")
    unused = [name for name in there if name not in own]
    if unused:
        lines.append(f"  not used: {', '.join(unused)}")
    module.load_state_dict(fits, strict=False)
    return "\n".join(lines)


def check_checkpoint(path: Path, data: Any, task: Any, purpose: Purpose, setting: str) -> list[str]:
    """Compare a checkpoint with the data and the task of a command, before a Trainer starts.

    Args:
        path: the checkpoint; nothing but tensors and plain values is read from it.
        data: the data module.
        task: the module that gets the weights.
        purpose: why it is loaded.
        setting: the setting that names it, for messages.

    Returns:
        The classes that it was trained with; none where it does not record them.

    Raises:
        CellMapFileNotFoundError: there is no such checkpoint.
        CellMapValueError: it cannot be read, or was trained with other data or another network; see `check_data`.
    """
    content, where = _content(path, setting), f"{setting}={path}"
    saved = recorded(content)
    if saved is None:
        log.info("%s: the data that it was trained with are not recorded, and not compared", where)
    elif isinstance(data, CellMapDataModule):
        for warning in check_data(saved, data_record(data), purpose, where, command=True):
            if purpose == "begin":  # otherwise the data module warns when its state is loaded
                log.warning("%s: %s", where, warning)
    if purpose != "begin" and type(task).on_load_checkpoint in _HOOKS:
        check_weights(content["state_dict"], task, where)  # a task with another hook may change the weights
    return list((saved or {}).get("classes") or [])


def _content(path: Path, setting: str = "init_from") -> dict[str, Any]:
    if not path.is_file():
        there = ", ".join(map(str, sorted(path.parent.glob("*.ckpt")))) or "none"
        raise CellMapFileNotFoundError(
            f"{setting}={path}: there is no such checkpoint; name another with {setting}=...; "
            f"checkpoints beside it: {there}"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises what its readers raise
        raise CellMapValueError(f"{setting}={path} cannot be read: {str(e).splitlines()[0]}") from e
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CellMapValueError(f"{setting}={path} is no checkpoint of Lightning: it has no 'state_dict'")
    return content
