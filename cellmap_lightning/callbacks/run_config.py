"""Keep the configuration of a run in its checkpoints."""

from collections.abc import Mapping
from typing import Any

import lightning as L

#: Key of the configuration in a checkpoint.
CONFIG_KEY = "cellmap_config"


class RunConfig(L.Callback):
    """Writes the resolved configuration, as plain containers, into every checkpoint.

    Args:
        config: the configuration.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the configuration under ``cellmap_config``."""
        checkpoint[CONFIG_KEY] = self.config
