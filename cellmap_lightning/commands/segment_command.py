"""The command ``cellmap-segment``."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.program import run_command


def main() -> Any:
    """Run ``cellmap-segment``: number the objects of a prediction."""
    return run_command("segment", _segment)


def _segment(configs: list[DictConfig]) -> None:
    from cellmap_lightning.commands.segment import segment

    settings: Any = OmegaConf.to_container(configs[0], resolve=True)
    summary = segment(class_name=settings.pop("class"), **settings)
    print(f"\n{summary.labels}: {summary.objects} objects\n{summary.table}")
