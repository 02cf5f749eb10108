"""Class probabilities of any LightningModule, for pictures: at its precision, with either signature of forward."""

import inspect
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from lightning.pytorch.plugins.precision import Precision

from cellmap_lightning.errors import CellMapError, CellMapTypeError
from cellmap_lightning.training.deep_supervision import scales_of
from cellmap_lightning.training.heads import split_output
from cellmap_lightning.training.masked import probabilities
from cellmap_lightning.training.task import SegmentationTask


def precision_of(module: L.LightningModule) -> Precision:
    """Return the precision plugin of the module's Trainer; full precision where the module has no Trainer."""
    trainer: Any = getattr(module, "_trainer", None)
    return trainer.precision_plugin if trainer is not None else Precision()


@contextmanager
def inference_at_precision(module: L.LightningModule) -> Iterator[None]:
    """Compute without gradients, under the default dtype or the autocast of the module's Trainer."""
    with torch.inference_mode(), precision_of(module).forward_context():
        yield


def class_probabilities(
    module: L.LightningModule, batch: Mapping[str, torch.Tensor], names: Sequence[str], classes: int
) -> torch.Tensor:
    """Return the probability of each class in each voxel of a batch.

    The module is called with the inputs, by their names where its parameters have these, or with the whole batch where
    that fails. Of several outputs (a tuple, a
    list, a mapping) the first one that has a channel per class, or one more, and the shape of the input is taken.

    Args:
        module: the module, in evaluation mode.
        batch: finished arrays, ``[N, ...]``.
        names: inputs of the module; the output has the shape of the first one.
        classes: number of classes.

    Returns:
        ``[N, C, ...]``, float32.

    Raises:
        CellMapTypeError: the module has no forward, or none of its outputs has a channel per class and these voxels.
        Exception: any error of the module's forward.
    """
    outputs, raw = _forward(module, batch, names)
    for logits in _tensors(outputs):
        if (
            logits.is_floating_point()
            and logits.ndim == raw.ndim
            and (len(logits), *logits.shape[2:]) == (len(raw), *raw.shape[2:])
            and logits.shape[1] in (classes, classes + 1)
        ):
            return probabilities(logits.to(torch.float32), classes)
    got = ", ".join(str(list(t.shape)) for t in _tensors(outputs)) or type(outputs).__name__
    raise CellMapTypeError(
        f"{type(module).__name__}: forward must return logits {[len(raw), classes, *raw.shape[2:]]}, or one channel "
        f"more with the background first, got {got}"
    )


def predicted_values(
    module: L.LightningModule,
    batch: Mapping[str, torch.Tensor],
    names: Sequence[str],
    classes: int,
    target: str | None,
) -> torch.Tensor:
    """Return the values that a module predicts for a target: of a `SegmentationTask` those of its head.

    Args:
        module: the module, in evaluation mode.
        batch: finished arrays, ``[N, ...]``.
        names: inputs of the module.
        classes: number of classes.
        target: name of the target; of other modules the probabilities of classes are taken.

    Returns:
        ``[N, channels, ...]``, float32.

    Raises:
        CellMapTypeError: see `class_probabilities`.
    """
    heads = module.heads if isinstance(module, SegmentationTask) else ()
    position = next((i for i, head in enumerate(heads) if head.name == target), None)
    if position is None:
        return class_probabilities(module, batch, names, classes)
    outputs, raw = _forward(module, batch, names)
    parts = split_output(scales_of(outputs, raw.ndim)[0], heads)
    return heads[position].values(parts[position].to(torch.float32))


def _forward(
    module: L.LightningModule, batch: Mapping[str, torch.Tensor], names: Sequence[str]
) -> tuple[Any, torch.Tensor]:
    """Return the output of a module's forward, and its first input."""
    if type(module).forward in (torch.nn.Module.forward, L.LightningModule.forward):
        raise CellMapTypeError(f"{type(module).__name__} has no forward")
    moved = {name: value.to(module.device) for name, value in batch.items()}
    moved = precision_of(module).convert_input(moved)
    with inference_at_precision(module):
        # There is no convention of Lightning for forward: it may take the inputs or the batch.
        by_name = {p.name for p in _parameters(module) if p.kind is not inspect.Parameter.POSITIONAL_ONLY}
        try:
            if by_name >= set(names):  # in any order, as forward(context, raw)
                outputs = module(**{name: moved[name] for name in names})
            else:
                outputs = module(*(moved[name] for name in names))
        except Exception as error:
            try:
                outputs = module(moved)
            except Exception:
                raise error from None  # the first call is the more likely signature
    return outputs, moved[names[0]]


def _tensors(outputs: Any) -> list[torch.Tensor]:
    """Return the tensors of a module's output: a tensor, or a collection or mapping of tensors."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs
    if isinstance(values, torch.Tensor):
        return [values]
    try:
        return [value for value in values if isinstance(value, torch.Tensor)]
    except TypeError:  # not a collection
        return []


def names_in(arrays: Collection[str], named: Any) -> list[str]:
    """Return the arrays that a task names, else the first one.

    Args:
        arrays: arrays of a batch.
        named: an attribute of a task, such as ``input_name``; in user code it may mean something else and is ignored
            then.
    """
    return _named(arrays, named) or list(arrays)[:1]


def inputs_of(module: L.LightningModule, arrays: Collection[str], named: Any = None) -> list[str]:
    """Return the inputs of a module's forward: those that it names, else as many as its forward takes.

    Args:
        module: the module.
        arrays: inputs of a batch, in their order.
        named: names in place of the attribute ``input_name`` of the module.
    """
    names = _named(arrays, named or getattr(module, "input_name", None))
    if names:
        return names
    parameters = _parameters(module)
    taken = [p for p in parameters if p.default is inspect.Parameter.empty or p.name in arrays]
    if any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in taken):
        return list(arrays)
    if taken and all(p.name in arrays for p in taken):
        return [name for name in arrays if name in {p.name for p in taken}]
    return list(arrays)[: max(1, sum(p.default is inspect.Parameter.empty for p in taken))]


def _parameters(module: L.LightningModule) -> list[inspect.Parameter]:
    """Return the parameters of a module's forward that take inputs."""
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
        inspect.Parameter.KEYWORD_ONLY,
    )
    return [p for p in inspect.signature(module.forward).parameters.values() if p.kind in kinds]


def _named(arrays: Collection[str], named: Any) -> list[str]:
    """Return the names in an attribute of a task; none where it does not name arrays."""
    names = [named] if isinstance(named, str) else named if isinstance(named, list | tuple) else []
    return list(names) if names and set(names) <= set(arrays) else []


def no_predict_step(task: L.LightningModule, error: BaseException) -> CellMapTypeError | None:
    """Return the error for a module that cannot predict a batch; None where the fault is another one.

    That is a module with neither ``predict_step`` nor ``forward``; with a ``forward`` alone that does not take a batch,
    as Lightning calls it; or with a ``predict_step`` that calls a module without ``forward``.

    Args:
        task: the module.
        error: the error of its prediction.
    """
    name = type(task).__name__
    if isinstance(error, NotImplementedError) and 'required "forward" function' in str(error):  # of torch
        return CellMapTypeError(
            f"{name}: predict_step calls a module without forward ({error}); define forward, or call the network "
            "instead of the module"
        )
    if type(task).predict_step is not L.LightningModule.predict_step or not _raised_in_forward(error, task):
        return None
    return CellMapTypeError(
        f"{name} has no predict_step, so its forward was called with the batch, a dict, and failed "
        f"({first_line(error)}); define predict_step(self, batch, batch_idx), which returns [N, C, z, y, x]"
    )


def _raised_in_forward(error: BaseException, task: L.LightningModule) -> bool:
    """Return True if an error was raised in the ``forward`` of a module, or in what it calls."""
    code = getattr(type(task).forward, "__code__", None)
    return any(frame.f_code is code for frame, _ in traceback.walk_tb(error.__traceback__))


def first_line(error: BaseException) -> str:
    """Return the first line of an error, with its type unless it is one of this package."""
    text = next(iter(str(error).splitlines()), "")
    return text if isinstance(error, CellMapError) and text else f"{type(error).__name__}: {text}".rstrip(": ")
