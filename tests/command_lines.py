"""Command lines in texts: split as a shell does, and composed and checked as the commands do, without running them."""

import re
import shlex
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from cellmap_lightning.commands.arguments import check_groups, prepare_arguments
from cellmap_lightning.commands.config_keys import check_known, rename_voxel_sizes
from cellmap_lightning.commands.config_values import check_targets
from cellmap_lightning.commands.resolvers import CONFIGS, register_resolvers


def shell_commands(text: str) -> list[list[str]]:
    """Return the words of each command in a block of a shell; comments, prompts and ``...`` are left out."""
    lines = re.sub(r"\\\n", " ", text).splitlines()
    commands = []
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|")
        lexer.whitespace_split = True
        command: list[str] = []
        for word in [*lexer, ";"]:
            if set(word) <= set("&;|"):
                commands.append([w for w in command if w not in ("...", "…")])
                command = []
            else:
                command.append(word)
    return [command for command in commands if command]


def composed(command: list[str], folder: Path) -> DictConfig:
    """Return the configuration of a ``cellmap-*`` command, checked for unknown keys, groups and arguments.

    Args:
        command: the words of the command; of a sweep, the first values are taken.
        folder: the working directory, which ``--config-dir`` starts from.
    """
    register_resolvers()
    name = command[0].removeprefix("cellmap-")
    known, unknown = get_args_parser().parse_known_args(prepare_arguments(name, command[1:], CONFIGS))
    assert not any(argument.startswith("-") for argument in unknown), f"{command[0]} has no option {unknown}"
    overrides = [_first_value(o, bool(known.multirun)) for o in [*known.overrides, *unknown]]
    if known.config_dir:
        overrides.append(f"hydra.searchpath=['file://{folder / known.config_dir}']")
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS.resolve()), version_base="1.3"):
        cfg = hydra.compose(name, overrides=overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    try:
        with open_dict(cfg):
            cfg.pop("hydra")
        config: Any = OmegaConf.to_container(cfg, resolve=False)
        check_groups(config, CONFIGS)
        rename_voxel_sizes(cfg, name)
        check_known(cfg, name)
        if name == "train":
            for key, value in (("classes", ["mito"]), ("csv_path", "crops.csv")):  # examples may leave them out
                if OmegaConf.is_missing(cfg.data, key):
                    cfg.data[key] = value
            check_targets(cfg)
    finally:
        HydraConfig.instance().cfg = None
    return cfg


def _first_value(override: str, multirun: bool) -> str:
    """Return an override with the first of the values of a sweep."""
    (parsed,) = OverridesParser.create().parse_overrides([override])
    if not parsed.is_sweep_override():
        return override
    assert multirun, f"{override} has several values, and needs -m"
    return f"{parsed.get_key_element()}={next(iter(parsed.sweep_string_iterator()))}"
