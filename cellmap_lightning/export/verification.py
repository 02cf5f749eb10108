"""Comparison of an exported file with the model that it was made from."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.saved_models import load_model
from cellmap_lightning.export.trained_model import TrainedModel

log = logging.getLogger(__name__)

#: Largest difference of an output between the file and the model, relative to the largest output above 1.
TOLERANCE = 1e-5
#: Voxels up to which a test input of twice the length along each axis is tried.
_LARGEST = 96**3


def verify(model: TrainedModel, path: Path, where: str) -> Mapping[str, Any]:
    """Compare the file with the model on the test input, and on a batch of two inputs of another shape.

    Args:
        model: the model.
        path: the exported file.
        where: the setting that names the export, for messages.

    Returns:
        ``tolerance`` and ``max_difference``; ``other_shape``, voxels of an input of another shape for which the file
        computes the same as the model, None where the network or the file takes the exported shape alone.

    Raises:
        CellMapValueError: the outputs differ.
    """
    loaded = load_model(path, where)
    difference = _difference(loaded, model.example, model.expected)
    if not difference <= TOLERANCE:
        raise CellMapValueError(
            f"{where}: the output of the exported file differs from that of the model by {difference:.3g}, more than "
            f"{TOLERANCE:g}; nothing is exported"
        )
    other = _other_shape(model.module, model.example)
    if other is not None:
        x, expected = other
        change = _difference(loaded, x, expected)
        if not change <= TOLERANCE:
            log.warning("%s: the file takes inputs of %s voxels alone", where, list(model.example.shape[2:]))
            other = None
        else:
            difference = max(difference, change)
    return {
        "tolerance": TOLERANCE,
        "max_difference": difference,
        "other_shape": None if other is None else list(other[0].shape[2:]),
    }


def _difference(loaded: nn.Module, x: Tensor, expected: Tensor) -> float:
    """Return the largest difference of an output; infinity if the file cannot compute it."""
    try:
        with torch.no_grad():
            output = loaded(x)
    except Exception:  # TorchScript and onnxruntime raise classes that differ between versions
        return math.inf
    if output.shape != expected.shape:
        return math.inf
    return float((output - expected).abs().max()) / max(float(expected.abs().max()), 1.0)


def _other_shape(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return two inputs of another shape and their output; None where the network takes no other shape."""
    shape = x.shape[2:]
    smaller = [n // 2 for n in shape]
    larger = [2 * n for n in shape]
    for lengths in (smaller, *([larger] if math.prod(larger) <= _LARGEST else [])):
        if min(lengths) < 2:
            continue
        generator = torch.Generator("cpu").manual_seed(1)
        other = torch.rand(2, 1, *lengths, generator=generator, dtype=torch.float32, device="cpu")
        try:
            with torch.no_grad():
                output = module(other)
        except (RuntimeError, ValueError):  # as of a U-Net whose strides do not divide the lengths
            continue
        if output.numel():
            return other, output
    return None
