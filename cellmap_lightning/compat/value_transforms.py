"""Value transforms that are called with what cellmap-data calls them with."""

from collections.abc import Callable
from typing import Any

import torch

from cellmap_lightning.transforms.normalization import seed_own_generator


class OnFloats:
    """A transform of raw that gets float32 ``[z, y, x]``, as cellmap-data reads it, instead of stored integers.

    With those, ``(raw - 128) / 64`` would wrap around. Values are not scaled.

    Args:
        transform: the callable.
    """

    def __init__(self, transform: Callable[..., Any]) -> None:
        self.transform = transform
        named: Any = transform if hasattr(transform, "__qualname__") else type(transform)
        self.__module__, self.__qualname__ = named.__module__, named.__qualname__  # names it in messages and settings

    def __call__(self, raw: torch.Tensor) -> torch.Tensor:
        """Return the transformed patch, ``[1, z, y, x]`` as it was given."""
        value = self.transform(raw[0].to(torch.float32))
        return value[None] if isinstance(value, torch.Tensor) else value

    def set_random_state(self, seed: int) -> None:
        """Seed the transform's own generator, where it has one."""
        seed_own_generator(self.transform, seed)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OnFloats) and bool(self.transform == other.transform)

    def __hash__(self) -> int:
        return hash(id(self.transform))


def on_floats(transforms: Any) -> Any:
    """Return callables as `OnFloats`; None and names of built-in transforms stay."""
    return OnFloats(transforms) if callable(transforms) else transforms
