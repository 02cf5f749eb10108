"""The command ``cellmap-convert``."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.program import run_command


def main() -> Any:
    """Run ``cellmap-convert``: write a volume of any format as OME-NGFF."""
    return run_command("convert", _convert)


def _convert(configs: list[DictConfig]) -> None:
    from cellmap_lightning.conversion.convert import convert
    from cellmap_lightning.conversion.options import ConversionOptions

    settings: Any = OmegaConf.to_container(configs[0], resolve=True)
    print(convert(ConversionOptions(**settings)))
