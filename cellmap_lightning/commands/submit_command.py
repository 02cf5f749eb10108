"""The command ``cellmap-submit``."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.config_keys import given_keys
from cellmap_lightning.commands.program import run_command


def main() -> Any:
    """Run ``cellmap-submit``: write a submission to the challenge from predictions."""
    return run_command("submit", _submit)


def _submit(configs: list[DictConfig]) -> None:
    from cellmap_lightning.commands.submit import submit

    settings: Any = OmegaConf.to_container(configs[0], resolve=True)
    if settings["tuned"] is not None:  # defaults of the configuration do not replace parameters of the file
        for key in {"threshold", "min_volume"} - given_keys():
            del settings[key]
    path, missing = submit(**settings)
    print(f"\n{path}")
    if missing:
        print(f"not in it, though {configs[0].manifest} lists them: {', '.join(missing)}")
