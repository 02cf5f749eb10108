"""The command ``cellmap-inspect``."""

import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from cellmap_lightning.commands.config_keys import training_data
from cellmap_lightning.commands.config_values import refuse_csv
from cellmap_lightning.commands.messages import quieten
from cellmap_lightning.commands.override_form import as_overrides
from cellmap_lightning.commands.program import run_command
from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.redaction import hide_address
from cellmap_lightning.validation import one_of, positive_number

#: Keys of the command that a training does not have.
_INSPECT_ONLY = ("deep", "json", "device_gb", "cache")


def main() -> Any:
    """Run ``cellmap-inspect``: report properties and problems of data, and settings that fit them."""
    return run_command("inspect", _inspect, lambda cfg: [_prepare(cfg)])


def _prepare(cfg: DictConfig) -> DictConfig:
    """Check the command's own settings, and move ``data.input_path`` out of the data module's arguments."""
    if cfg.cache is not None:
        one_of("cache", cfg.cache, ("list", "clear"), CellMapKeyError)
    for name in ("deep", "json"):
        if not isinstance(cfg[name], bool):
            raise CellMapValueError(f"{name} must be true or false, got {cfg[name]!r}")
    if cfg.device_gb is not None:
        positive_number("device_gb (GiB)", cfg.device_gb)
    config = training_data(cfg)
    if OmegaConf.is_missing(config.data, "csv_path"):
        config.data.csv_path = None
    config.input_path = config.data.pop("input_path")
    refuse_csv(config.input_path)
    sources = {name: config.data[name] for name in ("csv_path", "datasets", "search_path")}
    sources["input_path"] = config.input_path
    selected = [f"data.{name}" for name, value in sources.items() if value is not None]
    if cfg.cache is None and len(selected) != 1:
        raise CellMapValueError(
            "give the data in one way: data.csv_path=..., data.input_path=..., data.search_path=... or "
            "data.datasets=...; or cache=list for the files cached on this machine; "
            f"got {' and '.join(selected) or 'none'}"
        )
    return config


def _inspect(configs: list[DictConfig]) -> None:
    (cfg,) = configs
    logging.getLogger("cellmap_lightning").setLevel(logging.ERROR)  # the report contains the warnings
    if cfg.cache is not None:
        from cellmap_lightning.inspection.cached_files import clear, listing

        print(listing())
        if cfg.cache == "clear":
            print(clear())
        return
    quieten()
    from cellmap_lightning.batches.memory import gpu_memory
    from cellmap_lightning.inspection.report import inspect, refuse

    target = cfg.data.pop("_target_")  # its arguments may be made by targets themselves, as the demo's volume is
    data: Any = {"_target_": target, **instantiate(cfg.data, _convert_="all")}
    patch: Any = OmegaConf.to_container(cfg.patch, resolve=True)
    device_bytes = int(cfg.device_gb * 2**30) if cfg.device_gb is not None else gpu_memory() or 16 << 30
    report = inspect(data, patch, cfg.input_path, cfg.deep, device_bytes)
    print(hide_address(report.json() if cfg.json else as_overrides(str(report))))
    overrides = report.proposal.overrides if report.proposal is not None else None
    if not cfg.json and report.refused is None and overrides is not None:
        command = training_command(sys.argv[1:], overrides)
        if command is not None:
            print("\n" + hide_address(f"or, with what was given here, in one command\n\n{command}"))
    refuse(report)


def training_command(arguments: Sequence[str], proposed: Mapping[str, str]) -> str | None:
    """Return the command that trains with the arguments of ``cellmap-inspect``, completed by a proposal.

    Args:
        arguments: of the command line; what only ``cellmap-inspect`` reads is left out.
        proposed: settings as overrides; those that are given remain as they are.

    Returns:
        The command, quoted for a shell; None with an experiment, whose settings are in its file.
    """
    keys = [argument.partition("=")[0].lstrip("+~") for argument in arguments]
    if "experiment" in keys or "data.input_path" in keys:
        return None
    given = [a for a, key in zip(arguments, keys, strict=True) if key not in _INSPECT_ONLY]
    added = [f"{key}={value}" for key, value in proposed.items() if key not in keys]
    return " ".join(["cellmap-train", *map(shlex.quote, [*given, *added])])
