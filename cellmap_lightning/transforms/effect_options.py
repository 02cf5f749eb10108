"""Checks of the options of intensity effects."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

from cellmap_lightning.errors import CellMapKeyError, CellMapTypeError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.transforms.normalization import is_finite, is_range
from cellmap_lightning.validation import did_you_mean, int_at_least, one_of, positive_number

T = TypeVar("T")
#: Lowest and highest value of a uniform distribution.
Span: TypeAlias = tuple[float, float]
#: Function of the key, for messages, and the value; it returns the value in its final type.
Check: TypeAlias = Callable[[str, Any], Any]


def option(check: Check, default: Any = dataclasses.MISSING) -> Any:
    """Return a field of an effect that is checked on construction; without a default it is required."""
    return dataclasses.field(default=default, metadata={"check": check})


def make(kind: Callable[..., T], where: str, config: Any) -> T:
    """Create an effect, a frozen dataclass, from its mapping.

    Args:
        kind: the dataclass, whose fields are from `option`.
        where: the key, for messages.
        config: ``{option: value}``.

    Raises:
        CellMapTypeError: the configuration is not a mapping.
        CellMapKeyError: an option is unknown, or a required one is missing.
        CellMapValueError: an invalid value.
    """
    names = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
    if not isinstance(config, Mapping):
        raise CellMapTypeError(f"{where} must be a mapping of {', '.join(names)}, got {config!r}")
    for name in config:
        if name not in names:
            hint = did_you_mean(name, names, f"; it has {', '.join(names)}")
            raise CellMapKeyError(f"{where} has no {name!r}{hint}")
    required = [f.name for f in dataclasses.fields(kind) if f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    missing = [name for name in required if config.get(name) is None]
    if missing:
        raise CellMapKeyError(f"{where} needs {' and '.join(missing)}; it has {', '.join(names)}")
    return kind(**{name: value for name, value in config.items() if value is not None})


def check_options(effect: Any, where: str) -> None:
    """Replace the options of a frozen dataclass by their checked values.

    Raises:
        CellMapError: an invalid value.
    """
    for field in dataclasses.fields(effect):
        value = getattr(effect, field.name)
        if value is not None:
            object.__setattr__(effect, field.name, field.metadata["check"](f"{where}.{field.name}", value))


def probability(where: str, value: Any) -> float:
    """Return a probability."""
    if not is_finite(value) or not 0 <= value <= 1:
        raise CellMapValueError(f"{where} must be a probability in [0, 1], got {value!r}")
    return float(value)


def span(unit: str = "", least: float = -math.inf, most: float = math.inf) -> Check:
    """Return the check of a range ``[lowest, highest]`` within bounds."""

    def check(where: str, value: Any) -> Span:
        if not is_range(value) or value[0] < least or value[1] > most:
            below = f", none below {least:g}" if least > -math.inf else ""
            above = f", none above {most:g}" if most < math.inf else ""
            raise CellMapValueError(
                f"{where} must be [lowest, highest]{unit and f' {unit}'}{below}{above}, got {value!r}"
            )
        return float(value[0]), float(value[1])

    return check


def number(where: str, value: Any) -> float:
    """Return a finite number."""
    if not is_finite(value):
        raise CellMapValueError(f"{where} must be a number, got {value!r}")
    return float(value)


def length(where: str, value: Any) -> float:
    """Return a length, nm."""
    return positive_number(f"{where} (nm)", value)


def count(where: str, value: Any) -> int:
    """Return a number of at least 1."""
    return int_at_least(where, value, 1)


def boolean(where: str, value: Any) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise CellMapTypeError(f"{where} must be true or false, got {value!r}")
    return value


def axis(where: str, value: Any) -> str:
    """Return the name of an axis."""
    return str(one_of(where, value, AXES, CellMapKeyError))


def axes(least: int = 1, most: int = 3) -> Check:
    """Return the check of a list of axes."""

    def check(where: str, value: Any) -> tuple[str, ...]:
        valid = isinstance(value, Sequence) and not isinstance(value, str) and all(name in AXES for name in value)
        if not valid or len(set(value)) != len(value) or not least <= len(value) <= most:
            wanted = f"{least}" if least == most else f"{least} to {most}"
            raise CellMapKeyError(f"{where} must name {wanted} of the axes z, y and x once each, got {value!r}")
        return tuple(value)

    return check
