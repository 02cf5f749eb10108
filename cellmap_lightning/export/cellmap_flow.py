"""Export as a model folder of cellmap-flow, which predicts volumes while they are viewed.

The folder has the form of ``CellmapModel`` of the package cellmap-models (``format_version`` 1), which cellmap-flow
reads by ``cellmap --folder-path``, and a script for its ``script --script-path``.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import cellmap_lightning
from cellmap_lightning.errors import CellMapValueError
from cellmap_lightning.export.model_card import ModelCard
from cellmap_lightning.export.trained_model import TrainedModel

#: Names of the files that it adds.
METADATA, SCRIPT = "metadata.json", "cellmap_flow_script.py"


class Cropped(nn.Module):
    """A model whose output lacks a margin, as cellmap-flow expects the halo: read more than is written.

    Args:
        module: the model.
        margin: voxels that are left out on either side, per axis.

    Example:
        >>> Cropped(nn.Identity(), (1, 2))(torch.zeros(1, 1, 8, 8)).shape
        torch.Size([1, 1, 6, 4])
    """

    def __init__(self, module: nn.Module, margin: tuple[int, ...]) -> None:
        super().__init__()
        self.module, self.margin = module, margin

    def forward(self, x: Tensor) -> Tensor:
        """Return the inner part of the output for ``[N, 1, ...]``."""
        output: Tensor = self.module(x)
        for axis, margin in enumerate(self.margin, start=2):
            output = output.narrow(axis, margin, output.shape[axis] - 2 * margin)
        return output


def without_halo(model: TrainedModel) -> TrainedModel:
    """Return a model whose output lacks its halo, at most a quarter of the patch on either side.

    Raises:
        CellMapValueError: cellmap-flow cannot describe it: it is not three-dimensional, or its voxel sizes are not
            whole numbers of nm.
    """
    card = model.card
    sizes = [*card.input_voxel_size, *card.output_voxel_size]
    if len(card.input_shape) != 3 or 1 in card.input_shape:
        raise CellMapValueError(
            f"to=cellmap_flow needs a network of volumes, got patches of {list(card.input_shape)} voxels"
        )
    if any(size != int(size) for size in sizes):
        raise CellMapValueError(
            f"to=cellmap_flow needs voxel sizes in whole nm, got {list(card.input_voxel_size)}; train with such a "
            "patch.scale"
        )
    if card.input_shape != card.output_shape or card.input_voxel_size != card.output_voxel_size:
        return model  # the network leaves its halo out itself
    margin = tuple(min(h, n // 4) for h, n in zip(card.halo or (0, 0, 0), card.input_shape, strict=True))
    module = Cropped(model.module, margin)
    with torch.no_grad():
        expected = module(model.example)
    shape = tuple(expected.shape[2:])
    return replace(model, module=module, expected=expected, card=ModelCard(**(asdict(card) | {"output_shape": shape})))


def write_flow_files(card: ModelCard, folder: Path) -> None:
    """Write ``metadata.json`` and the script to the folder with the weights.

    Args:
        card: the description of the model.
        folder: the folder.
    """
    (folder / METADATA).write_text(json.dumps(_metadata(card), indent=2) + "\n")
    (folder / SCRIPT).write_text(_script(card))


def _normalizer(card: ModelCard) -> str:
    """Return the normalization as cellmap-flow's own normalizer, in words."""
    if card.affine is None:
        return f"input normalized by normalize={card.normalize}, invert={card.invert}, measured on the volume"
    offset, factor = card.affine["offset"], card.affine["factor"]
    low, high = sorted((offset, offset + 1 / factor))
    return f"input normalized by MinMaxNormalizer(min_value={low:g}, max_value={high:g}, invert={card.invert})"


def _metadata(card: ModelCard) -> dict[str, Any]:
    """Return the fields of ``ModelMetadata`` of cellmap-models."""
    return {
        "model_name": "_".join(card.classes),
        "model_type": card.about.get("network"),
        "framework": f"torch, cellmap_lightning {cellmap_lightning.__version__}",
        "spatial_dims": 3,
        "in_channels": 1,
        "out_channels": len(card.channel_names),
        "iteration": card.about.get("step"),
        "input_voxel_size": [int(s) for s in card.input_voxel_size],
        "output_voxel_size": [int(s) for s in card.output_voxel_size],
        "channels_names": list(card.channel_names),
        "input_shape": list(card.input_shape),
        "output_shape": list(card.output_shape),
        "inference_input_shape": list(card.input_shape),
        "inference_output_shape": list(card.output_shape),
        "author": None,
        "description": f"Predicts {', '.join(card.channel_names)}; {_normalizer(card)}.",
        "version": "1.0.0",
        "format_version": "1",
    }


def _script(card: ModelCard) -> str:
    """Return the script of ``cellmap_flow ... script``, which imports nothing that its check of scripts refuses."""
    sizes = [tuple(int(s) for s in sizes) for sizes in (card.input_voxel_size, card.output_voxel_size)]
    return f'''"""The model of this folder for cellmap-flow: {_normalizer(card)}."""

from pathlib import Path

import torch
from funlib.geometry import Coordinate

input_voxel_size = Coordinate({sizes[0]})
output_voxel_size = Coordinate({sizes[1]})
read_shape = Coordinate({tuple(card.input_shape)}) * input_voxel_size
write_shape = Coordinate({tuple(card.output_shape)}) * output_voxel_size
channels = {list(card.channel_names)}
output_channels = {len(card.channel_names)}
block_shape = {(*card.output_shape, len(card.channel_names))}
model = torch.jit.load(str(Path(__file__).parent / "{card.weights}"), map_location="cpu").eval()
'''
