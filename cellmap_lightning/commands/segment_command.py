"""The command ``cellmap-segment``."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.config_keys import given_keys
from cellmap_lightning.commands.program import run_command


def main() -> Any:
    """Run ``cellmap-segment``: number the objects of a prediction."""
    return run_command("segment", _segment)


def _segment(configs: list[DictConfig]) -> None:
    from cellmap_lightning.commands.segment import segment
    from cellmap_lightning.instances.tuned import OPTION_KEYS

    settings: Any = OmegaConf.to_container(configs[0], resolve=True)
    if settings["tuned"] is not None:  # defaults of the configuration do not replace parameters of the file
        for key in set(OPTION_KEYS) - given_keys():
            del settings[key]
    summary = segment(class_name=settings.pop("class"), **settings)
    print(f"\n{summary.labels}: {summary.objects} objects\n{summary.table}")
