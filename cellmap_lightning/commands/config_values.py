"""Checks of the values of a configuration: arguments of classes, and the shape of the model's patch."""

import importlib
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from cellmap_lightning.commands.group_defaults import leftover_arguments, replacement_advice
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.patch_numbers import check_scale, check_shape
from cellmap_lightning.validation import did_you_mean

_HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
_NUMBERS = (int, float, bool, types.NoneType)


def target_nodes(node: Any, where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the key and the node of every part of a configuration that has a ``_target_``."""
    if isinstance(node, dict):
        if "_target_" in node:
            yield where, node
        for key, value in node.items():
            yield from target_nodes(value, f"{where}.{key}" if where else str(key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from target_nodes(value, f"{where}[{number}]")


def check_targets(cfg: DictConfig) -> None:
    """Check every ``_target_`` of a configuration; see `check_target`."""
    for where, node in target_nodes(OmegaConf.to_container(cfg, resolve=True)):
        check_target(where, node)


def check_target(where: str, node: dict[str, Any]) -> None:
    """Compare the keys of a ``_target_`` node with the signature of the class or function.

    Args:
        where: key of the node, for messages.
        node: the node, as plain containers.

    Raises:
        CellMapTypeError: the target cannot be imported, or a text stands where a number is needed.
        CellMapKeyError: an argument does not exist, or a required one is missing.
    """
    path = str(node["_target_"])
    name = path.rpartition(".")[2]
    target = _imported(path)
    if target is None:
        raise CellMapTypeError(f"{where}._target_: {_why_not_imported(path)}")
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # builtins without a signature
        return
    names = [p.name for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _check_arguments(where, node, names)
    if not node.get("_partial_") and not node.get("_args_"):
        required = [n for n in names if parameters[n].default is inspect.Parameter.empty and n not in node]
        if required:
            raise CellMapKeyError(f"{where}: {name} needs {', '.join(required)}")
    if not path.startswith("cellmap_lightning."):  # this package's classes check their arguments themselves
        _check_types(where, target, node)


def _check_arguments(where: str, node: dict[str, Any], names: list[str]) -> None:
    """Check that a class has the arguments that its node sets.

    Raises:
        CellMapKeyError: it does not have one of them.
    """
    path = str(node["_target_"])
    name = path.rpartition(".")[2]
    left, option, other = leftover_arguments(where, node, names)
    for key in node:
        if key not in names and key not in left and key not in _HYDRA_KEYS:
            hint = did_you_mean(key, names, f"; it takes {', '.join(names)}")
            raise CellMapKeyError(f"{where}.{key}: {name} has no argument {key!r}{hint}")
    if left:
        raise CellMapKeyError(
            f"{where}: {name} has no argument {', '.join(left)}, which {option} sets for {other}; {name} takes "
            f"{', '.join(names)}; {replacement_advice(where, path, left)}"
        )


def _imported(path: str) -> Any:
    """Return a class, a function or a method of a class by its path; None where it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError):
        pass
    # A method: the owner of the name is a class of the module.
    module, _, owner = module.rpartition(".")
    try:
        return getattr(getattr(importlib.import_module(module), owner), name)
    except (ImportError, ValueError, AttributeError):
        return None


def _why_not_imported(path: str) -> str:
    """Return the message for a class or function that cannot be imported, with the cause."""
    module, _, name = path.rpartition(".")
    text = f"there is no {path!r} to import"
    if not module:
        return f"{text}; a path is the module and the name, as in my_package.models.{name or 'Network'}"
    try:
        return text + did_you_mean(name, dir(importlib.import_module(module)))
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if missing == path.partition(".")[0]:
            return (
                f"{text}: the module {missing!r} is neither installed nor in a folder of PYTHONPATH; PYTHONPATH=. "
                "before the command adds the working directory"
            )
        if f"{path}.".startswith(f"{missing}."):
            return text
        return f"{path!r} cannot be imported: {error}"
    except (ImportError, ValueError) as error:
        return f"{path!r} cannot be imported: {error}"


def _check_types(where: str, target: Any, node: Mapping[str, Any]) -> None:
    """Check for texts and booleans where annotations allow numbers alone; most classes would fail much later."""
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations that cannot be evaluated
        return
    for key, value in node.items():
        types_ = _numeric_types(hints.get(key))
        if not types_ or (isinstance(value, dict) and "_target_" in value):
            continue
        if isinstance(value, str | list | dict) or (isinstance(value, bool) and bool not in types_):
            names = " or ".join(t.__name__ for t in types_)
            raise CellMapTypeError(f"{where}.{key} must be {names}, got {value!r}")


def _numeric_types(hint: Any) -> list[type]:
    """Return the number types of an annotation; none where it allows anything but numbers, tensors and None."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if not all(option in _NUMBERS or getattr(option, "__name__", "") == "Tensor" for option in options):
        return []
    return [option for option in options if option in _NUMBERS and option is not types.NoneType]


_UNETS = ("cellmap_lightning.training.unet.UNet", "monai.networks.nets.UNet", "monai.networks.nets.unet.UNet")


def check_patch(cfg: DictConfig, slices: bool = False) -> None:
    """Check the numbers of ``patch.shape`` and ``patch.scale``, where they are given.

    Args:
        cfg: the configuration.
        slices: whether a scale of two numbers is allowed without a shape, which then is that of a checkpoint.

    Raises:
        CellMapError: they cannot be those of a patch.
    """
    patch: Any = {name: OmegaConf.select(cfg, f"patch.{name}") for name in ("shape", "scale")}
    patch = {name: list(value) if isinstance(value, ListConfig) else value for name, value in patch.items()}
    lengths = 2 if slices else 3
    if patch["shape"] is not None:
        lengths = len(check_shape("patch.shape", patch["shape"]))
    if patch["scale"] is not None:
        check_scale("patch.scale", patch["scale"], lengths)


def check_model_shape(cfg: DictConfig) -> None:
    """Check that the patch fits the model: its dimensions, and lengths that the strides divide.

    A U-Net downsamples its patch by the strides and upsamples it again: other lengths come back changed.

    Raises:
        CellMapValueError: it does not.
    """
    shape = OmegaConf.select(cfg, "patch.shape")
    if not isinstance(shape, ListConfig):
        return
    lengths = [n for n in shape if n != 1]  # an axis of length 1 is dropped: 2D patches
    dimensions = OmegaConf.select(cfg, "model.spatial_dims")
    if dimensions is not None and dimensions != len(lengths):
        raise CellMapValueError(
            f"patch.shape={list(shape)} {_dimensions(shape)}, and model.spatial_dims={dimensions}; "
            f"{_fitting(shape, dimensions)}"
        )
    strides = OmegaConf.select(cfg, "model.strides")
    if not isinstance(strides, ListConfig):
        return
    try:
        factors = [math.prod(s if isinstance(s, int) else s[axis] for s in strides) for axis in range(len(lengths))]
    except (IndexError, TypeError):
        return  # the network's own error is about them
    for length, factor in zip(lengths, factors, strict=True):
        if isinstance(length, int) and length % factor:
            lower = max(length // factor * factor, factor)
            raise CellMapValueError(
                f"patch.shape={list(shape)}: {length} is not a multiple of {factor}, by which "
                f"model.strides={list(strides)} shrinks it; {lower} and {(length // factor + 1) * factor} are"
            )
    if lengths == factors and _normalizes_instances(cfg):
        raise CellMapValueError(
            f"patch.shape={list(shape)} is too small: model.strides={list(strides)} shrinks it to a single voxel, "
            f"which model.norm=INSTANCE cannot normalize; {[2 * n if n != 1 else n for n in shape]} fits (one longer "
            "axis is enough), or give fewer strides"
        )


def _dimensions(shape: ListConfig) -> str:
    """Return in words how many dimensions the samples of a patch have."""
    if len(shape) == 2:
        return "has two lengths (y, x), those of a slice"
    return f"has {sum(n != 1 for n in shape)} dimensions" + (" without its axis of length 1" if 1 in shape else "")


def _fitting(shape: ListConfig, dimensions: Any) -> str:
    """Return which patch fits a model, and which model fits the patch."""
    if len(shape) == 2 and dimensions == 3:
        return f"give three lengths (z, y, x), such as {[shape[0], shape[1], shape[1]]}, or for slices model=unet2d"
    if dimensions == 2:
        return f"give two lengths (y, x), such as {list(shape[-2:])}, or for three dimensions model=unet"
    return "give three lengths above 1 (z, y, x), or for slices model=unet2d"


def _normalizes_instances(cfg: DictConfig) -> bool:
    """Return True if the model is a U-Net of MONAI with instance normalization, its default."""
    if OmegaConf.select(cfg, "model._target_") not in _UNETS:
        return False
    norm = OmegaConf.select(cfg, "model.norm", default="INSTANCE")
    return str(norm[0] if isinstance(norm, ListConfig) else norm).upper() == "INSTANCE"


def refuse_csv(input_path: Any) -> None:
    """Refuse a list of crops in place of a raw volume.

    Raises:
        CellMapValueError: the path is that of a CSV.
    """
    if str(input_path).lower().endswith((".csv", ".tsv")):
        raise CellMapValueError(
            f"data.input_path={input_path} is a list of crops; give a raw volume, as in its column raw, or inspect the "
            f"crops with data.csv_path={input_path}"
        )
