"""Options that are given flat, though they belong to a dataclass of options."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from inspect import signature
from typing import Any, TypeVar

from cellmap_lightning.errors import CellMapTypeError
from cellmap_lightning.validation import did_you_mean

Options = TypeVar("Options")


def refuse_flat(owner: Callable[..., Any], given: Mapping[str, Any], groups: Mapping[str, type[Any]]) -> None:
    """Check that no unknown arguments were given; the error names the dataclass of options that has one.

    Args:
        owner: the class or function.
        given: its unknown arguments.
        groups: the dataclass of each argument that is one, such as ``{"read": ReadOptions}``.

    Raises:
        CellMapTypeError: an argument is unknown.
    """
    if not given:
        return
    name = next(iter(given))
    where = f"{owner.__name__}: it has no argument {name!r}"
    arguments = [parameter for parameter in signature(owner).parameters if parameter != "flat"]
    names = list(arguments)
    for argument, kind in groups.items():
        options = [field.name for field in fields(kind)]
        if name in options:
            raise CellMapTypeError(f"{where}; use {argument}={kind.__name__}({name}=...)")
        names += options
    raise CellMapTypeError(f"{where}{did_you_mean(name, names, '; it has ' + ', '.join(arguments))}")


def from_flat(kind: type[Options], settings: Mapping[str, Any]) -> Options:
    """Return a dataclass of options from flat settings, which may be those of several.

    Args:
        kind: the dataclass.
        settings: values by name; a field that is not among them has its default, and other names are left out.

    Raises:
        CellMapError: a value is invalid.

    Example:
        >>> from cellmap_lightning import ReadOptions
        >>> from_flat(ReadOptions, {"cache": "none", "seed": 0}).cache
        'none'
    """
    names: list[str] = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    return kind(**{name: settings[name] for name in names if name in settings})
