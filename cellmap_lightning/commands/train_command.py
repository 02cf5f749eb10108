"""The command ``cellmap-train``."""

from typing import Any

from omegaconf import DictConfig

from cellmap_lightning.commands.program import run_command


def main() -> Any:
    """Run ``cellmap-train``: train and validate; write checkpoints, curves and pictures into the run's folder."""
    return run_command("train", _train)


def _train(configs: list[DictConfig]) -> float | None:
    from cellmap_lightning.commands.train import run

    return run(configs[0])
