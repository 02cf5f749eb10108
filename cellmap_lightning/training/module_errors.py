"""Short errors of the tensors of an own module, with the place in its code and the shapes of the batch."""

import os
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.memory import is_oom_error
from torch import Tensor

from cellmap_lightning.errors import CellMapError, CellMapValueError

#: Errors by which torch refuses tensors. Others, such as AttributeError, are mistakes in code, whose traceback helps.
_REFUSALS = (RuntimeError, ValueError, IndexError, AssertionError)


class BatchShapes(L.Callback):
    """A record of the shapes of the newest batch, for `short_errors`.

    Attributes:
        shapes: ``{name: shape}`` of its arrays.

    Example:
        >>> Trainer(callbacks=[BatchShapes()])
    """

    def __init__(self) -> None:
        self.shapes: dict[str, list[int]] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the shapes of a batch."""
        self._note(batch)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the shapes of a batch."""
        self._note(batch)

    def _note(self, batch: Any) -> None:
        items = batch.items() if isinstance(batch, Mapping) else ()
        self.shapes = {str(name): list(value.shape) for name, value in items if isinstance(value, Tensor)}


@contextmanager
def short_errors(task: L.LightningModule, trainer: Any, data: Any) -> Iterator[None]:
    """Raise errors of tensors in a module's own code as one sentence; with HYDRA_FULL_ERROR=1 as they are.

    Args:
        task: the module.
        trainer: its Trainer, whose callbacks have a `BatchShapes`.
        data: the data module.

    Raises:
        CellMapValueError: torch refuses tensors in a line that is not of a library.
    """
    try:
        yield
    except _REFUSALS as error:
        place = None if os.environ.get("HYDRA_FULL_ERROR") == "1" else _place(error, task)
        if place is None or isinstance(error, CellMapError) or is_oom_error(error):
            raise
        shapes = next((c.shapes for c in trainer.callbacks if isinstance(c, BatchShapes)), {})
        listed = [
            f"{kind} {', '.join(f'{name} {shapes[name]}' for name in names if name in shapes)}"
            for kind, names in (("inputs", data.input_arrays), ("targets", data.target_arrays or {}))
            if any(name in shapes for name in names)
        ]
        batch = f" with a batch of {' and '.join(listed)}" if listed else ""
        tensors = _tensors(error, task)
        variables = f", where {', '.join(f'{name} is {shape}' for name, shape in tensors.items())}" if tensors else ""
        reason = next(iter(str(error).splitlines()), "")
        raise CellMapValueError(
            f"{type(task).__name__}: {place} fails{batch}{variables}: {type(error).__name__}: {reason}; "
            "docs/own_module.md describes the shapes that a module gets and returns, and HYDRA_FULL_ERROR=1 shows the "
            "traceback"
        ) from error


def _place(error: BaseException, task: L.LightningModule) -> str | None:
    """Return the innermost own line that an error of a step has passed; None without one, or where that line raises."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _is_own(Path(frame.filename), task)]
    in_step = any(frame.name.endswith("_step") for frame in frames)
    if not own or not in_step or (own[-1] is frames[-1] and (own[-1].line or "").startswith("raise")):
        return None
    file = Path(own[-1].filename)
    file = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
    return f"{file}, line {own[-1].lineno}, in {own[-1].name} ({own[-1].line})"


def _tensors(error: BaseException, task: L.LightningModule) -> dict[str, list[int]]:
    """Return the shapes of the tensors in the innermost own line that an error has passed.

    That is, of the variables that the line names, such as the output of the network; or where it nests calls, as in
    ``bce(self(x), y)``, of the arguments of the library's function that it calls.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    rows = traceback.extract_tb(error.__traceback__)
    last = max(n for n, row in enumerate(rows) if _is_own(Path(row.filename), task))
    named = re.findall(r"(?<![\w.])[A-Za-z_]\w*", rows[last].line or "")
    variables = _shapes(frames[last].f_locals, named)
    if len(variables) > 1 or last + 1 == len(frames):
        return variables
    called = frames[last + 1]
    return variables | _shapes(called.f_locals, called.f_code.co_varnames[: called.f_code.co_argcount])


def _shapes(variables: Mapping[str, Any], names: Sequence[str]) -> dict[str, list[int]]:
    return {name: list(variables[name].shape) for name in names if isinstance(variables.get(name), Tensor)}


def _is_own(file: Path, task: L.LightningModule) -> bool:
    """Return True for code that is not of a library: of the user, or of the package that the module is of."""
    folder = Path(__file__).parents[1]
    if file.is_relative_to(folder):
        return False
    module = getattr(sys.modules.get(type(task).__module__), "__file__", None)
    libraries = Path(torch.__file__).parents[1]
    return not file.is_relative_to(libraries) or (module is not None and file == Path(module))
