"""The allow-list of classes that the configuration in a checkpoint may name.

Hydra imports and calls every ``_target_``. A checkpoint may come from an untrusted source, so its configuration is
restricted to a short allow-list, which the user can extend.
"""

import importlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra._internal.utils import _locate  # get_object, which logs what it cannot import

from cellmap_lightning.errors import CellMapValueError

#: Classes of this package.
OWN = (
    "cellmap_lightning.datamodule.CellMapDataModule",
    "cellmap_lightning.training.task.SegmentationTask",
    "cellmap_lightning.training.reconstruction.ReconstructionTask",
    "cellmap_lightning.training.networks.ContextNet",
    "cellmap_lightning.training.unet.UNet",
    "cellmap_lightning.transforms.normalization.OnDictionary",
)
#: Other packages' trusted classes: the modules that they are in, and their base class.
_TRUSTED = (
    (("torch.nn.modules",), "torch.nn.Module"),
    (("torch.optim",), "torch.optim.Optimizer"),
    (("torch.optim",), "torch.optim.lr_scheduler.LRScheduler"),
    (("monai.networks.nets", "monai.networks.blocks", "monai.networks.layers"), "torch.nn.Module"),
    (
        ("torchmetrics.aggregation", "torchmetrics.classification", "torchmetrics.regression",
         "torchmetrics.segmentation"),
        "torchmetrics.Metric",
    ),
)  # fmt: skip
#: Modules among them that are not trusted: an argument of their classes names a file, an address or a function.
_LOADING = ("cell_sam_wrapper", "hovernet", "milmodel", "torchvision_fc", "transchex")
LOADING = tuple(f"monai.networks.nets.{name}" for name in _LOADING)
#: Packages from which a name may be imported before its class is checked.
_ROOTS = ("cellmap_lightning", "torch.nn", "torch.optim", "monai.networks", "torchmetrics")
#: Options of a store that cannot send credentials elsewhere.
_HARMLESS_OPTIONS = ("anon", "profile")


class _NotImported(str):
    """The fault of a trusted name that cannot be imported."""

    __slots__ = ()


def check_trusted(config: Any, where: str, trust: Any = (), trust_checkpoint: Any = False) -> None:
    """Check that the configuration in a checkpoint names only trusted classes, without importing any other module.

    Args:
        config: the configuration, as plain containers.
        where: the checkpoint, for messages.
        trust: full names of further trusted modules, packages, classes or functions.
        trust_checkpoint: trust everything.

    Raises:
        CellMapValueError: the configuration names other classes, contains an interpolation, or is not plain.
    """
    if not isinstance(trust_checkpoint, bool):
        raise CellMapValueError(f"trust_checkpoint must be true or false, got {trust_checkpoint!r}")
    if trust_checkpoint:
        return
    faults = [*_faults(config, "", _names(trust))]
    missing = [f"  {key}: {fault}" for key, fault in faults if isinstance(fault, _NotImported)]
    untrusted = [f"  {key}: {fault}" for key, fault in faults if not isinstance(fault, _NotImported)]
    if untrusted:
        listed = "\n".join(untrusted)
        raise CellMapValueError(
            f"{where}: the configuration in the checkpoint could run any code:\n{listed}\n"
            "If you trust its author, allow a module or class with trust=[my_package.models], or everything with "
            "trust_checkpoint=true"
        )
    if missing:
        listed = "\n".join(missing)
        raise CellMapValueError(
            f"{where}: the configuration in the checkpoint names classes that cannot be imported:\n{listed}\n"
            "They need the modules of the training, installed or in a folder of PYTHONPATH; PYTHONPATH=. before the "
            "command adds the working directory"
        )


def _names(trust: Any) -> tuple[str, ...]:
    names = (trust,) if isinstance(trust, str) else () if trust is None else trust
    if not isinstance(names, Sequence) or not all(
        isinstance(name, str) and all(part.isidentifier() for part in name.split(".")) for name in names
    ):
        raise CellMapValueError(f"trust must be a list of modules or classes, as in [my_package.models], got {trust!r}")
    return tuple(names)


def _faults(node: Any, where: str, trust: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield the key and the fault of each part of a configuration that is not trusted."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            below = f"{where}.{key}".lstrip(".")
            fault = _key_fault(key, value, below)
            if fault is not None:
                yield below, fault
            if key != "_target_":
                yield from _faults(value, below, trust)
            elif (fault := _target_fault(value, trust)) is not None:
                yield below, fault
    elif isinstance(node, list | tuple):
        for number, value in enumerate(node):
            yield from _faults(value, f"{where}[{number}]", trust)
    elif isinstance(node, str):
        if "${" in node:
            yield where, f"{node!r} would be resolved on this machine"
    elif not isinstance(node, int | float | None):
        yield where, f"a {type(node).__name__} is no value of a configuration"


def _key_fault(key: Any, value: Any, where: str) -> str | None:
    """Return the reason why a key of a configuration is not trusted; None if it is."""
    if not isinstance(key, str | int) or "${" in str(key):
        return "no plain key"
    if key == "storage_options" and isinstance(value, Mapping):
        other = [str(name) for name in value if name not in _HARMLESS_OPTIONS]
        if other:
            return f"{', '.join(other)} could send credentials elsewhere; set {where} yourself"
    return None


def _below(name: str, roots: Sequence[str]) -> bool:
    return any(name == root or name.startswith(f"{root}.") for root in roots)


def _target_fault(target: Any, trust: tuple[str, ...]) -> str | None:
    """Return the reason why a ``_target_`` is not trusted; None if it is."""
    if not isinstance(target, str) or not all(part.isidentifier() for part in target.split(".")):
        return f"{target!r} is no name"
    if not _below(target, (*_ROOTS, *trust)):  # an import would run its module
        return f"{target!r} is not trusted"
    try:
        imported = _locate(target)
    except Exception as e:  # the code of a module can raise anything
        cause = e.__cause__ or e
        return _NotImported(f"{target!r} ({type(cause).__name__}: {next(iter(str(cause).splitlines()), '')})")
    if target in trust:
        return None
    # A trusted module may import untrusted names, so the module that defines the class counts.
    module, name = getattr(imported, "__module__", None), getattr(imported, "__qualname__", None)
    if not isinstance(module, str) or not isinstance(name, str):
        return f"{target!r} is no class"
    full = f"{module}.{name}"
    if _below(full, trust) or (inspect.isclass(imported) and _is_listed(imported, module, full)):
        return None
    return f"{target!r} is not trusted" if full == target else f"{target!r}, which is {full}, is not trusted"


def _is_listed(imported: type, module: str, full: str) -> bool:
    if full in OWN:
        return True
    if _below(module, LOADING):
        return False
    return any(_below(module, modules) and issubclass(imported, _class(base)) for modules, base in _TRUSTED)


def _class(path: str) -> type:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]
