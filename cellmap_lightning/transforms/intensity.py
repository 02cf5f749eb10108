"""What the stored values of raw become."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from cellmap_lightning.errors import CellMapKeyError, CellMapValueError

AUTO = "auto"


def unit_range(dtype: np.dtype[Any]) -> tuple[float, float]:
    """Offset and factor that bring a stored integer type to [0, 1]: ``(value - offset) * factor``."""
    if dtype.kind not in "iu":
        return 0.0, 1.0
    info = np.iinfo(dtype)
    return float(info.min), 1.0 / (float(info.max) - float(info.min))


def to_unit_range(raw: torch.Tensor) -> torch.Tensor:
    """float32 in [0, 1] by the range of the stored integer type (uint8: value / 255); floats as they are."""
    if raw.is_floating_point():
        return raw.to(torch.float32)
    info = torch.iinfo(raw.dtype)
    out = raw.to(torch.float32)
    if info.min:
        out -= float(info.min)
    return out.mul_(1.0 / (float(info.max) - float(info.min)))


def input_transforms(transforms: Any, inputs: Sequence[str], what: str) -> dict[str, Any]:
    """Transform of each input: ``"auto"``, None, or a callable; from one for all or ``{input: ...}``.

    A list is a chain of callables.

    Raises:
        CellMapKeyError: an input that does not exist.
        CellMapValueError: something that is none of these.
    """
    if isinstance(transforms, Mapping):
        unknown = [name for name in transforms if name not in inputs]
        if unknown:
            raise CellMapKeyError(f"{what}: {unknown} are not among the inputs {list(inputs)}")
        return {name: _check(transforms.get(name, AUTO), what) for name in inputs}
    return {name: _check(transforms, what) for name in inputs}


def _check(transform: Any, what: str) -> Any:
    if isinstance(transform, Sequence) and not isinstance(transform, str):
        return Chain([to_unit_range if t == AUTO else _callable(t, what) for t in transform])
    if transform is None or transform == AUTO or callable(transform):
        return transform
    raise CellMapValueError(f"{what} must be 'auto', null or something that can be called, got {transform!r}")


def _callable(transform: Any, what: str) -> Callable[..., Any]:
    if not callable(transform):
        raise CellMapValueError(f"{what}: {transform!r} in the list cannot be called")
    found: Callable[..., Any] = transform
    return found


class Chain:
    """Callables one after the other.

    Args:
        transforms: the callables.
    """

    def __init__(self, transforms: Sequence[Callable[..., Any]]) -> None:
        self.transforms = list(transforms)

    def __call__(self, value: torch.Tensor) -> torch.Tensor:
        """Apply them in order."""
        for transform in self.transforms:
            value = transform(value)
        return value
