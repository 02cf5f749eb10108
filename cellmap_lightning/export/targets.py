"""The targets of an export: the file formats of other programs."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.bioimageio import PackageOptions, write_package
from cellmap_lightning.export.cellmap_flow import without_halo, write_flow_files
from cellmap_lightning.export.model_card import WEIGHTS, ModelCard
from cellmap_lightning.export.onnx import write_onnx
from cellmap_lightning.export.staging import staged
from cellmap_lightning.export.torchscript import write_torchscript
from cellmap_lightning.export.trained_model import TrainedModel
from cellmap_lightning.export.verification import verify
from cellmap_lightning.validation import one_of

Writer = Callable[[TrainedModel, Path, str], Path]
_WEIGHTS: dict[str, Writer] = {
    "torchscript": write_torchscript,
    "onnx": write_onnx,
    "bioimageio": write_torchscript,
    "cellmap_flow": write_torchscript,
}
TARGETS = tuple(_WEIGHTS)


def export_model(
    model: TrainedModel, to: str, out: Path, overwrite: bool = False, package: PackageOptions | None = None
) -> ModelCard:
    """Export a model, and compare the exported file with it before anything appears at ``out``.

    Args:
        model: the model.
        to: one of ``TARGETS``.
        out: the folder to write; of ``bioimageio`` a ``.zip`` file.
        overwrite: replace an earlier export.
        package: authors, license and so on of ``bioimageio``.

    Returns:
        The description of the export.

    Raises:
        CellMapValueError: the network cannot be converted, or the outputs differ.
        CellMapFileExistsError: see `check_output`.
        MissingExtraError: a library is not installed.
    """
    one_of("to", to, TARGETS)
    where = f"to={to}"
    if to == "bioimageio" and out.suffix != ".zip":
        raise CellMapValueError(f"out={out} must end in .zip for to=bioimageio")
    if to != "bioimageio" and out.suffix in (".zip", *WEIGHTS):
        raise CellMapValueError(f"out={out} must be a folder; the weights are written to a file in it")
    model = without_halo(model) if to == "cellmap_flow" else model
    with staged(out, overwrite) as folder:
        weights = _WEIGHTS[to](model, folder, where)
        verified = verify(model, weights, where)
        about = {**model.card.about, "verified": verified}
        reach = model.card.reach
        if reach is not None and verified["other_shape"] is None:
            reach = {**reach, "voxel_bytes": 0.0}  # patches of other shapes need a file that takes them
        card = ModelCard(**(asdict(model.card) | {"weights": weights.name, "reach": reach, "about": about}))
        np.save(folder / "test_input.npy", model.example.numpy())
        np.save(folder / "test_output.npy", model.expected.numpy())
        card.write(folder)
        if to == "cellmap_flow":
            write_flow_files(card, folder)
        if to == "bioimageio":
            write_package(model, card, folder, out.name, package or PackageOptions())
    return card
