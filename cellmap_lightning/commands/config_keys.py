"""Checks of the keys of a configuration: unknown, renamed and missing ones."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from cellmap_lightning.commands.resolvers import CONFIGS
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.validation import did_you_mean

_TRAINING_GROUPS = ("model", "task", "trainer", "callbacks", "logger", "experiment")


def flat_keys(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a configuration of plain containers, joined by dots, and its value."""
    if isinstance(node, dict):
        for key, value in node.items():
            path = f"{where}.{key}" if where else str(key)
            yield path, value
            yield from flat_keys(value, path)


def _leaves(node: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value that is no container, in lists too, and its path, such as ``data.datasets[0].raw``."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _leaves(value, f"{where}[{number}]")
    else:
        yield where, node


def given_keys() -> set[str]:
    """Return the keys that the command line sets."""
    return {override.partition("=")[0].lstrip("+~") for override in HydraConfig.get().overrides.task}


def rename_voxel_sizes(cfg: DictConfig, name: str) -> None:
    """Rename ``voxel_size`` in a file of the user to ``scale``, as in the arrays of a dataset.

    Args:
        cfg: the configuration, which is changed.
        name: the command.

    Raises:
        CellMapValueError: a node sets both.
    """
    groups = ("data.input_arrays", "data.target_arrays")
    arrays = [f"{group}.{array}" for group in groups for array in OmegaConf.select(cfg, group) or {}]
    for where in ["patch", *arrays]:
        node = OmegaConf.select(cfg, where)
        if not isinstance(node, DictConfig) or node.get("voxel_size") is None:
            continue
        scale = OmegaConf.to_container(node, resolve=False).get("scale")  # type: ignore[union-attr]
        if where == "patch":
            is_default = scale == OmegaConf.select(OmegaConf.load(CONFIGS / f"{name}.yaml"), "patch.scale")
        else:
            is_default = scale in (None, "${patch.scale}")
        with open_dict(node):
            voxel_size = node.pop("voxel_size")
            if any(override.startswith(f"{where}.scale=") for override in HydraConfig.get().overrides.task):
                continue  # the command line takes precedence over files
            if not is_default:
                raise CellMapValueError(f"{where} has scale and voxel_size, which are the same; give one of them")
            node.scale = voxel_size


def check_known(cfg: DictConfig, name: str) -> None:
    """Check that every key is one of the command's own configuration, or is referred to by an interpolation.

    Keys below a ``_target_`` are not checked here but by `check_target`.

    Args:
        cfg: the configuration.
        name: the command.

    Raises:
        CellMapKeyError: nothing reads a key, or an experiment or augmentation lacks its ``@package`` line.
        CellMapTypeError: an entry of callbacks or logger has no ``_target_``.
    """
    schema, groups = _schema(name)
    config: Any = OmegaConf.to_container(cfg, resolve=False)
    if "experiment" in config:
        raise CellMapKeyError(
            f"the experiment sets experiment.{next(iter(config['experiment'] or ['...']))} and so on, which nothing "
            "reads: the first line of its file must be '# @package _global_'"
        )
    if "augment" in config:
        raise CellMapKeyError(
            f"the augmentation sets augment.{next(iter(config['augment'] or ['...']))} and so on, which nothing reads: "
            "the first line of its file must be '# @package data'"
        )
    interpolations = [value for _, value in _leaves(config) if isinstance(value, str) and "${" in value]
    unread = [path for path in _unknown_keys(config, schema) if not _is_referred_to(path, interpolations)]
    if unread:
        options = schema | {group: value for group, value in config.items() if group in groups}
        keys = [key for key, _ in flat_keys(options) if "_target_" not in key]
        raise CellMapKeyError("\n".join(f"there is no {path!r}{_closest_key(path, keys, name)}" for path in unread))
    _check_groups_of_targets(config)


def training_data(cfg: DictConfig) -> DictConfig:
    """Return a configuration without what only a training reads, such as its network.

    `cellmap-preview` and `cellmap-inspect` take the experiments and files of `cellmap-train`, and read their data.
    """
    OmegaConf.resolve(cfg.data)
    unread = {*_TRAINING_GROUPS, *_schema("train")[0]} - {"data", "patch", "seed"}
    return OmegaConf.masked_copy(cfg, [str(key) for key in cfg if key not in unread])


def _schema(name: str) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of a command's own configuration, and the groups in its defaults list."""
    own: Any = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"), resolve=False)
    groups = [key for entry in own.pop("defaults", []) if isinstance(entry, dict) for key in entry]
    schema = {key: value for key, value in own.items() if key != "hydra"}
    schema |= {group: None for group in groups if " " not in group}  # with a blank: "override /group"
    if name in ("preview", "inspect"):
        schema = _schema("train")[0] | schema
    return schema, groups


def _unknown_keys(config: Mapping[str, Any], schema: Mapping[str, Any], where: str = "") -> Iterator[str]:
    """Yield the keys of a configuration that its schema does not have."""
    for key, value in config.items():
        path = f"{where}{key}"
        if key not in schema:
            yield path
        elif isinstance(value, dict) and isinstance(schema[key], dict) and "_target_" not in value:
            yield from _unknown_keys(value, schema[key], f"{path}.")


def _is_referred_to(path: str, interpolations: list[str]) -> bool:
    """Return whether an interpolation refers to a key, by its path from the root or relatively by its name."""
    name = path.rpartition(".")[2]
    pattern = rf"(?<![\w.]){re.escape(path)}(?!\w)|\{{\.+{re.escape(name)}(?!\w)"
    return any(re.search(pattern, text) for text in interpolations)


def _closest_key(path: str, keys: list[str], name: str) -> str:
    """Return the end of a message with the key that was probably meant: of the same last part, else similar."""
    last = path.rpartition(".")[2]
    same = [key for key in keys if key.rpartition(".")[2] == last]
    if len(same) == 1:
        return f"; did you mean {same[0]!r}?"
    return did_you_mean(path, keys, f"; 'cellmap-{name} --cfg job' prints every key")


def _check_groups_of_targets(config: Mapping[str, Any]) -> None:
    for group in ("callbacks", "logger"):
        for key, value in (config.get(group) or {}).items():
            if value is not None and not (isinstance(value, dict) and "_target_" in value):
                raise CellMapTypeError(f"{group}.{key} has no _target_, the class that it is; got {value!r}")


def check_missing(cfg: DictConfig) -> None:
    """Check that every required key has a value.

    Args:
        cfg: the configuration; a missing ``data.csv_path`` becomes null where crops are given in another way.

    Raises:
        CellMapValueError: a key has none.
    """
    other_sources = [OmegaConf.select(cfg, f"data.{name}") for name in ("datasets", "search_path")]
    if any(value is not None for value in other_sources) and OmegaConf.is_missing(cfg.data, "csv_path"):
        cfg.data.csv_path = None
    # Not OmegaConf.missing_keys: it resolves, and would report what refers to a missing value instead of that value.
    config = OmegaConf.to_container(cfg, resolve=False)
    missing = sorted(key for key, value in _leaves(config) if value == "???")
    if missing:
        hints = {"data.csv_path": ", or give data.search_path=... or data.datasets instead"}
        raise CellMapValueError("\n".join(f"{key} is required: {_remedy(key)}{hints.get(key, '')}" for key in missing))


def _remedy(key: str) -> str:
    """Return how to set a key; those of entries of a list are set with the list."""
    where, bracket, _ = key.partition("[")
    return f"set it in {where}" if bracket else f"set it with {key}=..."
