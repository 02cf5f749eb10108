"""Export as ONNX, which onnxruntime and many other programs run."""

import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

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
    onnx, *_ = [extra_library(name, where) for name in ("onnx", "onnxscript", "onnxruntime")]
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
            proto = program.model_proto
            _name_axes(proto.graph, ["batch", "channel", *"zyx"[5 - x.ndim :]])
            onnx.save(proto, str(path))
    except Exception as e:  # the code of a network can raise anything
        raise CellMapValueError(f"{where}: {untraceable(model, e)}") from e
    return path


def _name_axes(graph: Any, names: Sequence[str]) -> None:
    """Name the axes of free length, which torch calls ``s77`` and so on, in all shapes of a graph.

    Args:
        graph: the graph of an ONNX model, which is changed.
        names: of the axes of its only input.
    """
    axes = graph.input[0].type.tensor_type.shape.dim
    # Axes that must have the same length share a symbol, and then the name of the first of them.
    renamed = {axis.dim_param: name for axis, name in reversed([*zip(axes, names, strict=True)]) if axis.dim_param}
    for value in (*graph.input, *graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param:  # a name, or a term such as s53 - 2
                axis.dim_param = re.sub(r"[A-Za-z_]\w*", lambda match: renamed.get(match[0], match[0]), axis.dim_param)


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
