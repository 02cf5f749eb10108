"""Hints after Hydra's own errors about overrides."""

from importlib.util import find_spec
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from cellmap_lightning.commands.config_keys import flat_keys
from cellmap_lightning.commands.resolvers import CONFIGS
from cellmap_lightning.errors import install_command
from cellmap_lightning.validation import did_you_mean

#: Start of the hint for a key that does not exist.
NO_KEY = "There is no "


def override_hints(name: str, arguments: list[str]) -> list[str]:
    """Return hints for a command line that Hydra refused, such as the keys that were probably meant.

    Args:
        name: the command.
        arguments: its arguments.
    """
    groups = {path.name for path in CONFIGS.iterdir() if path.is_dir()}
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    # With the selected options, whose keys may be meant, but without the overrides that Hydra refused.
    config = _composed(name, [o for o in overrides if _selects_option(o, groups)])
    if config is None:
        return []
    hints = []
    slurm = any("submitit" in a or a.endswith("=slurm_ddp") for a in arguments)
    if slurm and not find_spec("submitit"):
        hints.append(f"Jobs through Slurm need the extra slurm: {install_command('slurm')}")
    if "-m" in arguments[1:] and not arguments[0].startswith("-"):
        hints.append(f"-m comes first: cellmap-{name} -m {' '.join(a for a in arguments if a != '-m')}")
    return hints + _key_hints(name, overrides, [*(key for key, _ in flat_keys(config)), *groups])


def _key_hints(name: str, overrides: list[str], keys: list[str]) -> list[str]:
    """Return a hint for each override of a key that does not exist."""
    hints = []
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key not in keys and not key.startswith("hydra"):
            closest = did_you_mean(key, keys, f"; 'cellmap-{name} --cfg job' prints every key.")
            hints.append(f"{NO_KEY}{key!r}{closest}")
    return hints


def _selects_option(override: str, groups: set[str]) -> bool:
    """Return whether an override selects an existing option of a group, such as ``model=unet``."""
    group, _, option = override.partition("=")
    return group in groups and (CONFIGS / group / f"{option}.yaml").exists()


def _composed(name: str, overrides: list[str]) -> Any:
    """Return the configuration of a command as plain containers; None where it cannot be composed."""
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose(name, overrides=overrides), resolve=False)
    except Exception:  # the hint must never hide the error that it belongs to
        return None
