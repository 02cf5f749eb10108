"""Hints after Hydra's own errors about overrides."""

import argparse
import inspect
import json
from collections.abc import Collection, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object
from omegaconf import OmegaConf

from cellmap_lightning.commands.config_keys import flat_keys
from cellmap_lightning.commands.config_values import target_nodes
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
    files = _option("--config-dir", "-cd", arguments)
    folders = [CONFIGS, *([Path(files).resolve()] if files is not None and Path(files).is_dir() else [])]
    groups = {path.name for folder in folders for path in folder.iterdir() if path.is_dir()}
    overrides = [a for a in arguments if "=" in a and not a.startswith("-")]
    accepted = _accepted_overrides(overrides, groups, folders)
    config = _composed(_option("--config-name", "-cn", arguments) or name, accepted)
    if config is None:
        return []
    overrides = [o for o in overrides if o != files]  # a folder may have a = in its name
    keys = _existing_keys(config, groups, overrides)
    return [*_slurm_hints(arguments), *_multirun_hints(name, arguments), *_key_hints(name, overrides, keys)]


def _accepted_overrides(overrides: Sequence[str], groups: set[str], folders: Sequence[Path]) -> list[str]:
    """Return the overrides with which a configuration is composed to search it for keys.

    The selected options are among them, whose keys may be meant, but not the overrides that Hydra refused.

    Args:
        overrides: those of the command line.
        groups: names of the groups of configurations.
        folders: the folders of configurations, the package's first.
    """
    selected = [o for o in overrides if _selects_option(o, groups, folders)]
    searched = f"hydra.searchpath=[{', '.join(json.dumps(f'file://{folder}') for folder in folders[1:])}]"
    return [searched, *selected]


def _existing_keys(config: Any, groups: Collection[str], overrides: Sequence[str]) -> list[str]:
    """Return the keys that can be overridden: those of a configuration, its groups, and arguments left at defaults.

    Args:
        config: the configuration, as plain containers.
        groups: names of the groups of configurations.
        overrides: those of the command line; only classes that they name are imported for their arguments.
    """
    keys = [*(key for key, _ in flat_keys(config)), *groups]
    nodes = {_key_of(override).rpartition(".")[0] for override in overrides}
    return [*keys, *_arguments(config, keys, nodes)]


def _slurm_hints(arguments: Sequence[str]) -> list[str]:
    """Return a hint for jobs through Slurm without the extra that they need."""
    slurm = any("submitit" in a or a.endswith("=slurm_ddp") for a in arguments)
    if slurm and not find_spec("submitit"):
        return [f"Jobs through Slurm need the extra slurm: {install_command('slurm')}"]
    return []


def _multirun_hints(name: str, arguments: Sequence[str]) -> list[str]:
    """Return a hint for ``-m`` after an override."""
    if "-m" in arguments[1:] and not arguments[0].startswith("-"):
        return [f"-m comes first: cellmap-{name} -m {' '.join(a for a in arguments if a != '-m')}"]
    return []


def _key_of(override: str) -> str:
    """Return the key of an override, such as ``data.seed`` of ``+data.seed=1``."""
    return override.partition("=")[0].lstrip("+~")


def _option(name: str, short: str, arguments: list[str]) -> str | None:
    """Return the value of an option of Hydra, such as ``--config-dir``; None where it is not given."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(short, name, dest="value")
    try:
        value: str | None = parser.parse_known_args(arguments)[0].value
    except (argparse.ArgumentError, SystemExit):  # without a value
        return None
    return value


def _arguments(config: Any, keys: Sequence[str], nodes: Collection[str]) -> list[str]:
    """Return the keys of arguments that a configuration leaves at their defaults.

    Args:
        config: the configuration, as plain containers.
        keys: its keys.
        nodes: the keys of the classes whose arguments are returned; only these are imported.
    """
    found = []
    for where, node in target_nodes(config):
        if where not in nodes:
            continue
        try:
            names = inspect.signature(get_object(node["_target_"])).parameters
        except Exception:  # the hint must never hide the error that it belongs to
            continue
        found += [f"{where}.{name}" for name in names if f"{where}.{name}" not in keys]
    return found


def _key_hints(name: str, overrides: list[str], keys: list[str]) -> list[str]:
    """Return a hint for each override of a key that does not exist."""
    hints = []
    for override in overrides:
        key = _key_of(override)
        if key not in keys and not key.startswith("hydra"):
            closest = did_you_mean(key, keys, f"; 'cellmap-{name} --cfg job' prints every key.")
            hints.append(f"{NO_KEY}{key!r}{closest}")
    return hints


def _selects_option(override: str, groups: set[str], folders: Sequence[Path]) -> bool:
    """Return whether an override selects an existing option of a group, such as ``model=unet``."""
    group, _, option = override.partition("=")
    return group in groups and any((folder / group / f"{option}.yaml").exists() for folder in folders)


def _composed(name: str, overrides: list[str]) -> Any:
    """Return the configuration of a command as plain containers; None where it cannot be composed."""
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
            return OmegaConf.to_container(hydra.compose(name, overrides=overrides), resolve=False)
    except Exception:  # the hint must never hide the error that it belongs to
        return None
