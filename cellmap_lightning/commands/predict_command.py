"""The command ``cellmap-predict``."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from cellmap_lightning.commands.messages import quieten
from cellmap_lightning.commands.program import run_command


def main() -> Any:
    """Run ``cellmap-predict``: predict a volume, or crops, with the model of a checkpoint."""
    return run_command("predict", _predict, _prepare)


def _prepare(cfg: DictConfig) -> list[DictConfig]:
    from cellmap_lightning.commands.predict_config import prediction_configs

    configs = prediction_configs(cfg, list(HydraConfig.get().overrides.task))
    if cfg.tuned is not None:
        from cellmap_lightning.commands.predict_tuned import use_tuned

        use_tuned(configs, cfg.tuned)
    return configs


def _predict(configs: list[DictConfig]) -> None:
    from cellmap_lightning.commands.predict import run_all

    quieten()
    run_all(configs, print)
