"""Export as ONNX, which onnxruntime and many other programs run."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.saved_models import extra_library
from cellmap_lightning.export.torchscript import untraceable
from cellmap_lightning.export.trained_model import TrainedModel

#: Name of the file.
FILE = "model.onnx"


def write_onnx(model: TrainedModel, folder: Path, where: str) -> Path:
    """Convert a model and write ``model.onnx``, with inputs of any size where the network allows it.

    Args:
        model: the model.
        folder: the folder to write to.
        where: the setting that names the export, for messages.

    Raises:
        CellMapValueError: the network cannot be traced.
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        extra_library(name, where)
    path = folder / FILE
    x = torch.cat([model.example] * 2)  # a batch of one would become a constant
    sizes = dict.fromkeys([0, *range(2, x.ndim)], torch.export.Dim.AUTO)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), _without_hints(), torch.no_grad():
            warnings.simplefilter("ignore")  # of torch.onnx, about itself
            program = torch.onnx.export(
                model.module, (x,), dynamo=True, dynamic_shapes=(sizes,), input_names=["raw"],
                output_names=["prediction"], verbose=False,
            )  # fmt: skip
            assert program is not None
            program.save(str(path), external_data=False)
    except Exception as e:  # the code of a network can raise anything
        raise CellMapValueError(f"{where}: {untraceable(model, e)}") from e
    return path


@contextmanager
def _without_hints() -> Iterator[None]:
    """Leave out log lines of torch.onnx on operators of torchvision, which no network of volumes has."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def keep(record: logging.LogRecord) -> bool:
        return "torchvision is not installed" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
