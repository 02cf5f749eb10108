"""Numbering of objects: connected components or a user function, and the minimum volume of an object."""

import importlib
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cellmap_lightning.errors import CellMapTypeError, CellMapValueError, missing_extra

Labels = npt.NDArray[Any]
#: From a boolean volume ``[z, y, x]`` to numbers of the same shape.
Numbering = Callable[[Labels], Labels]
#: Minimum volume of an object, nm³, for all classes or ``{class: nm³}`` with ``"*"`` for the others.
MinVolume = float | Mapping[str, float]


def components(present: Labels) -> Labels:
    """Number connected components of voxels with 26-connectivity (faces, edges, corners), as the challenge's scorer.

    Raises:
        MissingExtraError: scipy is not installed.
    """
    try:
        from scipy import ndimage
    except ImportError as e:
        raise missing_extra("targets", "components need scipy") from e
    numbers: Labels = ndimage.label(present, structure=np.ones((3, 3, 3), bool))[0]
    return numbers


def numbering(function: str | Numbering | None) -> Numbering:
    """Return a function that numbers objects.

    Args:
        function: the function, its name as ``package.module.function``, or None for `components`.

    Raises:
        CellMapTypeError: there is no such function.
    """
    if function is None:
        return components
    if callable(function):
        return function
    module, _, name = function.rpartition(".")
    try:
        imported: Numbering = getattr(importlib.import_module(module), name)
    except (ImportError, ValueError, AttributeError) as e:
        raise CellMapTypeError(f"instances={function}: there is no such function ({e}){_advice(module)}") from None
    return imported


def _advice(module: str) -> str:
    """Return the end of a message for a module in the working directory that is not on Python's path."""
    first = module.partition(".")[0]
    if not first or not (Path(f"{first}.py").is_file() or Path(first).is_dir()) or Path.cwd() in map(Path, sys.path):
        return ""
    return f"; {first} is in the working directory, which is not on Python's path: put PYTHONPATH=. before the command"


def check_min_volume(value: Any) -> MinVolume:
    """Return the setting ``min_volume`` as ``{class: nm³}``.

    Raises:
        CellMapValueError: a volume is not a finite number of at least 0.
    """
    volumes = dict(value) if isinstance(value, Mapping) else {"*": value}
    for name, volume in volumes.items():
        number = isinstance(volume, int | float) and not isinstance(volume, bool)
        if not number or not 0 <= volume < np.inf:
            where = f" for {name!r}" if name != "*" else ""
            raise CellMapValueError(f"min_volume must be at least 0 nm³, got {volume!r}{where}")
    return volumes


def min_voxels(volume: MinVolume, name: str, voxel: float) -> int:
    """Return the minimum number of voxels of an object of a class.

    Args:
        volume: see `MinVolume`.
        name: the class.
        voxel: volume of a voxel, nm³.
    """
    minimum = volume.get(name, volume.get("*", 0)) if isinstance(volume, Mapping) else volume
    return int(np.ceil(minimum / voxel - 1e-9))  # 8 voxels of 64 nm³ are 512 nm³ in spite of rounding


def remove_small(numbers: Labels, minimum: int) -> Labels:
    """Return numbers with 0 for objects of fewer than ``minimum`` voxels; the others keep their numbers."""
    if minimum <= 1 or not numbers.size:
        return numbers
    ids, inverse, counts = np.unique(numbers, return_inverse=True, return_counts=True)
    large = np.where(counts >= minimum, ids, 0).astype(numbers.dtype)
    return large[inverse].reshape(numbers.shape)
