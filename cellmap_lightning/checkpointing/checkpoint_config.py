"""A callback that saves the configuration of a run in its checkpoints."""

from collections.abc import Mapping
from typing import Any

import lightning as L

#: Key of the configuration in a checkpoint.
CONFIG_KEY = "cellmap_config"
#: Key of the number of the start.
START_KEY = "cellmap_start"


class CheckpointConfig(L.Callback):
    """A callback that writes the resolved configuration, as plain containers, into every checkpoint.

    `cellmap-train` adds it to every run; see docs/runs.md.

    Args:
        config: the configuration.
        start: number of times that the run was started or resumed. Checkpoints of a later start are newer, even if it
            began from an earlier step than others had reached.
    """

    def __init__(self, config: Mapping[str, Any], start: int = 1) -> None:
        self.config = dict(config)
        self.start = start

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration under ``cellmap_config`` and the number of the start under ``cellmap_start``."""
        checkpoint[CONFIG_KEY] = self.config
        checkpoint[START_KEY] = self.start
