"""Weights in the files of other trainings: plain state dicts, TorchScript files and packages of bioimage.io."""

import io
import warnings
import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from cellmap_lightning.checkpointing.unreadable import unreadable
from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.training.checkpoints import check_exists
from cellmap_lightning.validation import first_few

_RDF = "rdf.yaml"
#: Largest description of a package that is read, bytes.
_LARGEST_RDF = 1 << 20
#: Keys under which trainings store a state dict.
_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "network", "weights")


@dataclass(frozen=True, eq=False)
class WeightFile:
    """The weights in a file.

    Attributes:
        kind: ``checkpoint`` of Lightning, ``state_dict``, ``torchscript`` or ``bioimageio``.
        weights: tensors by name.
    """

    kind: Literal["checkpoint", "state_dict", "torchscript", "bioimageio"]
    weights: Mapping[str, Tensor]


def read_weights(path: Path, setting: str) -> WeightFile:
    """Read the weights of a file; nothing but tensors and plain values, and of TorchScript no computation is run.

    Args:
        path: a checkpoint, a state dict (under ``state_dict``, ``model_state_dict``, ``model``, ... or plain), a
            TorchScript file, or a package of bioimage.io with weights ``pytorch_state_dict`` or ``torchscript``.
        setting: the setting that names it, for messages.

    Raises:
        CellMapFileNotFoundError: there is no such file.
        CellMapValueError: it cannot be read without running code from it, or holds no weights.
    """
    check_exists(path, setting)
    where = f"{setting}={path}"
    names = zipfile.ZipFile(path).namelist() if zipfile.is_zipfile(path) else []
    if _RDF in names:
        return WeightFile("bioimageio", _packaged(path, where))
    if any(name.endswith("/constants.pkl") for name in names):
        return WeightFile("torchscript", _scripted(str(path), where))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises what its readers raise
        with path.open("rb") as file:
            first = file.read(8)
        raise CellMapValueError(f"{where} {unreadable(first, e)}") from e
    lightning = isinstance(content, Mapping) and {"state_dict", "pytorch-lightning_version"} <= set(content)
    return WeightFile("checkpoint" if lightning else "state_dict", _state_dict(content, where))


def rename_weights(weights: Mapping[str, Tensor], prefixes: Any, where: str) -> dict[str, Tensor]:
    """Rename weights by prefix.

    Args:
        weights: tensors by name.
        prefixes: ``{old prefix: new prefix}``; the longest prefix that fits is replaced. An empty old prefix fits
            every name.
        where: the setting and its file, for messages.

    Raises:
        CellMapTypeError: ``prefixes`` is not a mapping of texts.
        CellMapKeyError: no weight begins with one of them.
        CellMapValueError: two weights get the same name.
    """
    if not isinstance(prefixes, Mapping) or not all(isinstance(p, str) for pair in prefixes.items() for p in pair):
        raise CellMapTypeError(f"init_from_map must be {{old prefix: new prefix}}, got {prefixes!r}")
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in weights):
            raise CellMapKeyError(
                f"init_from_map: no weight of {where} begins with {prefix!r}; they are {first_few(list(weights))}"
            )
    renamed: dict[str, Tensor] = {}
    for name, value in weights.items():
        prefix = max((p for p in prefixes if name.startswith(p)), key=len, default=None)
        new = name if prefix is None else prefixes[prefix] + name.removeprefix(prefix)
        if new in renamed:
            raise CellMapValueError(f"init_from_map: two weights of {where} get the name {new!r}; map them apart")
        renamed[new] = value
    return renamed


def load_weights(
    module: torch.nn.Module, weights: Mapping[str, Tensor], where: str, prefix: str = "", skip: Collection[str] = ()
) -> str:
    """Load the weights whose names and shapes fit a module.

    Args:
        module: the module, which is changed.
        weights: tensors by name, see `read_weights`.
        where: the setting and its file, for messages.
        prefix: prefix of the module's weights, such as ``network.``; where no name has it, all names are compared.
        skip: names of weights that are not loaded, since their size depends on the classes.

    Returns:
        A report of the loaded, initialized and unused weights, one line per weight.

    Raises:
        CellMapValueError: none of the weights fits.
    """
    prefix = prefix if any(name.startswith(prefix) for name in weights) else ""
    saved = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    own = module.state_dict()
    # Not strict=False alone: load_state_dict raises for other shapes.
    fits = {
        name: value
        for name, value in saved.items()
        if name in own and value.shape == own[name].shape and name not in skip
    }
    if not fits:
        raise CellMapValueError(
            f"{where}: none of its {len(saved)} weights fits the {len(own)} of the model; their names begin with "
            f"{first_few(list(saved)) or 'nothing'}, those of the model with {first_few(list(own))}; map "
            "other prefixes with init_from_map={old: new}"
        )
    lines = [f"{len(fits)} of the {len(own)} weights of the model are loaded"]
    for name, value in own.items():
        if name in skip:
            lines.append(f"  {name} is initialized: its size depends on the classes")
        elif name not in saved:
            lines.append(f"  {name} is initialized: it is not in the file")
        elif name not in fits:
            lines.append(f"  {name} is initialized: {list(saved[name].shape)} saved, {list(value.shape)} needed")
    unused = [name for name in saved if name not in own]
    if unused:
        lines.append(f"  not used: {', '.join(unused)}")
    module.load_state_dict(fits, strict=False)
    return "\n".join(lines)


def _state_dict(content: Any, where: str) -> dict[str, Tensor]:
    """Return the state dict in the content of a file."""
    candidates = [content[key] for key in _KEYS if key in content] if isinstance(content, Mapping) else []
    for candidate in [*candidates, content]:
        if isinstance(candidate, Mapping):
            tensors = {str(k): v for k, v in candidate.items() if isinstance(v, Tensor)}
            if tensors:
                return tensors
    found = f"has {first_few(list(content))}" if isinstance(content, Mapping) else f"is a {type(content).__name__}"
    raise CellMapValueError(
        f"{where} holds no weights: it {found}; give a state dict, as of torch.save(network.state_dict(), ...)"
    )


def _scripted(source: Any, where: str) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # TorchScript is deprecated in torch
            module = torch.jit.load(source, map_location="cpu")  # type: ignore[no-untyped-call]
    except (RuntimeError, ValueError) as e:
        reason = str(e).strip().splitlines()[0]
        raise CellMapValueError(f"{where} is not a TorchScript file that torch can read: {reason}") from e
    return dict(module.state_dict())


def _packaged(path: Path, where: str) -> dict[str, Tensor]:
    """Return the weights of a package of bioimage.io; its Python code, if it has any, is not read."""
    with zipfile.ZipFile(path) as package:
        if package.getinfo(_RDF).file_size > _LARGEST_RDF:
            raise CellMapValueError(f"{where}: its {_RDF} is larger than {_LARGEST_RDF} bytes; it is no description")
        try:
            description = yaml.safe_load(package.read(_RDF))
        except (yaml.YAMLError, zipfile.BadZipFile, UnicodeDecodeError) as e:
            raise CellMapValueError(f"{where}: its {_RDF} cannot be read: {str(e).splitlines()[0]}") from e
        listed = description.get("weights") if isinstance(description, Mapping) else None
        formats = listed if isinstance(listed, Mapping) else {}
        chosen = next((name for name in ("pytorch_state_dict", "torchscript") if name in formats), None)
        if chosen is None:
            names = ", ".join(map(str, formats)) or "nothing"
            raise CellMapValueError(f"{where} has weights as {names}; pytorch_state_dict or torchscript is needed")
        source = formats[chosen].get("source") if isinstance(formats[chosen], Mapping) else None
        if source not in package.namelist():
            raise CellMapValueError(f"{where}: the weights {source!r} are not in the package; download them into it")
        data = io.BytesIO(package.read(source))
    if chosen == "torchscript":
        return _scripted(data, where)
    try:
        return _state_dict(torch.load(data, map_location="cpu", weights_only=True), where)
    except CellMapValueError:
        raise
    except Exception as e:  # torch raises what its readers raise
        raise CellMapValueError(f"{where}: {source} {unreadable(data.getvalue()[:8], e)}") from e
