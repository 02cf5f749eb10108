"""Tasks that can be loaded from checkpoints of ``cellmap-train`` without arguments."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Self

import fsspec
import lightning as L
import torch
from hydra.utils import instantiate
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod

from cellmap_lightning.checkpointing.data_match import check_data, check_weights, data_record, loading, recorded
from cellmap_lightning.checkpointing.trust import check_trusted
from cellmap_lightning.checkpointing.unreadable import unreadable
from cellmap_lightning.datamodule import CellMapDataModule
from cellmap_lightning.errors import CellMapTypeError, CellMapValueError


class RestorableTask(L.LightningModule):
    """A LightningModule whose arguments are stored in the checkpoints of ``cellmap-train``.

    Example:
        >>> class MyTask(RestorableTask): ...
        >>> task = MyTask.load_from_checkpoint("runs/mito/checkpoints/best.ckpt")
    """

    @_restricted_classmethod  # a call on an instance would not change it
    def load_from_checkpoint(
        cls,  # noqa: N805
        checkpoint_path: str | Path | IO[Any],
        map_location: Any = None,
        hparams_file: str | Path | None = None,
        strict: bool | None = None,
        weights_only: bool | None = None,
        *,
        trust: Sequence[str] = (),
        trust_checkpoint: bool = False,
        **kwargs: Any,
    ) -> Self:
        """Load a task with its weights; omitted arguments are those of the training.

        They are read from the configuration that ``cellmap-train`` writes into a checkpoint, if an argument without a
        default is omitted. Only trusted classes are created from it.

        Args:
            checkpoint_path: a path, an address or an open file.
            map_location: the device of the weights, see `torch.load`.
            hparams_file: see Lightning.
            strict: whether all weights must be there, see Lightning.
            weights_only: read tensors and plain values alone; False unpickles any object, which can run code.
            trust: further modules or classes that the configuration may name, such as ``["my_package.models"]``.
            trust_checkpoint: allow everything in the configuration; only for a checkpoint whose author you trust.
            **kwargs: arguments of the task, which replace those of the training.

        Raises:
            CellMapTypeError: the checkpoint has no configuration of such a task, and an argument is missing.
            CellMapValueError: the configuration names classes that are not trusted, or the weights do not fit.
        """
        missing = [name for name in _required(cls) if name not in kwargs]
        if missing and hparams_file is None:
            checkpoint = _read(checkpoint_path, weights_only)
            if not set(missing) <= set(checkpoint.get(cls.CHECKPOINT_HYPER_PARAMS_KEY) or {}):
                where = str(getattr(checkpoint_path, "name", checkpoint_path))
                arguments = _arguments(checkpoint, cls, missing, where)
                used = {name: value for name, value in arguments.items() if name not in kwargs}
                check_trusted({"task": used}, where, trust, trust_checkpoint)
                kwargs = instantiate(used, _convert_="all") | kwargs
        return super().load_from_checkpoint(
            checkpoint_path, map_location, hparams_file, strict, weights_only, **kwargs
        )  # fmt: skip

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare the checkpoint with the data and the network, before its weights are loaded.

        Raises:
            CellMapValueError: it was trained with other data or another network; see `check_data` and `check_weights`.
        """
        purpose, where = loading(self._trainer)
        data = getattr(self._trainer, "datamodule", None)
        saved = recorded(checkpoint)
        if saved is not None and isinstance(data, CellMapDataModule):
            check_data(saved, data_record(data), purpose, where)
        check_weights(checkpoint.get("state_dict", {}), self, where)


def _required(cls: type) -> list[str]:
    """Return the arguments without a default, those of the base classes too where ``**kwargs`` passes them on."""
    names: dict[str, bool] = {}  # whether an argument is required; that of the subclass counts
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        parameters = [*inspect.signature(base).parameters.values()]
        for parameter in parameters:
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                names.setdefault(parameter.name, parameter.default is parameter.empty)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return [name for name, required in names.items() if required]


def _read(source: Any, weights_only: bool | None) -> dict[str, Any]:
    """Read a checkpoint from a path, an address or an open file.

    Raises:
        CellMapValueError: it is not a checkpoint, or holds objects that ``weights_only`` does not allow.
    """
    try:
        if hasattr(source, "read"):
            checkpoint = torch.load(source, map_location="cpu", weights_only=weights_only is not False)
            source.seek(0)
        else:
            with fsspec.open(str(source), "rb") as file:
                checkpoint = torch.load(file, map_location="cpu", weights_only=weights_only is not False)
    except FileNotFoundError:
        raise
    except Exception as e:  # torch raises what its readers raise
        raise CellMapValueError(f"{source} {unreadable(_first_bytes(source), e)}") from e
    if not isinstance(checkpoint, dict):
        raise CellMapValueError(f"{source} is not a checkpoint of Lightning")
    return checkpoint


def _first_bytes(source: Any) -> bytes:
    """Return the first bytes of a file or of an open file."""
    if hasattr(source, "read"):
        source.seek(0)
        return bytes(source.read(8))
    with fsspec.open(str(source), "rb") as file:
        return bytes(file.read(8))


def _arguments(checkpoint: dict[str, Any], cls: type, missing: Sequence[str], where: str) -> dict[str, Any]:
    """Return the arguments of a task in the configuration of a checkpoint."""
    from cellmap_lightning.checkpointing.checkpoint_config import CONFIG_KEY

    config = checkpoint.get(CONFIG_KEY)
    task = config.get("task") if isinstance(config, dict) else None
    if not isinstance(task, dict):
        raise CellMapTypeError(
            f"{where} has no configuration of a task ({CONFIG_KEY!r}), as checkpoints of cellmap-train have; give "
            + ", ".join(f"{name}=..." for name in missing)
        )
    name = str(task.get("_target_")).rpartition(".")[2]
    if name not in [base.__name__ for base in cls.__mro__]:
        raise CellMapTypeError(f"{where} was saved by {task.get('_target_')}; load it with {name}.load_from_checkpoint")
    return {key: value for key, value in task.items() if not key.startswith("_")}
