"""The arguments that the options of the package's configuration groups set, such as ``model=unet`` for its network."""

from collections.abc import Mapping
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cellmap_lightning.commands.resolvers import CONFIGS


def leftover_arguments(where: str, node: Mapping[str, Any], names: list[str]) -> tuple[list[str], str, str]:
    """Return the arguments that the selected option of a group sets for another class than that of a node.

    They are left where only ``_target_`` is replaced, as by ``model._target_=my_package.models.MyUNet``.

    Args:
        where: key of the node, such as ``model`` or ``task.optimizer``.
        node: the node, as plain containers.
        names: the arguments of its class.

    Returns:
        The arguments of the other class that this one does not have, the option, and the full name of the other class;
        without such arguments an empty list and two empty texts.
    """
    group, _, below = where.partition(".")
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    option = choices.get(group)
    shipped: Any = _option(group, option) if isinstance(option, str) else {}
    for name in below.split(".") if below else ():
        shipped = shipped.get(name) if isinstance(shipped, Mapping) else None
    if not isinstance(shipped, Mapping) or shipped.get("_target_") in (None, node["_target_"]):
        return [], "", ""
    left = [key for key in node if not key.startswith("_") and key in shipped and key not in names]
    return (left, f"{group}={option}", str(shipped["_target_"])) if left else ([], "", "")


def replacement_advice(where: str, target: str, left: list[str]) -> str:
    """Return how to set the arguments of a class in place of those that an option sets for another one.

    Args:
        where: key of the node.
        target: the full name of the class.
        left: the arguments that it does not have.
    """
    removed = " ".join(f"~{where}.{key}" for key in left)
    if "." in where:
        return f"{removed} leaves {'it' if len(left) == 1 else 'them'} out"
    return (
        f"write _target_: {target} and its arguments into my_configs/{where}/mine.yaml and add --config-dir my_configs "
        f"{where}=mine; or give them in an experiment with 'override /{where}: null' among its defaults"
    )


def _option(group: str, option: str) -> dict[str, Any]:
    """Return an option of the package with those that it begins with; empty for a file of the user."""
    file = CONFIGS / group / f"{option}.yaml"
    if not file.is_file():
        return {}
    content: Any = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    first = [_option(group, name) for name in content.pop("defaults", []) if isinstance(name, str)]
    merged: Any = OmegaConf.to_container(OmegaConf.merge(*first, content), resolve=False)
    return dict(merged)
