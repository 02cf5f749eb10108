"""A task that predicts with an exported model."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from cellmap_lightning.export.model_card import CARD, read_card
from cellmap_lightning.export.saved_models import load_model

#: Name of the input in batches.
INPUT = "raw"


class ExportedTask(L.LightningModule):
    """Prediction with a TorchScript or ONNX file; `cellmap-predict` uses it, and it cannot be trained.

    Args:
        path: the description of the model: ``cellmap.json``, its folder, or a YAML file; see `ModelCard`.

    Raises:
        CellMapError: the description or the weights cannot be read.

    Example:
        >>> L.Trainer(callbacks=[writer]).predict(ExportedTask("exports/mito"), datamodule=data)  # doctest: +SKIP
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        file = Path(path) / CARD if Path(path).is_dir() else Path(path)
        self.card = read_card(file, "ckpt")
        self.model = load_model(file.parent / self.card.weights, f"ckpt={file}")

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for finished inputs ``[N, 1, z, y, x]``."""
        output: Tensor = self.model(x.float())
        return output

    def output_channels(self) -> list[dict[str, Any]] | None:
        """Return a description of each channel; None where they are probabilities of the classes."""
        return [dict(channel) for channel in self.card.channels] or None

    def predict_step(self, batch: Mapping[str, Tensor], batch_idx: int) -> Tensor:
        """Return the output of the model, ``[N, C, z, y, x]``."""
        return self(batch[INPUT])  # type: ignore[no-any-return]
