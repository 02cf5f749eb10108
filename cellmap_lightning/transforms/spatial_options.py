"""Checks of the configuration of spatial transforms."""

from collections.abc import Mapping, Sequence
from typing import Any

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError
from cellmap_lightning.geometry.lattice import AXES
from cellmap_lightning.transforms.normalization import is_finite
from cellmap_lightning.validation import did_you_mean


def axes_of(name: str, config: Any, kind: type, names: Sequence[str] = AXES) -> Any:
    """Return the ``axes`` of a transform, empty where it is off.

    Args:
        name: the transform, for messages.
        config: ``{axes: ...}`` or None.
        kind: ``Mapping`` for a value per axis, ``Sequence`` for names alone.
        names: names that an axis may have.

    Raises:
        CellMapKeyError: another form, or an unknown or repeated axis.
        CellMapValueError: ``axes`` has another type.
    """
    empty: Any = {} if kind is Mapping else []
    if config is None:
        return empty
    shape = "{axis: value}" if kind is Mapping else "[axis, ...]"
    if not isinstance(config, Mapping) or set(config) != {"axes"}:
        raise CellMapKeyError(f"spatial_transforms.{name} must be {{axes: {shape}}}, got {config!r}")
    axes = config["axes"]
    if axes is None:
        return empty
    if not isinstance(axes, kind) or isinstance(axes, str):
        raise CellMapValueError(f"spatial_transforms.{name}.axes must be {shape}, got {axes!r}")
    given: list[Any] = list(axes)  # type: ignore[call-overload]
    if not set(given) <= set(names) or len(set(given)) != len(given):
        known = ", ".join(names[:-1]) + f" and {names[-1]}"
        raise CellMapKeyError(f"spatial_transforms.{name}.axes must name {known} at most once, got {given}")
    return axes


def keys_of(name: str, config: Any, required: Sequence[str], optional: Sequence[str]) -> Mapping[str, Any]:
    """Return the options of a transform after a check of their names.

    Raises:
        CellMapKeyError: no mapping, or an option is missing or unknown.
    """
    known = [*required, *optional]
    if not isinstance(config, Mapping):
        raise CellMapKeyError(
            f"spatial_transforms.{name} must be {{{', '.join(f'{k}: ...' for k in known)}}}, got {config!r}"
        )
    for key in config:
        if key not in known:
            hint = did_you_mean(key, known)
            raise CellMapKeyError(f"spatial_transforms.{name} has no option {key!r}; it has {', '.join(known)}{hint}")
    missing = [key for key in required if config.get(key) is None]
    if missing:
        raise CellMapKeyError(f"spatial_transforms.{name} needs {' and '.join(missing)}, got {dict(config)!r}")
    return config


def number_between(name: str, value: Any, low: float, high: float, unit: str = "") -> float:
    """Return a number in ``[low, high]``.

    Raises:
        CellMapValueError: not a finite number in this range.
    """
    if not is_finite(value) or not low <= value <= high:
        raise CellMapValueError(f"spatial_transforms.{name} must be in [{low:g}, {high:g}]{unit}, got {value!r}")
    return float(value)
