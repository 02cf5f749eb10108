"""Export as TorchScript, which torch and libtorch run without the code of the network."""

import warnings
from pathlib import Path

import torch
from lightning.pytorch.core.module import _jit_is_scripting

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.trained_model import TrainedModel

#: Name of the file.
FILE = "model.ts"


def write_torchscript(model: TrainedModel, folder: Path, where: str) -> Path:
    """Trace a model and write ``model.ts``.

    Args:
        model: the model.
        folder: the folder to write to.
        where: the setting that names the export, for messages.

    Raises:
        CellMapValueError: the network cannot be traced.
    """
    path = folder / FILE
    try:
        # The tracer reads all attributes of a module; without this, `trainer` of a LightningModule raises.
        with warnings.catch_warnings(), torch.no_grad(), _jit_is_scripting():
            warnings.simplefilter("ignore")  # of the tracer, about sizes; other sizes are compared afterwards
            traced = torch.jit.trace(model.module, model.example, check_trace=False)  # type: ignore[no-untyped-call]
            traced.save(str(path))
    except Exception as e:  # the code of a network can raise anything
        raise CellMapValueError(f"{where}: {untraceable(model, e)}") from e
    return path


def untraceable(model: TrainedModel, error: Exception) -> str:
    """Return a message about a network that cannot be converted."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return (
        f"{model.card.about.get('network')} cannot be traced ({reason}); its forward must consist of operations on "
        "tensors, see docs/export.md"
    )
